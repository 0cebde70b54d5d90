"""The registered champion, fetched to be scored on the same items as the adapters that want its place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.arms import Subject
from pipelines.errors import RegistryError
from pipelines.run import Figures, Run, Trained


@dataclass(frozen=True)
class Incumbent:
    """What is known of the champion before anything is promoted."""

    version: str | None
    """Its version; None where no champion is registered."""
    adapter_sha256: str | None
    words: str
    """A sentence for the report."""
    subject: Subject | None = None
    """The champion as a model to be scored; None where there is none, or it is one of the adapters at hand."""
    objection: str | None = None
    """Why it cannot be compared; None where it can."""

    def subjects(self) -> list[Subject]:
        """Return what is to be scored for it."""
        return [] if self.subject is None else [self.subject]

    def plain(self) -> dict[str, Any]:
        """Return it as plain values for the summary."""
        label = None if self.subject is None else self.subject.label
        known = {"version": self.version, "adapter_sha256": self.adapter_sha256, "words": self.words}
        return {**known, "label": label, "objection": self.objection}


def find_incumbent(run: Run, base: Figures, adapters: Sequence[Trained]) -> Incumbent:
    """Fetch the champion of the recipe's registered model, where the gate asks to compare with it."""
    name = run.recipe.registry.model
    if run.recipe.gate.min_gain_over_champion is None:
        return Incumbent(None, None, "The registered champion was not compared: the gate does not ask for it.")
    from pipelines.reporting import registry

    try:
        found = registry.incumbent(name, run.stages.root, run.stages.root / "champions")
    except RegistryError as error:
        return Incumbent(None, None, f"The registered champion could not be fetched: {error}", objection=str(error))
    if found is None:
        return Incumbent(None, None, f"{name} had no champion.")
    champion = Incumbent(found.version, found.adapter_sha256, f"Version {found.version} of {name} was the champion.")
    return _compared(champion, found, base, adapters)


def _compared(champion: Incumbent, found: Any, base: Figures, adapters: Sequence[Trained]) -> Incumbent:
    """Say how the champion is to be compared: as one of the adapters at hand, on its own, or not at all."""
    same = [one.arm.label for one in adapters if one.figures["adapter_sha256"] == found.adapter_sha256]
    if same:
        return replace(champion, words=f"{champion.words[:-1]}, and is {same[0]} itself.")
    trained_on = {key.removeprefix("base_fingerprint."): value for key, value in found.tags.items() if key.startswith("base_fingerprint.")}
    if any(trained_on.get(kind) != digest for kind, digest in base["digests"].items()):
        objection = f"version {found.version} was trained on another base ({found.tags.get('base')}), so the two share no scale"
        return replace(champion, words=f"{champion.words[:-1]}, trained on another base.", objection=objection)
    quantised = found.tags.get("quantization") != "none"
    subject = Subject(f"champion-{found.version}", quantised, found.adapter_sha256, "adapter", str(found.folder), whole=False)
    return replace(champion, subject=subject)
