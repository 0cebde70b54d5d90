"""Lines that cannot be read are listed, or removed and counted; unused roles are refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.data_section import DataSection
from pipelines.data.preparation import prepare
from pipelines.errors import DataError
from pipelines.runtime.interfaces.inputs import DataInputs, StagePaths
from pipelines.runtime.interfaces.results import DataResult

Prepare = Callable[..., DataResult]
GOOD = [json.dumps({"prompt": f"Write red {number}.", "completion": "red"}) for number in range(40)]
BAD = ['{"prompt": "Write red.", "completion": ', "not JSON", '["a", "list"]']


@pytest.fixture
def prepared(tmp_path: Path, tiny_folder: Path) -> Prepare:
    """Return a function that writes lines to a file and prepares it."""

    def run(lines: Sequence[str], **settings: Any) -> DataResult:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines))
        section = {
            "source": str(path),
            "max_tokens": 64,
            "validation_examples": 8,
            **settings,
        }
        data = DataSection.model_validate(section)
        inputs = DataInputs(data=data, sources={}, tokenizer="t", template="c", seed=7)
        folder = tmp_path / "stage"
        folder.mkdir(exist_ok=True)
        result, _ = prepare(folder, inputs, StagePaths(base=str(tiny_folder), sources={}))
        return result

    return run


def messages(assistant: str) -> list[str]:
    """Return rows whose answers have a role of this name."""
    rows = []
    for number in range(40):
        question = {"role": "user", "content": f"Write red {number}."}
        rows.append({"messages": [question, {"role": assistant, "content": "red"}]})
    return [json.dumps(row) for row in rows]


def test_lines_that_are_not_json_are_an_error_by_default(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"3 rows .* line 41 .*; line 42 .*; line 43"):
        prepared(GOOD + BAD)


def test_lines_that_are_not_json_are_dropped_and_counted_if_the_recipe_allows_it(
    prepared: Prepare,
) -> None:
    lines = [*BAD, *GOOD, json.dumps({"prompt": "Write red.", "completion": ""})]
    result = prepared(lines, bad_rows="drop")
    assert (result.rows, result.bad_rows) == (44, 4)
    kept = result.train_examples + result.validation_examples + result.tuning_examples
    assert kept + result.unused_examples == 40


def test_a_file_without_any_readable_line_is_an_error(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"3 rows of data source .* cannot be read"):
        prepared(BAD, bad_rows="drop")


def test_a_role_that_occurs_in_no_row_is_refused(prepared: Prepare) -> None:
    assert prepared(messages("helper"), roles={"helper": "assistant"}).rows == 40
    with pytest.raises(DataError, match=r"data.roles has 'helpr', which occurs in no row of"):
        prepared(messages("helper"), roles={"helper": "assistant", "helpr": "assistant"})
