"""The documents of an lm-eval task, checked before any model is loaded; they are counted from 0, as in the records.

lm-eval asks what it is given: a field that is not filled as the word None, and a right answer that is none of the choices as
a question that every model gets wrong.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.errors import DataError, RecipeError

EMPTY = "None"
"""What a template makes of a field that is not filled."""


def check_documents(name: str, task: Any, limit: int | None) -> None:
    """Check every document that will be asked.

    Args:
        name: of the task.
        task: as lm-eval loads it, with the seed of its worked examples set.
        limit: how many of its first documents are asked; None for all.

    Raises:
        DataError: a document has a field that is not filled, or a right answer that is none of its choices.
        RecipeError: the task lacks a field.
    """
    for number, doc in task.doc_iterator(limit=limit):
        where = f"document {number} of the lm-eval task {name!r}"
        rendered = {field: _rendered(task, field, doc, where) for field in _fields(task)}
        if scored_by_choice(task):
            _check_choices(rendered["doc_to_choice"], where)
            _check_gold(
                _gold_field(task), rendered[_gold_field(task)], rendered["doc_to_choice"], where
            )
    _check_requests(name, task, limit)


def scored_by_choice(task: Any) -> bool:
    """Tell whether a task asks for one of several choices and leaves it to lm-eval what that is worth."""
    return task.OUTPUT_TYPE == "multiple_choice" and not callable(
        task.get_config("process_results")
    )


def gold_place(task: Any, doc: Any) -> int | None:
    """Return the place of the right answer; None where several are right."""
    gold, choices = getattr(task, _gold_field(task))(doc), task.doc_to_choice(doc)
    if isinstance(gold, str):
        return choices.index(gold) if gold in choices else None
    return int(gold) if isinstance(gold, int) and 0 <= gold < len(choices) else None


def said(error: BaseException) -> str:
    """Return an error's kind and the first line of its text, or of that of its cause."""
    cause = error.__cause__ or error
    return ": ".join([type(cause).__name__, *str(cause).splitlines()[:1]])


def _gold_field(task: Any) -> str:
    """Return what names the right answer: where the question comes in several forms, which of them is meant."""
    return "doc_to_text" if getattr(task, "multiple_input", 0) else "doc_to_target"


def _fields(task: Any) -> list[str]:
    """Return the fields of a document that lm-eval reads; how a task rates itself decides what its target may be."""
    has_choices = (
        task.OUTPUT_TYPE == "multiple_choice" or task.get_config("doc_to_choice") is not None
    )
    has_target = not callable(task.get_config("process_results"))
    return [
        "doc_to_text",
        *(["doc_to_choice"] if has_choices else []),
        *(["doc_to_target"] if has_target else []),
    ]


def _rendered(task: Any, field: str, doc: Any, where: str) -> Any:
    render = getattr(task, field)
    try:
        value = render(doc)
    except Exception as error:  # a template or a function of the task may raise anything
        if task.get_config(field) is None:
            raise RecipeError(
                f"{where} has no {field}, which its output_type {task.OUTPUT_TYPE!r} needs; add it to the task"
            ) from error
        raise DataError(
            f"{where} does not fit {field} {task.get_config(field)!r} ({said(error)}); mend the one or the other"
        ) from error
    empty = _empty_field(render, doc, str(value))
    if empty is not None:
        raise DataError(
            f"{where} has nothing as its {empty!r}, which {field} would show as {EMPTY!r}; fill it or leave the document out"
        )
    if value is None:
        raise DataError(
            f"{where} has {value} as its {field}; fill what it is made of or leave the document out"
        )
    return value


def _empty_field(render: Callable[[Any], Any], doc: Any, shown: str) -> str | None:
    """Return the field of a document that is not filled and yet shown; the word alone tells nothing, as a text may have it."""
    if EMPTY not in shown or not isinstance(doc, Mapping):
        return None
    empty = [str(field) for field, value in doc.items() if _filled(value) != value]
    return next(
        (
            field
            for field in empty
            if _count(render, {**doc, field: _filled(doc[field])}) < shown.count(EMPTY)
        ),
        None,
    )


def _filled(value: Any) -> Any:
    """Return a value with an empty text for everything in it that is not there."""
    if isinstance(value, Mapping):
        return {name: _filled(one) for name, one in value.items()}
    return (
        [_filled(one) for one in value]
        if isinstance(value, list)
        else ""
        if value is None
        else value
    )


def _count(render: Callable[[Any], Any], doc: Mapping[str, Any]) -> int:
    try:
        return str(render(doc)).count(EMPTY)
    except Exception:  # noqa: BLE001 - what takes no text in that place took nothing in it either
        return 0


def _check_choices(choices: Any, where: str) -> None:
    if (
        not isinstance(choices, list | tuple)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise DataError(
            f"{where} has {choices!r} as its doc_to_choice; give a list of texts, none of them empty"
        )


def _check_gold(field: str, gold: Any, choices: list[str], where: str) -> None:
    """Refuse what names none of the choices; a list says that several are right."""
    for one in gold if isinstance(gold, list | tuple) else [gold]:
        is_place = isinstance(one, int) and 0 <= one < len(choices)
        if not is_place and not (one is gold and isinstance(one, str) and one in choices):
            raise DataError(
                f"{where} has {one!r} as its right answer ({field}), and its choices are {choices!r}; "
                f"give the place of one, from 0 to {len(choices) - 1}, or one of them as it is written"
            )


def _check_requests(name: str, task: Any, limit: int | None) -> None:
    """Build all prompts, worked examples and all, and refuse one that cannot be put or has nothing to score."""
    try:
        task.build_all_requests(limit=limit)
    except (
        Exception
    ) as error:  # a worked example may have any of the faults that a document may have
        raise DataError(
            f"the prompts of the lm-eval task {name!r} cannot be built ({said(error)}); mend its worked examples"
        ) from error
    for request in task.instances:
        texts = (
            request.args[:1]
            if request.request_type in ("generate_until", "loglikelihood_rolling")
            else request.args[:2]
        )
        if not all(isinstance(text, str) for text in texts) or (
            request.request_type != "generate_until" and not texts[-1]
        ):
            raise DataError(
                f"document {request.doc_id} of the lm-eval task {name!r} is asked as {texts!r}, where text belongs and what is scored "
                "is not empty; mend it or leave it out"
            )
