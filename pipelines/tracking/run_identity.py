"""Which MLflow run a comparison or a model has, so that another evaluation updates it.

A model's run is that of its recipe, label and training; a comparison's run is that of its models.
What is only scored in another way, such as on more items, changes neither.
"""

from pathlib import Path

from pipelines.comparison.document import Summary
from pipelines.reporting.model_parts import training_of
from pipelines.runtime.stage import digest
from pipelines.tracking import version_files
from pipelines.tracking.logged import Tags

IDENTITY_TAG = "mlflow.lora.identity"
"""On the run of a comparison or a model; MLflow's pages do not show it."""


def adapter_folder(summary: Summary, label: str) -> Path:
    """Return the folder with an adapter's files."""
    return Path(training_of(summary.models[label]).folder) / "adapter"


def comparison_identity(summary: Summary) -> str:
    """Return the digest that identifies the run of a comparison."""
    models = {label: model_identity(summary, label) for label in summary.models}
    return digest([_recipe(summary), models])


def model_identity(summary: Summary, label: str) -> str:
    """Return the digest that identifies the run of a model.

    An adapter's includes its files, so that a run never gets the files of another training.
    """
    model = summary.models[label]
    recipe = summary.recipe
    files: Tags = {}
    training = ""
    if model.training is not None:
        training = model.training.key
    if model.judgment is not None:
        files = version_files.file_tags(adapter_folder(summary, label))
        files["weights"] = str(training_of(model).result.saved.adapter_sha256)
    facts = {
        "label": label,
        "training": training,
        "files": files,
        "base": summary.base.digests,
        "quantization": recipe.base_model.quantization,
        "data": summary.data.digest,
        "seed": summary.seed,
    }
    return digest([_recipe(summary), facts])


def _recipe(summary: Summary) -> list[str]:
    return [summary.name, summary.recipe.registry.model]
