"""Preparation saves every usable row, reproducibly, and counts the others."""

import json
import re
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from pipelines.config.data_section import DataSection, WeightedSource
from pipelines.data.preparation import prepare
from pipelines.errors import DataError
from pipelines.models.tokenizer import load_tokenizer, template_digest
from pipelines.runtime.interfaces.inputs import DataInputs, StagePaths
from pipelines.runtime.interfaces.kinds import DATA
from pipelines.runtime.interfaces.results import DataResult
from pipelines.runtime.stage import Stage

Values = dict[str, Any]
Maker = Callable[..., DataSection]
Prepare = Callable[..., tuple[DataResult, Path]]
END = "<|end|>"
SPLITS = ("train", "validation", "tuning")


@pytest.fixture
def prepared(tmp_path: Path, tiny_folder: Path) -> Prepare:
    """Return a function that prepares data in a stage folder; it returns metrics and folder."""

    def run(
        settings: DataSection,
        *,
        seed: int = 7,
        runs: str = "runs",
        base: Path = tiny_folder,
        sources: dict[str, str] | None = None,
    ) -> tuple[DataResult, Path]:
        inputs = DataInputs(data=settings, sources={}, tokenizer="t", template="c", seed=seed)
        paths = StagePaths(base=str(base), sources=sources or {})
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
    message = r"none of the 20 rows .* 20 have no completion left within max_tokens=64; raise it"
    with pytest.raises(DataError, match=message):
        prepared(data_settings(path))


def test_rows_that_cannot_be_learned_are_reported_together(
    prepared: Prepare, write_rows: Callable[..., Path], data_settings: Maker
) -> None:
    rows = [{"prompt": f"Write red {i}.", "completion": "red"} for i in range(40)]
    rows[3]["completion"] = ""
    rows[8]["completion"] = ""
    rows[20]["prompt"] = 5
    path = write_rows(rows)
    message = r"3 rows cannot be .* line 4 .* \(and 1 more\) has '' .*; line 21 of .* has 5 as its"
    with pytest.raises(DataError, match=message):
        prepared(data_settings(path))
    metrics, folder = prepared(data_settings(path, bad_rows="drop"), runs="dropped")
    assert (metrics.rows, metrics.bad_rows) == (40, 3)
    assert metrics.train_examples + metrics.validation_examples + metrics.tuning_examples == 37
    assert {path.name for path in folder.iterdir()} <= {*SPLITS, "inputs.json"}


def test_too_long_examples_are_an_error_or_removed(
    prepared: Prepare, write_rows: Callable[..., Path], data_settings: Maker
) -> None:
    rows = [{"prompt": f"Write red {i}.", "completion": "red"} for i in range(40)]
    rows += [{"prompt": f"Write much {i}.", "completion": "red " * 60} for i in range(5)]
    path = write_rows(rows)
    with pytest.raises(DataError, match=r"5 examples have more than data.max_tokens 64 tokens"):
        prepared(data_settings(path, long_examples="error"))
    metrics, _ = prepared(data_settings(path, long_examples="drop"), runs="dropped")
    assert (metrics.left_out, metrics.cut, metrics.lengths.longest <= 64) == (5, 0, True)


def test_max_rows_draws_rows_by_the_seed(
    prepared: Prepare, pairs_file: Path, data_settings: Maker
) -> None:
    metrics, _ = prepared(data_settings(pairs_file, max_rows=30))
    again, _ = prepared(data_settings(pairs_file, max_rows=30), runs="again")
    other, _ = prepared(data_settings(pairs_file, max_rows=30), runs="other", seed=8)
    assert metrics.rows == 30
    assert metrics.digest == again.digest != other.digest


def test_sources_are_mixed_by_their_weights(
    prepared: Prepare, write_rows: Callable[..., Path]
) -> None:
    first = write_rows([{"prompt": f"Write red {i}.", "completion": "red"} for i in range(40)])
    other = first.parent / "other.jsonl"
    other.write_text('{"question": "Write blue?", "answer": "blue"}\n')
    settings = DataSection(
        sources=(
            WeightedSource(source=str(first)),
            WeightedSource(source=str(other), weight=3),
        ),
        validation_examples=8,
        max_tokens=64,
    )
    metrics, folder = prepared(settings)
    train = load_from_disk(str(folder / "train"))
    references = list(train["reference"])
    held_out = metrics.validation_examples + metrics.tuning_examples + metrics.unused_examples
    assert [source.schema_name for source in metrics.sources] == [
        "prompt/completion",
        "question/answer",
    ]
    assert references.count("blue") in (0, 3)
    assert references.count("red") + references.count("blue") // 3 + held_out == 41


