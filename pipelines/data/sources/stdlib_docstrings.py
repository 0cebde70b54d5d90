"""Extract pairs of a function and its docstring's first sentence from the standard library.

Nothing is copied into the project: each run extracts the pairs from the running interpreter and
stores their digest.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from copy import copy
from pathlib import Path

MIN_LINES, MAX_LINES = 3, 40
MIN_SUMMARY, MAX_SUMMARY = 15, 140
LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")
INSTRUCTION = "Describe in one sentence what this Python function does.\n\n"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_pairs(max_characters: int) -> Iterator[dict[str, str]]:
    """Yield prompt, completion and group (the top-level module) in a fixed order.

    Kept: 3 to 40 lines and at most `max_characters` of source, a capitalized summary of 15 to 140
    characters that ends in a full stop, one function per summary. The source is the function's
    syntax tree printed without docstring and decorators, so it has no comments.
    """
    seen: set[str] = set()
    library = Path(sysconfig.get_path("stdlib"))
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
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        summary = _summary(ast.get_docstring(node))
        has_code = len(node.body) > 1
        if summary and has_code:
            yield _without_docstring(node), summary


def _summary(docstring: str | None) -> str | None:
    """Return the first sentence of a docstring if it has the form of one, else None."""
    paragraph, _, _ = (docstring or "").partition("\n\n")
    in_one_line = " ".join(paragraph.split())
    match = re.match(r"[A-Z].*?\.(?=\s|$)", in_one_line)
    if match is None:
        return None
    sentence = match[0]
    return sentence if MIN_SUMMARY <= len(sentence) <= MAX_SUMMARY else None


def _without_docstring(node: Function) -> str:
    """Print a function; its own nested functions keep their docstrings."""
    without = copy(node)
    without.body = node.body[1:]
    without.decorator_list = []
    return ast.unparse(without)


def _is_usable(source: str, max_characters: int) -> bool:
    lines = source.count("\n") + 1
    return MIN_LINES <= lines <= MAX_LINES and len(source) <= max_characters
