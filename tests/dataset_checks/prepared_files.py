"""Prepare the files of a case completely, and compare the saved splits with its expectation."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import load_from_disk
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from dataset_checks.bases import base
from dataset_checks.expectations import FileCase, LearnedText, Refused
from dataset_checks.observed import refusal_problem, supervised_runs
from pipelines.config.data_section import DataSection
from pipelines.data.preparation import prepare
from pipelines.errors import DataError
from pipelines.runtime.interfaces.inputs import DataInputs, StagePaths
from pipelines.runtime.interfaces.results import DataResult

DEFAULTS = {"validation_examples": 4, "max_tokens": 500}
SPLITS = ("train", "validation", "tuning")


def run_file_case(case: FileCase, base_folder: Path) -> str:
    """Return how the splits differ from what is expected; empty if they do not.

    Args:
        case: its files are written into a temporary folder.
        base_folder: of a base whose template is ChatML.
    """
    with TemporaryDirectory() as scratch:
        files, stage = Path(scratch, "files"), Path(scratch, "stage")
        files.mkdir()
        stage.mkdir()
        try:
            source = str(case.write(files))
            prepare_source(source, case.settings, base_folder, stage)
        except (DataError, ValidationError) as error:
            return _refused_completely(case, str(error), stage)
        except Exception as error:  # noqa: BLE001 - any other error is a wrong outcome
            return f"a traceback: {type(error).__name__}: {error}"
        if isinstance(case.expected, Refused):
            return "not refused"
        return "; ".join(_problems(case, case.expected, stage))


def prepare_source(
    source: str, settings: Mapping[str, Any], base_folder: Path, stage: Path
) -> DataResult:
    """Prepare a source in a stage folder."""
    data = DataSection.model_validate({"source": source, **DEFAULTS, **settings})
    inputs = DataInputs(data=data, sources={}, tokenizer="t", template="c", seed=7)
    paths = StagePaths(base=str(base_folder), sources={source: source})
    result, _ = prepare(stage, inputs, paths)
    return result


def _refused_completely(case: FileCase, message: str, stage: Path) -> str:
    """Return what is wrong with a refusal, which must leave no files."""
    left = sorted(path.name for path in stage.iterdir())
    if left:
        return f"refused, but left {left}: {message}"
    return refusal_problem(case.expected, message)


def _problems(case: FileCase, expected: tuple[LearnedText, ...], stage: Path) -> Iterator[str]:
    tokenizer = base("chatml")
    found = {name: list(_learned(stage / name, tokenizer)) for name in SPLITS}
    everything = [pair for pairs in found.values() for pair in pairs]
    yield from _difference("rows", everything, expected)
    if case.validation is not None:
        yield from _difference("validation", found["validation"], case.validation)


def _learned(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[LearnedText]:
    """Yield the text and the supervised text of each example of a split."""
    if not folder.is_dir():
        return
    for example in load_from_disk(str(folder)):
        ids = example["input_ids"]
        runs = supervised_runs(example["supervised"])
        answer = "".join(str(tokenizer.decode(ids[start:end])) for start, end in runs)
        yield str(tokenizer.decode(ids)), answer


def _difference(
    what: str, found: Iterable[LearnedText], expected: Iterable[LearnedText]
) -> Iterator[str]:
    """Yield what is missing and what must not be there."""
    found_counts, expected_counts = Counter(found), Counter(expected)
    missing = list((expected_counts - found_counts).elements())
    added = list((found_counts - expected_counts).elements())
    if missing or added:
        counts = f"{len(missing)} missing and {len(added)} others"
        yield f"{what}: {counts}, such as {missing[:1]} and {added[:1]}"
