"""Search the training data for the evaluation's items.

    python -m pipelines.evaluation.data_check STAGE_FOLDER

No model is loaded.
"""

from collections.abc import Iterator
from pathlib import Path

from datasets import load_from_disk

from pipelines.evaluation.benchmarks import sample
from pipelines.evaluation.contamination import contaminated
from pipelines.evaluation.probes import read_probes
from pipelines.models.tokenizer import load_tokenizer
from pipelines.paths import folders
from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import CheckInputs, StagePaths
from pipelines.runtime.interfaces.kinds import CHECK
from pipelines.runtime.interfaces.results import CheckResult


def check(folder: Path, inputs: CheckInputs, paths: StagePaths) -> tuple[CheckResult, list[str]]:
    """Return the items whose text is in the training data, by benchmark."""
    items = []
    for benchmark in inputs.general:
        items += sample(benchmark, inputs.items_per_benchmark, inputs.seed)
    items += read_probes(inputs.probes, folders(paths.recipe, paths.here))
    found = contaminated(items, _training_texts(paths))
    return CheckResult(contaminated=found, items=len(items)), []


def _training_texts(paths: StagePaths) -> Iterator[str]:
    """Yield the text of each training example."""
    tokenizer = load_tokenizer(paths.required("base"))
    train = load_from_disk(str(paths.required("data") / "train"))
    for batch in train.select_columns(["input_ids"]).iter(1000):
        yield from tokenizer.batch_decode(batch["input_ids"])


if __name__ == "__main__":
    execute_stage(CHECK, check)
