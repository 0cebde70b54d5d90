"""The pairs are functions without their docstring and the docstring's first sentence.

The rules are tested on a small library in a temporary folder. The standard library of this
interpreter then shows that they keep enough to learn from.
"""

import ast
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.data.sources.stdlib_docstrings import (
    INSTRUCTION,
    MAX_SUMMARY,
    MIN_SUMMARY,
    stdlib_pairs,
)

Pair = dict[str, str]
Library = Callable[..., list[Pair]]
AREA = '''
def area(width, height):
    """Return the area of a rectangle.

    The unit is squared.
    """
    product = width * height
    return product
'''
PAGE = '''
class Page:
    def show(self):
        """Return the page as text."""
        page = """
<p></p>
"""
        return page
'''
AWKWARD = {
    "a method": f"class Shape:\n{textwrap.indent(AREA, '    ')}",
    "an async function": AREA.replace("def", "@decorate\nasync def", 1),
    "text at the margin": PAGE,
    "a form feed": "# a page ends here\n\x0c\n" + AREA,
    "a line separator": "# a line ends here\u2028and here\n" + AREA,
}
"""Functions that are easily split in the wrong place."""


@pytest.fixture
def pairs_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Return a function that writes files as the standard library and returns its pairs."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))

    def run(files: dict[str, str], max_characters: int = 500) -> list[Pair]:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        return list(stdlib_pairs(max_characters))

    return run


@pytest.fixture(scope="module")
def standard_library() -> list[Pair]:
    return list(stdlib_pairs(500))


def source_of(pair: Pair) -> str:
    return pair["prompt"].removeprefix(INSTRUCTION)


def function(summary: str, lines: int = 3) -> str:
    """Return a function that has `lines` lines without its docstring."""
    return (
        "def f(x):\n" + f'    """{summary}"""\n' + "    x += 1\n" * (lines - 2) + "    return x\n"
    )


def test_a_function_becomes_its_code_and_its_first_sentence(pairs_of: Library) -> None:
    [pair] = pairs_of({"shapes.py": AREA})
    assert (
        pair["prompt"]
        == INSTRUCTION
        + "def area(width, height):\n    product = width * height\n    return product"
    )
    assert pair["completion"] == "Return the area of a rectangle."
    assert pair["group"] == "shapes"


@pytest.mark.parametrize(
    "summary",
    [
        "return in lower case.",
        "Without a full stop",
        "Too short.",
        "Too long: " + "x" * 140 + ".",
        "",
    ],
    ids=["lower case", "no full stop", "short", "long", "none"],
)
def test_a_malformed_summary_is_left_out(pairs_of: Library, summary: str) -> None:
    assert pairs_of({"m.py": function(summary)}) == []


@pytest.mark.parametrize("length", [MIN_SUMMARY, MAX_SUMMARY])
def test_a_summary_of_minimum_or_maximum_length_is_kept(pairs_of: Library, length: int) -> None:
    summary = "R" * (length - 1) + "."
    assert [pair["completion"] for pair in pairs_of({"m.py": function(summary)})] == [summary]


def test_a_summary_over_two_lines_is_joined(pairs_of: Library) -> None:
    [pair] = pairs_of({"m.py": function("Return the number\n    of items kept. More follows.")})
    assert pair["completion"] == "Return the number of items kept."


@pytest.mark.parametrize(("lines", "kept"), [(2, 0), (3, 1), (40, 1), (41, 0)])
def test_a_function_has_three_to_forty_lines(pairs_of: Library, lines: int, kept: int) -> None:
    assert len(pairs_of({"m.py": function("Return the number given.", lines)})) == kept


def test_a_function_has_at_most_the_maximum_number_of_characters(pairs_of: Library) -> None:
    files = {"m.py": function("Return the number given.")}
    length = len(source_of(pairs_of(files)[0]))
    assert len(pairs_of(files, length)) == 1
    assert pairs_of(files, length - 1) == []


def test_a_function_with_only_a_docstring_is_left_out(pairs_of: Library) -> None:
    assert pairs_of({"m.py": 'def f():\n    """Return nothing\n    at all, ever.\n    """\n'}) == []


def test_the_first_of_functions_with_the_same_summary_is_kept(pairs_of: Library) -> None:
    pairs = pairs_of(
        {
            "a.py": function("Return the number given.", 3),
            "b.py": function("Return the number given.", 4),
        }
    )
    assert [pair["group"] for pair in pairs] == ["a"]


@pytest.mark.parametrize(
    "folder", ["test", "tests", "site-packages", "json/tests", "idlelib", "lib2to3", "__pycache__"]
)
def test_code_outside_the_library_is_left_out(pairs_of: Library, folder: str) -> None:
    assert pairs_of({f"{folder}/m.py": AREA}) == []


def test_a_package_is_one_group(pairs_of: Library) -> None:
    pairs = pairs_of(
        {"json/decode.py": AREA, "json/tool/main.py": function("Return the number given.")}
    )
    assert [pair["group"] for pair in pairs] == ["json", "json"]


def test_an_unreadable_file_is_skipped(pairs_of: Library, tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" + AREA.encode())
    assert [pair["group"] for pair in pairs_of({"bad.py": "def f(:\n", "good.py": AREA})] == [
        "good"
    ]


def test_pairs_are_in_order_of_the_paths(pairs_of: Library) -> None:
    files = {
        f"{name}.py": function(f"Return the number {name}.") for name in ("bb", "a", "ab", "b")
    }
    assert [pair["group"] for pair in pairs_of(files)] == ["a", "ab", "b", "bb"]
    assert pairs_of(files) == pairs_of({})


@pytest.mark.parametrize("name", AWKWARD)
def test_each_prompt_is_a_function_without_its_docstring(pairs_of: Library, name: str) -> None:
    [pair] = pairs_of({"m.py": AWKWARD[name]})
    [node] = ast.parse(source_of(pair)).body
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    assert ast.get_docstring(node) is None
    assert pair["completion"] not in source_of(pair)


def test_removing_the_docstring_keeps_every_statement(pairs_of: Library) -> None:
    pairs = pairs_of(
        {
            "m.py": 'def f(x):\n    """Return the number given."""; x += 1\n'
            "    x += 2\n    return x\n"
        }
    )
    assert all("x += 1" in source_of(pair) for pair in pairs)


def test_this_interpreter_has_enough_to_learn_from(standard_library: list[Pair]) -> None:
    assert len(standard_library) > 1000
    assert len({pair["completion"] for pair in standard_library}) == len(standard_library)
    assert len({pair["group"] for pair in standard_library}) > 50


def test_every_summary_of_this_interpreter_is_a_short_sentence(
    standard_library: list[Pair],
) -> None:
    for pair in standard_library:
        assert MIN_SUMMARY <= len(pair["completion"]) <= MAX_SUMMARY
        assert pair["completion"][0].isupper()
        assert pair["completion"].endswith(".")


def test_every_function_of_this_interpreter_is_complete_and_without_its_docstring(
    standard_library: list[Pair],
) -> None:
    broken = []
    for pair in standard_library:
        try:
            [node] = ast.parse(source_of(pair)).body
        except SyntaxError:
            broken.append(source_of(pair)[:80])
            continue
        assert pair["completion"] not in (ast.get_docstring(node) or "")
        assert len(source_of(pair)) <= 500
    assert broken == []
