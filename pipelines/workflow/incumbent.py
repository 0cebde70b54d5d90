"""The registered champion, fetched to be scored on the same items as the adapters that want its place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.config.experiments import EvaluatedModel
from pipelines.errors import RegistryError
from pipelines.tracking.retry import until_it_answers
from pipelines.workflow.run import Figures, Run, Trained


@dataclass(frozen=True)
class Champion:
    """What is known of the registered champion before anything is promoted."""

    version: str
    adapter_sha256: str
    subject: EvaluatedModel | None = None
    """It as a model to be scored; None where it is one of the adapters at hand, or cannot be scored."""
    objection: str | None = None
    """Why it cannot be compared; None where it can."""


def find_champion(run: Run, base: Figures, adapters: Sequence[Trained]) -> Champion | None:
    """Fetch the champion of the recipe's registered model; None where there is none, or the gate does not ask for it.

    A registry that does not answer may hold one, so nothing can be told to be better; the rest of the run goes on.
    """
    if run.recipe.gate.min_gain_over_champion is None:
        return None
    from pipelines.tracking import registry

    try:
        name, root = run.recipe.registry.model, run.stages.root
        found = until_it_answers(lambda: registry.incumbent(name, root, root / "champions"))
    except RegistryError as error:
        return Champion("unknown", "", objection=str(error))
    if found is None:
        return None
    champion = Champion(found.version, found.adapter_sha256)
    if any(one.figures["adapter_sha256"] == found.adapter_sha256 for one in adapters):
        return champion
    objection = _objection(run, base, found.tags)
    if objection is not None:
        return replace(champion, objection=objection)
    quantized = found.tags.get("quantization", "none") != "none"
    label = f"champion-{found.version}"
    return replace(
        champion,
        subject=EvaluatedModel(
            label, quantized, found.adapter_sha256, "adapter", str(found.folder), whole=False
        ),
    )


def _objection(run: Run, base: Figures, tags: Mapping[str, str]) -> str | None:
    """Return why a champion's answers on these items would say nothing; None where they say what they seem to."""
    digests = {
        name.removeprefix("base_fingerprint."): value
        for name, value in tags.items()
        if name.startswith("base_fingerprint.")
    }
    if any(digests.get(kind) != digest for kind, digest in base["digests"].items()):
        return f"it was trained on another base, {tags.get('base', 'which it does not name')}"
    for what in ("tokenizer", "template"):
        if tags.get(f"{what}_sha256") != str(base[f"{what}_sha256"]):
            return f"it was trained with another {what}, so that it would be asked in words it does not know"
    if tags.get("seed") != str(run.recipe.seed):
        seed = tags.get("seed", "which it does not name")
        return f"its data was split by another seed ({seed}), so that it may have been trained on what is held out now"
    return None
