"""Custom questions: one JSON object a line, with a prompt and choices and gold, or an answer.

    {"prompt": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0}
    {"prompt": "2 + 2 =", "answer": "4"}

The file's name without its extension is the benchmark's. Prompt and answer are joined by the
whitespace between them, or by one blank if there is none.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.evaluation.items import Choice, Item
from pipelines.paths import find, listed

MIN_QUESTIONS = 2
"""Questions in a file; an interval over them needs two."""


def read_probes(names: Sequence[str], folders: Sequence[Path]) -> list[Item]:
    """Read the files of questions that a recipe names.

    Args:
        names: files, relative to one of the folders or absolute.
        folders: searched for relative names.

    Raises:
        DataError: a file is missing, too short or has the name of another, or one of its lines is
            not a question; the message names file and line.
    """
    paths = [_existing(name, folders) for name in names]
    counts = Counter(path.stem for path in paths)
    twice = [stem for stem, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"two probe files are named {twice[0]!r}, which is the name that their questions are "
            "reported under; rename one"
        )
    return [item for path in paths for item in _items(path)]


def _existing(name: str, folders: Sequence[Path]) -> Path:
    path = find(name, folders)
    if path is None or not path.is_file():
        raise DataError(
            f"probe file {name!r} is not in {listed(folders)}; "
            "give a path relative to the recipe, or an absolute one"
        )
    return path


def _items(path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        row = _row(line, where)
        items.append(_item(row, where, benchmark=path.stem, number=number))
    if len(items) < MIN_QUESTIONS:
        raise DataError(
            f"probe file {path} has {len(items)} questions; "
            f"give at least {MIN_QUESTIONS}, for an interval over them"
        )
    if len({item.kind for item in items}) > 1:
        raise DataError(
            f"probe file {path} has questions with choices and questions without; "
            "put each kind into a separate file"
        )
    return items


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"probe file {path} is not valid UTF-8 ({error}); save it as UTF-8"
        ) from error


def _row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error}); fix or remove it") from error
    if not isinstance(row, dict):
        raise DataError(
            f'{where} is not a JSON object; write one, such as {{"prompt": …, "answer": …}}'
        )
    return row


def _item(row: Mapping[str, Any], where: str, *, benchmark: str, number: int) -> Item:
    """Return the question in a row.

    Args:
        row: of the file.
        where: the row, for error messages.
        benchmark: name of the questions of this file.
        number: of its line.
    """
    prompt = _filled(row, "prompt", where)
    has_answer = "answer" in row
    has_choices = "choices" in row
    if has_choices == has_answer:
        found = "both choices and an answer" if has_answer else "neither choices nor an answer"
        raise DataError(f"{where} has {found}; give choices and gold, or an answer")
    name = f"{benchmark}/{number}"
    context = prompt.rstrip()
    if has_answer:
        answer = _filled(row, "answer", where)
        return Item(benchmark, name, context, _joined(prompt, [answer]), gold=0, kind="answer")
    choices = _joined(prompt, _choices(row["choices"], where))
    gold = _gold(row, len(choices), where)
    return Item(benchmark, name, context, choices, gold)


def _filled(row: Mapping[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(f"{where} has no {field}; it has {', '.join(row) or 'nothing'}")
    value = row[field]
    if not _is_text(value):
        raise DataError(
            f"{where} has {value!r} as its {field}, which must be text; fill it or remove the line"
        )
    return str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _choices(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{where} has {value!r} as its choices; give a list of at least two texts")
    for choice in value:
        if not _is_text(choice):
            raise DataError(
                f"{where} has {choice!r} among its choices, which must be texts; "
                "fill it or remove the line"
            )
    if len(set(value)) < len(value):
        raise DataError(
            f"{where} repeats a choice in {value!r}, so the right answer is ambiguous; "
            "name each once"
        )
    return value


def _gold(row: Mapping[str, Any], choices: int, where: str) -> int:
    if "gold" not in row:
        raise DataError(
            f"{where} has choices and no gold; give the index of the right one, counted from 0"
        )
    gold = row["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < choices:
        raise DataError(
            f"{where} has gold {gold!r} for {choices} choices; "
            f"give the index of the right one, from 0 to {choices - 1}"
        )
    return gold


def _joined(prompt: str, answers: Sequence[str]) -> tuple[Choice, ...]:
    """Return the answers with the whitespace before them, where tokenizers expect it.

    It is the whitespace at the end of the prompt, or at the start of the answer, or one blank.
    """
    between = prompt[len(prompt.rstrip()) :]
    choices = []
    for answer in answers:
        scored = (between or " ") + answer
        if not between and answer[0].isspace():
            scored = answer
        choices.append(Choice(lead="", scored=scored))
    return tuple(choices)
