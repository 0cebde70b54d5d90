"""The registered champion, fetched to be scored on the same items as the adapters that want its place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.arms import Subject
from pipelines.errors import RegistryError
from pipelines.run import Figures, Run, Trained


@dataclass(frozen=True)
class Champion:
    """What is known of the registered champion before anything is promoted."""

    version: str
    adapter_sha256: str
    subject: Subject | None = None
    """It as a model to be scored; None where it is one of the adapters at hand, or cannot be scored."""
    objection: str | None = None
    """Why it cannot be compared; None where it can."""


def find_champion(run: Run, base: Figures, adapters: Sequence[Trained]) -> Champion | None:
    """Fetch the champion of the recipe's registered model; None where there is none, or the gate does not ask for it.

    A registry that does not answer may hold one, so nothing can be told to be better; the rest of the run goes on.
    """
    if run.recipe.gate.min_gain_over_champion is None:
        return None
    from pipelines.reporting import registry

    try:
        found = registry.incumbent(run.recipe.registry.model, run.stages.root, run.stages.root / "champions")
    except RegistryError as error:
        return Champion("unknown", "", objection=str(error))
    if found is None:
        return None
    champion = Champion(found.version, found.adapter_sha256)
    if any(one.figures["adapter_sha256"] == found.adapter_sha256 for one in adapters):
        return champion
    digests = {name.removeprefix("base_fingerprint."): value for name, value in found.tags.items() if name.startswith("base_fingerprint.")}
    if any(digests.get(kind) != digest for kind, digest in base["digests"].items()):
        objection = f"it was trained on another base, {found.tags.get('base', 'which it does not name')}"
        return replace(champion, objection=objection)
    quantised = found.tags.get("quantization", "none") != "none"
    label = f"champion-{found.version}"
    return replace(champion, subject=Subject(label, quantised, found.adapter_sha256, "adapter", str(found.folder), whole=False))