def test_the_users_validation_rows_are_what_is_scored(
    prepared: Prepare, write_rows: Callable[..., Path], data_settings: Maker
) -> None:
    train = [{"prompt": f"Write red {i}.", "completion": "red"} for i in range(40)]
    own = [{"prompt": f"Write red {i}.", "completion": "red"} for i in range(36, 60)]
    path = write_rows(train)
    other = path.parent / "own.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in own))
    metrics, _ = prepared(data_settings(path, validation_source=str(other)))
    assert (metrics.train_examples, metrics.excluded_examples) == (36, 4)
    assert (metrics.validation_examples, metrics.tuning_examples) == (8, 8)
    assert metrics.overlap.exact == 0


def test_a_group_column_is_used_only_if_it_is_named(
    prepared: Prepare, write_rows: Callable[..., Path], data_settings: Maker
) -> None:
    rows = [
        {"prompt": f"Write red {i}.", "completion": "red", "group": group}
        for i, group in enumerate([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, *map(float, range(10))] * 3)
    ]
    path = write_rows(rows)
    metrics, _ = prepared(data_settings(path))
    assert metrics.sources[0].unused_columns == ("group",)
    metrics, folder = prepared(data_settings(path, group_column="group"), runs="grouped")
    assert metrics.sources[0].unused_columns == ()
    train = set(load_from_disk(str(folder / "train"))["group"])
    validation = set(load_from_disk(str(folder / "validation"))["group"])
    assert train | validation <= {str(i) for i in range(10)}
    assert train.isdisjoint(validation)
    rows[7]["group"] = None
    with pytest.raises(DataError, match=r"line 8 of .* has no value in the column 'group'"):
        prepared(data_settings(write_rows(rows), group_column="group"), runs="missing")


def test_a_chat_template_of_the_recipe_is_saved_with_the_data(
    prepared: Prepare, pairs_file: Path, data_settings: Maker, tmp_path: Path, plain_folder: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    settings = data_settings(pairs_file, chat_template=str(template))
    metrics, folder = prepared(settings, base=plain_folder)
    saved = load_tokenizer(folder / "tokenizer")
    assert saved.chat_template == template.read_text()
    first = load_from_disk(str(folder / "train"))[0]
    assert saved.decode(first["input_ids"]).startswith("user: Say")
    assert metrics.template_sha256 == template_digest(saved)
    _, plain = prepared(data_settings(pairs_file), runs="plain")
    assert not (plain / "tokenizer").exists()
    assert metrics.end_tokens == (saved.convert_tokens_to_ids("<|end|>"),)


def test_validation_rows_that_cannot_be_scored_are_refused(
    prepared: Prepare, write_rows: Callable[..., Path], data_settings: Maker
) -> None:
    """Otherwise other rows than the user's would be held out."""
    train = write_rows([{"prompt": f"Write red {i}.", "completion": "red"} for i in range(40)])
    own = write_rows([{"prompt": "sheep " * 90, "completion": "red"}] * 9, name="own.jsonl")
    message = r"none of the 9 rows of validation can be learned: .* 9 have no completion left"
    with pytest.raises(DataError, match=message):
        prepared(data_settings(train, validation_source=str(own)))


def test_docstrings_are_grouped_by_module(prepared: Prepare, data_settings: Maker) -> None:
    """Functions of one module resemble each other, whatever their question is."""
    metrics, folder = prepared(data_settings("docstrings", max_tokens=320, max_rows=400))
    assert metrics.sources[0].unused_columns == ()
    train = set(load_from_disk(str(folder / "train"))["group"])
    validation = set(load_from_disk(str(folder / "validation"))["group"])
    assert train.isdisjoint(validation)
    assert not any(re.fullmatch(r"[0-9a-f]{64}", group) for group in train | validation)


def test_a_chat_template_is_found_where_the_recipe_is(
    prepared: Prepare, pairs_file: Path, data_settings: Maker, tmp_path: Path, plain_folder: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "words.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    settings = data_settings(pairs_file, chat_template="words.jinja")
    paths = {"words.jinja": str(file)}
    _, folder = prepared(settings, base=plain_folder, sources=paths)
    assert load_tokenizer(folder / "tokenizer").chat_template == file.read_text()
    with pytest.raises(DataError, match=r"data.chat_template 'words.jinja' is not chatml, none or"):
        prepared(settings, base=plain_folder, runs="without")
