"""Pairs of a function's source and the first sentence of its docstring, harvested from the interpreter's library.

Nothing is copied into the project: the pairs are made anew from the interpreter that runs, and their digest is kept.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_LINES, MAX_LINES = 3, 40
MIN_SUMMARY, MAX_SUMMARY = 15, 140
LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")
INSTRUCTION = "Describe in one sentence what this Python function does.\n\n"


def harvest(max_characters: int) -> Iterator[dict[str, str]]:
    """Yield prompt, completion and group (the top-level module) for each usable function, in a fixed order.

    Kept: 3 to 40 lines and at most `max_characters` of source, a capitalised summary of 15 to 140 characters that ends
    in a full stop, one function per summary. Left out: what is no Python any more without its docstring, and a docstring
    that shares a line with code.
    """
    seen: set[str] = set()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if any(part in LEFT_OUT for part in parts):
            continue
        for source, summary in _functions(path):
            usable = (
                MIN_LINES <= source.count("\n") + 1 <= MAX_LINES and len(source) <= max_characters
            )
            if usable and summary not in seen and _is_python(source):
                seen.add(summary)
                yield {
                    "prompt": INSTRUCTION + source,
                    "completion": summary,
                    "group": parts[0].removesuffix(".py"),
                }


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = text.split(
        "\n"
    )  # as the parser counts them; splitlines also ends a line at a form feed
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            summary = _summary(ast.get_docstring(node))
            if summary and len(node.body) > 1 and _has_own_lines(node, lines):
                yield _without_docstring(node, lines), summary


def _summary(docstring: str | None) -> str | None:
    """Return the first sentence of a docstring when it reads as one, else None."""
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    sentence = re.match(r"[A-Z].*?\.(?=\s|$)", paragraph)
    if sentence is None or not MIN_SUMMARY <= len(sentence[0]) <= MAX_SUMMARY:
        return None
    return sentence[0]


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _has_own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> bool:
    """Return whether no code stands on the lines of the docstring."""
    docstring, following = node.body[:2]
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset]  # offsets count bytes
    return not before.strip() and docstring.end_lineno != following.lineno


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    docstring, end = node.body[0], node.end_lineno
    assert docstring.end_lineno is not None and end is not None
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : end]
    return "\n".join(_dedented(line.rstrip(), node.col_offset) for line in kept)


def _dedented(line: str, margin: int) -> str:
    """Move a line left by the function's margin; a line that starts inside it, as text may, stays."""
    return line if line[:margin].strip() else line[margin:]
