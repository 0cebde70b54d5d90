"""JSON is read exactly as written; bad rows are listed with their lines in one error."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loaded_rows import load, write

from pipelines.data.sources import json_document
from pipelines.data.sources.json_document import JsonDocument
from pipelines.errors import DataError

Values = dict[str, Any]
ROWS = [{"text": "one"}, {"text": "two"}]
TEXTS = [
    "2024-03-05",
    "2024-03-05T10:00:00Z",
    "007",
    "1.50",
    "Café",
    "Cafe\u0301",
    "👩‍👩‍👧",
    "שלום",
    "a\u0000b",
    "line\u2028separator and \u0085 and \x0c",
    "\ufeffmark inside\ufeff",
    " spaces ",
    "",
]


def lines_of(rows: list[Values], *, ascii_only: bool = True) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


def line_problems(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        load(path)
    return str(refused.value)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_texts_survive_exactly(tmp_path: Path, suffix: str, ascii_only: bool) -> None:
    rows = [{"prompt": text, "messages": [{"content": text}]} for text in TEXTS]
    content = lines_of(rows, ascii_only=ascii_only)
    if suffix == "json":
        content = json.dumps(rows, ensure_ascii=ascii_only, indent=2)
    assert load(write(tmp_path / f"rows.{suffix}", content)).rows == rows


def test_values_keep_their_types(tmp_path: Path) -> None:
    row = {"integer": 10**30, "float": 1.5, "flag": True, "null": None, "nested": {"a": [None]}}
    [loaded] = load(write(tmp_path / "rows.jsonl", lines_of([row]))).rows
    assert loaded == row
    assert [type(value) for value in loaded.values()] == [type(value) for value in row.values()]


def test_a_late_column_and_a_changing_type_are_read(tmp_path: Path) -> None:
    rows: list[Values] = [{"text": "x"}] * 3000 + [{"late": 1}, {"text": ["a"], "late": "2"}]
    loaded = load(write(tmp_path / "rows.jsonl", lines_of(rows)))
    assert loaded.rows == rows
    assert loaded.columns == ("text", "late")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("codec", "reported"), [("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16")]
)
def test_line_ends_and_byte_order_marks_are_not_content(
    tmp_path: Path, end: str, codec: str, reported: str
) -> None:
    text = end.join(['{"text": "one"}', "", "  ", '{"text": "two"}'])
    loaded = load(write(tmp_path / "rows.jsonl", text.encode(codec)))
    assert loaded.rows == ROWS
    assert loaded.places == ["line 1 of 'rows.jsonl'", "line 4 of 'rows.jsonl'"]
    assert loaded.facts.encoding == reported


def test_an_encoding_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "été"}\n'.encode("latin-1"))
    assert load(path, encoding="latin-1").rows == [{"text": "été"}]
    assert "line 1 of 'rows.jsonl' is not valid UTF-8" in line_problems(path)


BAD_LINES = {
    b'{"text": ': "is not valid JSON (",
    b"{'text': 'x'}": "is not valid JSON (",
    b'["text"]': "is not a JSON object",
    b'"text"': "is not a JSON object",
    b'{"text": "\xe9"}': "is not valid UTF-8",
    b'{"text": "a", "text": "b"}': "has the key 'text' more than once",
    b'{"m": [{"a": 1, "a": 2}]}': "has the key 'a' more than once",
    b'{"x": NaN}': "has NaN, which is not valid JSON",
    b'{"x": -Infinity}': "has -Infinity, which is not valid JSON",
    b'{"x": 1e999}': "has the number 1e999, which is too large",
    b'{"text": "\\ud83d"}': "has a lone surrogate '\\ud83d' in 'text'",
    b'{"\\udc00": "x"}': "has a lone surrogate '\\udc00' in a column name",
    b'{"text": "x"} {"text": "y"}': "is not valid JSON (Extra data",
    b'{"x": ' + b"9" * 5000 + b"}": "cannot be read (",
    b'{"x": ' + b"[" * 100_000: "cannot be read (",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')
    message = line_problems(path)
    assert f"line 3 of 'rows.jsonl' {BAD_LINES[line]}" in message
    assert str(path) in message
    assert message.endswith("; fix or remove it")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_has_to_be_named_json(tmp_path: Path, indent: int | None) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps(ROWS, indent=indent))
    assert "starts with a JSON list" in line_problems(path)
    assert "let its name end in .json" in line_problems(path)


def test_bad_lines_of_all_files_are_counted_in_one_error(tmp_path: Path) -> None:
    good = '{"text": "x"}\n'
    write(tmp_path / "a.jsonl", good + "{\n" * 3 + good)
    write(tmp_path / "b.jsonl", good + "[]\n" * 1200)
    message = line_problems(tmp_path)
    assert message.startswith("1,203 rows of data source")
    listed = ["line 2 of 'a.jsonl'", "line 4 of 'a.jsonl'", "line 3 of 'b.jsonl'"]
    for place in listed:
        assert place in message
    assert "line 4 of 'b.jsonl'" not in message
    assert "and 1,198 more; fix or remove them" in message


DOCUMENTS = {
    "list": json.dumps(ROWS),
    "pretty list": json.dumps(ROWS, indent=4),
    "lines": lines_of(ROWS),
    "data": json.dumps({"version": "1.1", "tags": ["a"], "data": ROWS, "count": 2}),
    "other key": json.dumps({"rows": ROWS}, indent=1),
    "single line": '{"examples": [{"text": "one"}, {"text": "two"}]}',
}


@pytest.mark.parametrize("form", DOCUMENTS)
def test_each_form_of_a_json_file_is_read(tmp_path: Path, form: str) -> None:
    loaded = load(write(tmp_path / "rows.json", DOCUMENTS[form]))
    assert loaded.rows == ROWS


def test_the_place_in_a_list_is_its_row(tmp_path: Path) -> None:
    assert load(write(tmp_path / "x.json", DOCUMENTS["data"])).places[1] == "row 2 of 'x.json'"


def test_lists_by_name_are_splits(tmp_path: Path) -> None:
    content = {"train": ROWS, "validation": [{"text": "three"}], "other": [{"text": "four"}]}
    path = write(tmp_path / "rows.json", json.dumps(content))
    assert load(path).rows == ROWS
    assert load(path, split="other").rows == [{"text": "four"}]
    with pytest.raises(DataError, match=r"'x' is not a split of .* has other, train, validation"):
        load(path, split="x")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ('[{"text": "one"}, {"text": ', "cannot be read as json: Expecting value in line 1"),
        ('[{"text": "one"}\n{"text": "two"}]', "Expecting ']' in line 2"),
        ('[{"text": "one"}] x', "nothing may follow the document in line 1"),
        ('{"prompt": ["a", "b"], "completion": ["c", "d"]}', "lists of other values (completion"),
        ('{"text": "only"}', "is a JSON object with no list instead of rows"),
        ('{"data": [{"text": "a"}], "data": []}', "'data' occurs more than once"),
        ('[{"text": "one"}, 5, {"a": NaN}]', "row 2 of 'x.json' is not a JSON object"),
        ('[{"text": "one"}, {"a": 1, "a": 2}]', "row 2 of 'x.json' has the key 'a' more than"),
        ("5", "Expecting '['"),
    ],
)
def test_another_document_is_refused(tmp_path: Path, content: str, fragment: str) -> None:
    path = write(tmp_path / "x.json", content)
    message = line_problems(path)
    assert fragment in message
    assert str(path) in message


def test_a_json_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", '[{"text": "été"}]'.encode("latin-1"))
    assert "set data.encoding" in line_problems(path)
    assert load(path, encoding="latin-1").rows == [{"text": "été"}]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(values=st.lists(json_values), chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]))
def test_values_are_the_same_wherever_chunks_end(
    values: list[Any], chunk: int, indent: int | None
) -> None:
    text = json.dumps(values, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_document, "CHUNK_CHARACTERS", chunk)
        document = JsonDocument(io.StringIO(text), json.JSONDecoder())
        assert list(document.elements()) == values
        document.check_end()


def test_the_reader_does_not_keep_a_long_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_document, "CHUNK_CHARACTERS", 1000)
    stream = io.StringIO(json.dumps([{"text": "x" * 50}] * 5000))
    elements = JsonDocument(stream, json.JSONDecoder()).elements()
    next(elements)
    assert stream.tell() <= 2000
