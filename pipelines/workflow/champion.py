"""The registered champion, fetched so that it is scored on the same items as the new adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.config.experiments import EvaluatedModel
from pipelines.errors import RegistryError
from pipelines.runtime.interfaces.results import BaseResult, DataResult
from pipelines.tracking.retry import retry_until_reachable
from pipelines.tracking.task_identity import task_objection
from pipelines.workflow.run import PipelineRun, TrainedExperiment


@dataclass(frozen=True)
class Champion:
    """What is known about the registered champion before anything is promoted."""

    version: str
    adapter_sha256: str
    model: EvaluatedModel | None = None
    """The champion as a model to score; None if it is one of the run's adapters, or cannot be
    scored."""
    objection: str | None = None
    """Why it cannot be compared; None if it can."""


def find_champion(
    run: PipelineRun,
    base: BaseResult,
    data: DataResult,
    adapters: Sequence[TrainedExperiment],
) -> Champion | None:
    """Fetch the champion of the registered model; None if there is none to compare with.

    If the registry does not answer, it may have a champion, so no adapter can be promoted; the run
    continues.
    """
    if run.recipe.gate.min_gain_over_champion is None:
        return None
    from pipelines.tracking import registry

    name = run.recipe.registry.model
    root = run.stages.root
    try:
        found = retry_until_reachable(
            lambda: registry.fetch_champion(name, root, root / "champions")
        )
    except RegistryError as error:
        return Champion("unknown", "", objection=str(error))
    if found is None:
        return None
    champion = Champion(found.version, found.adapter_sha256)
    if any(trained.result.saved.adapter_sha256 == found.adapter_sha256 for trained in adapters):
        return champion
    objection = _objection(run, base, data, found.tags)
    if objection is not None:
        return replace(champion, objection=objection)
    model = EvaluatedModel(
        label=f"champion-{found.version}",
        quantized=found.tags.get("quantization", "none") != "none",
        weights=found.adapter_sha256,
        output="adapter",
        folder=str(found.folder),
        is_complete=False,
    )
    return replace(champion, model=model)


def _objection(
    run: PipelineRun, base: BaseResult, data: DataResult, tags: Mapping[str, str]
) -> str | None:
    """Return why the champion's scores on these items would mislead; None if they would not."""
    for kind, digest in base.digests.items():
        if tags.get(f"base_fingerprint.{kind}") != digest:
            return f"it was trained on another base, {tags.get('base', 'which it does not name')}"
    parts = {"tokenizer": base.tokenizer_sha256, "template": data.template_sha256}
    for name, sha256 in parts.items():
        if tags.get(f"{name}_sha256") != sha256:
            return f"it was trained with another {name}, so that its prompts would be unfamiliar"
    objection = task_objection(run.recipe, tags)
    if objection is not None:
        return objection
    seed = tags.get("seed", "which it does not name")
    if seed != str(run.recipe.seed):
        return (
            f"its data was split by another seed ({seed}), so that it may have been trained on "
            "what is held out now"
        )
    return None
