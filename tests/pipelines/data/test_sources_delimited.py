"""Cells of .csv and .tsv files are text as written, in the detected dialect and encoding."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loaded_rows import load, write

from pipelines.data.sources.delimited_files import DELIMITERS
from pipelines.errors import DataError

CELLS = [
    "007",
    "1.50",
    "True",
    "None",
    "NA",
    "null",
    "nan",
    "",
    "2024-03-05",
    "1e5",
    " spaces ",
    'a "quoted" word',
    "a, b; c | d\te",
    "two\nlines",
    "two\r\nlines\r\n",
    "Café 👩‍👩‍👧 \u2028 \x0c",
]


def csv_of(rows: list[list[str]], delimiter: str = ",", end: str = "\r\n") -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter, lineterminator=end).writerows(rows)
    return stream.getvalue()


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_cells_are_text_as_written(tmp_path: Path, delimiter: str, end: str, codec: str) -> None:
    rows = [[f"question {number}", cell] for number, cell in enumerate(CELLS)]
    text = csv_of([["prompt", "completion"], *rows], delimiter, end)
    loaded = load(write(tmp_path / "rows.csv", text.encode(codec)))
    assert [list(row.values()) for row in loaded.rows] == rows
    assert loaded.columns == ("prompt", "completion")
    assert (loaded.facts.delimiter, loaded.facts.encoding) == (delimiter, codec)


@given(
    rows=st.lists(st.lists(st.text(), min_size=3, max_size=3), min_size=1),
    delimiter=st.sampled_from(DELIMITERS),
)
def test_any_cells_survive(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    write(path, "\n".join([delimiter.join("abc"), csv_of(rows, delimiter)]))
    loaded = load(path, delimiter=delimiter, encoding="utf-8")
    assert [list(row.values()) for row in loaded.rows] == rows


def test_tabs_delimit_a_tsv_file(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "rows.tsv", "prompt\tcompletion\na, b\tc; d\n"))
    assert loaded.rows == [{"prompt": "a, b", "completion": "c; d"}]


def test_the_delimiter_is_the_one_with_equal_counts(tmp_path: Path) -> None:
    """Commas in a header or a text do not make a comma the delimiter."""
    content = "prompt;answer, short\nOne, two, three;four\nFive;six, seven\n"
    loaded = load(write(tmp_path / "rows.csv", content))
    assert loaded.columns == ("prompt", "answer, short")
    assert loaded.rows[0]["prompt"] == "One, two, three"


def test_delimiters_that_are_equally_likely_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "a;b,c\n1;2,3\n")
    with pytest.raises(DataError, match=r"',' and ';', and each may .*set data\.delimiter"):
        load(path)
    assert load(path, delimiter=";").rows == [{"a": "1", "b,c": "2,3"}]


def test_one_column_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'text\none\n"two, three"\n\nfour; five\n')
    loaded = load(path)
    assert [row["text"] for row in loaded.rows] == ["one", "two, three", "four; five"]
    assert loaded.places[-1] == "line 5 of 'rows.csv'"


def test_the_place_is_the_first_line_of_a_record(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'a,b\n"x\ny\nz",1\nw,2\n')
    assert load(path).places == ["line 2 of 'rows.csv'", "line 5 of 'rows.csv'"]


def test_ragged_rows_are_listed_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "a,b\n1,2\n1\n1,2\n1,2,3\n")
    with pytest.raises(DataError) as refused:
        load(path)
    message = str(refused.value)
    assert "2 rows of data source" in message
    assert "line 3 of 'rows.csv' has 1 cells, but the header has 2" in message
    assert "line 5 of 'rows.csv' has 3 cells" in message


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("a,,c\n1,2,3\n", ["'2' in column 2", "no name", "name it"]),
        (",a,b\nx,1,2\n", ["'x' in column 1", "no name"]),
        ("a,b,\n1,2,\n1,2,3\n", ["line 3", "'3' in column 3", "quote cells"]),
        ("a,b,a\n1,2,3\n", ["'a' more than once"]),
        ('a,b\n1,2\n"open,3\n', ["line 3", "not valid csv", "quotes"]),
        ('a,b\n"x"y,2\n', ["line 2", "not valid csv"]),
        ('a,b\n"say \\"hi\\", ok",2\n', ["line 2", "not valid csv"]),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: str, fragments: list[str]) -> None:
    path = write(tmp_path / "rows.csv", content)
    with pytest.raises(DataError) as refused:
        load(path)
    assert str(path) in str(refused.value)
    for fragment in fragments:
        assert fragment in str(refused.value)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (",a,b\n0,1,2\n1,3,4\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        ("a,b,\n1,2,\n3,4, \n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
    ],
    ids=["row numbers", "empty cells"],
)
def test_harmless_columns_without_a_name_are_read(
    tmp_path: Path, content: str, rows: list[dict[str, str]]
) -> None:
    loaded = load(write(tmp_path / "rows.csv", content))
    named = [{name: row[name] for name in ("a", "b")} for row in loaded.rows]
    assert named == rows
    assert [name for name in loaded.columns if name.startswith("column ")]


@pytest.mark.parametrize("first_line", ["sep=;", '"sep=;"', "SEP=;"])
def test_a_first_line_can_name_the_delimiter(tmp_path: Path, first_line: str) -> None:
    content = f"\ufeff{first_line}\r\na,b;c\r\n1,2;3\r\n"
    loaded = load(write(tmp_path / "rows.csv", content))
    assert loaded.rows == [{"a,b": "1,2", "c": "3"}]
    assert loaded.places == ["line 3 of 'rows.csv'"]


@pytest.mark.parametrize("delimiter", ["", "::", "\\t", '"', "\n"])
def test_a_delimiter_that_is_not_a_character_is_refused(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "rows.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match=r"data\.delimiter .* is not a single character"):
        load(path, delimiter=delimiter)


def test_a_very_long_cell_is_read(tmp_path: Path) -> None:
    text = "x" * 300_000
    assert load(write(tmp_path / "rows.csv", f"text\n{text}\n")).rows == [{"text": text}]


WESTERN_TEXTS = [
    "Café",
    "Wie heißt die Straße? Müller wohnt in der Bäckerstraße.",
    "¿De qué color es la caja? El niño comió mañana, ¡qué año!",
    "It’s a box that isn’t red – it’s blue.",
]


@pytest.mark.parametrize("text", WESTERN_TEXTS)
def test_western_text_is_detected(tmp_path: Path, text: str) -> None:
    loaded = load(write(tmp_path / "rows.csv", f"number;text\n1;{text}\n".encode("cp1252")))
    assert loaded.rows == [{"number": "1", "text": text}]
    assert loaded.facts.encoding == "cp1252"


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        ("Какого цвета коробка? Коробка красная.\n", "cp1251"),
        ("Zażółć gęślą jaźń. Dziękuję, proszę bardzo.\n", "cp1250"),
        ("Kırmızı değil, yeşil. Şu çağdaş ışığı gördüm.\n", "cp1254"),
        ("盒子是什么颜色？盒子是红色的。\n", "gbk"),
        ("Où est le café ? À côté de la forêt, déjà.\n", "latin-1"),
        ("He said “hello” – it’s fine… costs €5\n", "cp1252"),
    ],
)
def test_an_uncertain_encoding_has_to_be_named(tmp_path: Path, text: str, codec: str) -> None:
    path = write(tmp_path / "rows.txt", (text * 5).encode(codec))
    with pytest.raises(DataError, match=r"cannot be detected; it may be .*set data\.encoding"):
        load(path)
    assert load(path, encoding=codec).rows == [{"text": text.strip()}] * 5


def test_a_late_byte_that_is_not_utf_8_is_found(tmp_path: Path) -> None:
    lines = ["text", *["plain " * 100] * 2000, "Café"]
    path = write(tmp_path / "rows.csv", "\n".join(lines).encode("latin-1"))
    loaded = load(path)
    assert loaded.rows[-1] == {"text": "Café"}
    assert loaded.facts.encoding == "cp1252"


@pytest.mark.parametrize("encoding", ["no-such-encoding", "rot13"])
def test_an_unknown_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "rows.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match=f"'{encoding}' is not a known text encoding"):
        load(path, encoding=encoding)


def test_a_wrong_encoding_is_refused(tmp_path: Path) -> None:
    marked = write(tmp_path / "marked.csv", "a,b\n1,é\n".encode("utf-8-sig"))
    with pytest.raises(DataError, match=r"'latin-1' contradicts .* byte order mark of utf-8"):
        load(marked, encoding="latin-1")
    western = write(tmp_path / "western.csv", "a,b\n1,é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot be read as csv: 'utf-8' codec .*data\.encoding"):
        load(western, encoding="utf-8")


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-8-sig"])
def test_a_byte_order_mark_is_not_part_of_a_column_name(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "rows.csv", "a,b\n1,é\n".encode("utf-8-sig"))
    assert load(path, encoding=encoding).columns == ("a", "b")
