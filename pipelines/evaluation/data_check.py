"""Search the training data for the evaluation's items.

    python -m pipelines.evaluation.data_check STAGE_FOLDER

No model is loaded.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import load_from_disk

from pipelines.evaluation.benchmarks import sample
from pipelines.evaluation.contamination import ItemText, contaminated
from pipelines.evaluation.harness import load_tasks
from pipelines.evaluation.probes import read_probes
from pipelines.models.packs import INPUT_IDS
from pipelines.models.tokenizer import load_tokenizer, tokenizer_folder
from pipelines.paths import folders
from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import CheckInputs, StagePaths
from pipelines.runtime.interfaces.kinds import CHECK
from pipelines.runtime.interfaces.results import CheckResult

BATCH_EXAMPLES = 1000


def check(folder: Path, inputs: CheckInputs, paths: StagePaths) -> tuple[CheckResult, list[str]]:
    """Return the items whose text is in the training data, by benchmark.

    Args:
        folder: of the stage; nothing is written into it.
        inputs: which items are evaluated.
        paths: of the base, the prepared data and the recipe.

    Returns:
        the result, and no files.
    """
    items = _item_texts(inputs, folders(paths.recipe, paths.here))
    found = contaminated(items, _training_texts(inputs, paths))
    return CheckResult(contaminated=found, items=len(items)), []


def _item_texts(inputs: CheckInputs, search_folders: Sequence[Path]) -> list[ItemText]:
    """Return the texts of all items of the evaluation."""
    items = []
    for benchmark in inputs.general:
        items += sample(benchmark, inputs.items_per_benchmark, inputs.seed)
    items += read_probes(inputs.probes, search_folders)
    texts = [ItemText.of(item) for item in items]
    if inputs.lm_eval is not None:
        tasks = load_tasks(inputs.lm_eval, inputs.seed, search_folders)
        texts += [ItemText(name, text) for name, text in tasks.texts()]
    return texts


def _training_texts(inputs: CheckInputs, paths: StagePaths) -> Iterator[str]:
    """Yield the text of each training example."""
    data = paths.required("data")
    folder = tokenizer_folder(paths.required("base"), data)
    tokenizer = load_tokenizer(folder, trust_remote_code=inputs.trust_remote_code)
    train = load_from_disk(str(data / "train"))
    for batch in train.select_columns([INPUT_IDS]).iter(BATCH_EXAMPLES):
        yield from tokenizer.batch_decode(batch[INPUT_IDS])


if __name__ == "__main__":
    execute_stage(CHECK, check)
