"""Extract pairs of a function and its docstring's first sentence from the standard library.

Nothing is copied into the project: each run extracts the pairs from the running interpreter and
stores their digest.
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
Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_pairs(max_characters: int) -> Iterator[dict[str, str]]:
    """Yield prompt, completion and group (the top-level module) in a fixed order.

    Kept: 3 to 40 lines and at most `max_characters` of source, a capitalized summary of 15 to 140
    characters that ends in a full stop, one function per summary. Left out: functions that are not
    valid Python without their docstring, and functions whose docstring shares a line with code.
    """
    seen: set[str] = set()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if any(part in LEFT_OUT for part in parts):
            continue
        for source, summary in _functions(path):
            if summary in seen or not _is_usable(source, max_characters):
                continue
            seen.add(summary)
            yield {
                "prompt": INSTRUCTION + source,
                "completion": summary,
                "group": parts[0].removesuffix(".py"),
            }


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each function's source without its docstring, and the docstring's summary."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return
    # The parser counts only these line ends; splitlines also splits at a form feed.
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, Function):
            summary = _summary(ast.get_docstring(node))
            if summary and len(node.body) > 1 and _has_own_lines(node, lines):
                yield _without_docstring(node, lines), summary


def _summary(docstring: str | None) -> str | None:
    """Return the first sentence of a docstring if it has the form of one, else None."""
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    sentence = re.match(r"[A-Z].*?\.(?=\s|$)", paragraph)
    if sentence is None or not MIN_SUMMARY <= len(sentence[0]) <= MAX_SUMMARY:
        return None
    return sentence[0]


def _is_usable(source: str, max_characters: int) -> bool:
    lines = source.count("\n") + 1
    if not MIN_LINES <= lines <= MAX_LINES or len(source) > max_characters:
        return False
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _has_own_lines(node: Function, lines: list[str]) -> bool:
    """Return whether the lines of the docstring contain no code."""
    docstring, following = node.body[:2]
    first_line = lines[docstring.lineno - 1]
    before = first_line.encode()[: docstring.col_offset]  # offsets count bytes
    return not before.strip() and docstring.end_lineno != following.lineno


def _without_docstring(node: Function, lines: list[str]) -> str:
    docstring = node.body[0]
    assert docstring.end_lineno is not None and node.end_lineno is not None
    before = lines[node.lineno - 1 : docstring.lineno - 1]
    after = lines[docstring.end_lineno : node.end_lineno]
    return "\n".join(_dedented(line.rstrip(), node.col_offset) for line in before + after)


def _dedented(line: str, margin: int) -> str:
    """Move a line left by the function's margin, unless it starts inside it, as string text may."""
    return line if line[:margin].strip() else line[margin:]
