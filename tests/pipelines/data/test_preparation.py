"""Preparation saves every usable row, reproducibly, and counts the others."""

import re
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from pipelines.config.sections import DataSection
from pipelines.data.preparation import prepare
from pipelines.errors import DataError
from pipelines.runtime.interfaces.inputs import DataInputs, StagePaths
from pipelines.runtime.interfaces.kinds import DATA
from pipelines.runtime.interfaces.results import DataResult
from pipelines.runtime.stage import Stage

Values = dict[str, Any]
Maker = Callable[..., DataSection]
Prepare = Callable[..., tuple[DataResult, Path]]
END = "<|end|>"


@pytest.fixture
def prepared(tmp_path: Path, tiny_folder: Path) -> Prepare:
    """Return a function that prepares data in a stage folder; it returns metrics and folder."""

    def run(
        settings: DataSection, *, seed: int = 7, runs: str = "runs", base: Path = tiny_folder
    ) -> tuple[DataResult, Path]:
        inputs = DataInputs(data=settings, source="rows", tokenizer="t", template="c", seed=seed)
        paths = StagePaths(base=str(base))
        folder = Stage(DATA, "rows", inputs, tmp_path / runs, paths).begin()
        metrics, files = prepare(folder, inputs, paths)
        assert all((folder / name).is_file() for name in files)
        return metrics, folder

    return run


def test_every_row_is_kept(prepared: Prepare, pairs_file: Path, data_settings: Maker) -> None:
    metrics, folder = prepared(data_settings(pairs_file))
    train = list(load_from_disk(str(folder / "train")))
    validation = load_from_disk(str(folder / "validation"))
    assert (metrics.rows, metrics.left_out, metrics.cut) == (60, 0, 0)
    assert metrics.train_examples == len(train) == 52
    assert metrics.validation_examples == len(validation) == 8
    assert metrics.train_tokens == sum(len(example["input_ids"]) for example in train)
    assert metrics.supervised_tokens == sum(sum(example["supervised"]) for example in train)


def test_the_saved_tokens_decode_to_the_rows(
    prepared: Prepare,
    pairs_file: Path,
    data_settings: Maker,
    chat: PreTrainedTokenizerBase,
) -> None:
    _, folder = prepared(data_settings(pairs_file))
    for example in load_from_disk(str(folder / "validation")):
        text = chat.decode(example["input_ids"])
        found = re.search(r"user\nSay (\w+) (\d+)\.", text)
        assert found is not None, text
        assert int(found[2]) < 60
        supervised = compress(example["input_ids"], example["supervised"])
        assert chat.decode(list(supervised)) == f"{found[1]} {found[1]}.{END}"


def test_preparation_is_reproducible(
    prepared: Prepare, pairs_file: Path, data_settings: Maker
) -> None:
    metrics, folder = prepared(data_settings(pairs_file), runs="here")
    other_metrics, other_folder = prepared(data_settings(pairs_file), runs="there")
    assert folder != other_folder
    assert metrics == other_metrics


def test_the_digest_depends_on_the_seed(
    prepared: Prepare, pairs_file: Path, data_settings: Maker
) -> None:
    metrics, _ = prepared(data_settings(pairs_file), seed=7)
    other_metrics, _ = prepared(data_settings(pairs_file), seed=8)
    assert metrics.digest != other_metrics.digest


def test_truncated_completions_are_left_out_and_counted(
    prepared: Prepare,
    write_rows: Callable[..., Path],
    data_settings: Maker,
) -> None:
    rows = [{"prompt": f"Write red {i}.", "completion": "red"} for i in range(40)]
    long_prompts = [{"prompt": "sheep " * 60, "completion": "red"} for _ in range(3)]
    long_answers = [{"prompt": f"Write much {i}.", "completion": "red " * 60} for i in range(5)]
    metrics, folder = prepared(data_settings(write_rows(rows + long_prompts + long_answers)))
    assert (metrics.rows, metrics.left_out, metrics.cut) == (48, 3, 5)
    assert metrics.train_examples == 45 - 8
    for example in load_from_disk(str(folder / "train")):
        assert any(example["supervised"])


def test_data_without_any_complete_prompt_is_refused(
    prepared: Prepare,
    write_rows: Callable[..., Path],
    data_settings: Maker,
) -> None:
    path = write_rows([{"prompt": "sheep " * 60, "completion": "red"} for _ in range(20)])
    message = r"all 20 completions of .* are cut off by max_tokens=64; raise it or use shorter"
    with pytest.raises(DataError, match=message):
        prepared(data_settings(path))
