"""Questions of the user's own: one JSON object a line, with a prompt and either choices and gold, or an answer.

    {"prompt": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0}
    {"prompt": "2 + 2 =", "answer": "4"}

The file's name without its ending is the benchmark's. Prompt and answer join with what stands between them, or with one
blank where nothing does.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.evaluation.items import Choice, Item
from pipelines.paths import find, listed

LEAST = 2
"""Questions in a file; an interval over them needs two."""


def read_probes(names: Sequence[str], folders: Sequence[Path]) -> list[Item]:
    """Read the files of questions that a recipe names.

    Args:
        names: files, relative to one of the folders or absolute.
        folders: where relative names are looked for.

    Raises:
        DataError: a file is missing or too short, shares its name, or has a line that is no question; file and line are named.
    """
    paths = [find(name, folders) for name in names]
    for name, path in zip(names, paths, strict=True):
        if path is None or not path.is_file():
            raise DataError(
                f"probe file {name!r} is not in {listed(folders)}; give a path relative to the recipe, or an absolute one"
            )
    twice = [
        stem
        for stem, count in Counter(path.stem for path in paths if path is not None).items()
        if count > 1
    ]
    if twice:
        raise DataError(
            f"two probe files are named {twice[0]!r}, which is what their questions are reported under; rename one"
        )
    return [item for path in paths if path is not None for item in _items(path)]


def _items(path: Path) -> list[Item]:
    lines = [
        (number, line)
        for number, line in enumerate(_text(path).split("\n"), start=1)
        if line.strip()
    ]
    items = [
        _item(
            _row(line, f"line {number} of {path}"),
            f"line {number} of {path}",
            f"{path.stem}/{number}",
        )
        for number, line in lines
    ]
    if len(items) < LEAST:
        raise DataError(
            f"probe file {path} holds {len(items)} questions; give at least {LEAST}, for an interval over them"
        )
    if len({item.kind for item in items}) > 1:
        raise DataError(
            f"probe file {path} holds questions with choices and questions without; keep each kind in a file of its own"
        )
    return items


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"probe file {path} is no UTF-8 ({error}); save it as UTF-8") from error


def _row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict):
        raise DataError(
            f'{where} is no JSON object; write one, such as {{"prompt": …, "answer": …}}'
        )
    return row


def _item(row: Mapping[str, Any], where: str, name: str) -> Item:
    """Return the question that a row holds, or say what it lacks."""
    prompt = _filled(row, "prompt", where)
    if ("choices" in row) == ("answer" in row):
        found = "both choices and an answer" if "answer" in row else "neither choices nor an answer"
        raise DataError(f"{where} has {found}; give choices and gold, or an answer")
    benchmark = name.rpartition("/")[0]
    if "answer" in row:
        return Item(benchmark, name, *_joined(prompt, [_filled(row, "answer", where)]), 0, "answer")
    choices = _choices(row["choices"], where)
    return Item(benchmark, name, *_joined(prompt, choices), _gold(row, len(choices), where))


def _filled(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where} has no {field}; it has {', '.join(row) or 'nothing'}")
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where} has {value!r} as its {field}, where text belongs; fill it or remove the line"
        )
    return value


def _choices(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{where} has {value!r} as its choices; give a list of at least two texts")
    for choice in value:
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(
                f"{where} has {choice!r} among its choices, where text belongs; fill it or remove the line"
            )
    if len(set(value)) < len(value):
        raise DataError(
            f"{where} repeats a choice in {value!r}, so that right and wrong are one; name each once"
        )
    return value


def _gold(row: Mapping[str, Any], choices: int, where: str) -> int:
    if "gold" not in row:
        raise DataError(
            f"{where} has choices and no gold; give the place of the right one, counted from 0"
        )
    gold = row["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < choices:
        raise DataError(
            f"{where} has gold {gold!r} for {choices} choices; give the place of the right one, from 0 to {choices - 1}"
        )
    return gold


def _joined(prompt: str, answers: Sequence[str]) -> tuple[str, tuple[Choice, ...]]:
    """Return the context and the answers after it; a blank at the context's end goes to the answers, where tokenizers have it."""
    context = prompt.rstrip()
    between = prompt[len(context) :]
    return context, tuple(
        Choice("", answer if not between and answer[0].isspace() else (between or " ") + answer)
        for answer in answers
    )
