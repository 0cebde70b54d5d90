"""Check the documents of an lm-eval task before any model is loaded.

lm-eval evaluates whatever it is given: an empty field as the word None, and a right answer that is
not among the choices as a question that every model gets wrong. Documents are counted from 0, as in
the records.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.errors import DataError, RecipeError, one_line

CHOICES = "doc_to_choice"
"""The field of a task with the choices of a question."""
EMPTY = "None"
"""What a template makes of an empty field."""


def check_documents(name: str, task: Any, limit: int | None) -> None:
    """Check every document that will be evaluated.

    Args:
        name: of the task.
        task: as lm-eval loads it, with the seed of its few-shot examples set.
        limit: number of its first documents that are evaluated; None for all.

    Raises:
        DataError: a document has an empty field, or a right answer that is not one of its choices.
        RecipeError: the task lacks a field.
    """
    for number, doc in task.doc_iterator(limit=limit):
        where = f"document {number} of the lm-eval task {name!r}"
        rendered = {field: _rendered(task, field, doc, where) for field in _fields(task)}
        if scored_by_choice(task):
            choices = rendered[CHOICES]
            _check_choices(choices, where)
            field = _gold_field(task)
            _check_gold(field, rendered[field], choices, where)
    _check_requests(name, task, limit)


def scored_by_choice(task: Any) -> bool:
    """Return whether a task has several choices and leaves their scoring to lm-eval."""
    if callable(task.get_config("process_results")):
        return False
    return bool(task.OUTPUT_TYPE == "multiple_choice")


def gold_index(task: Any, doc: Any) -> int | None:
    """Return the index of the right answer; None if several are right.

    Args:
        task: with several choices.
        doc: one of its documents.
    """
    read_gold = getattr(task, _gold_field(task))
    gold = read_gold(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(gold, str):
        return choices.index(gold) if gold in choices else None
    if isinstance(gold, int) and 0 <= gold < len(choices):
        return int(gold)
    return None


def document_text(task: Any, doc: Any) -> str:
    """Return the question and the right answer of a document, as the task writes them.

    Args:
        task: of any kind; one that computes its own score may have no answer.
        doc: one of its documents.
    """
    if scored_by_choice(task):
        gold = gold_index(task, doc)
        answer = "" if gold is None else task.doc_to_choice(doc)[gold]
        return f"{task.doc_to_text(doc)} {answer}"
    parts = []
    for field in ("doc_to_text", "doc_to_target"):
        if task.get_config(field) is not None:
            parts.append(str(getattr(task, field)(doc)))
    return " ".join(parts)


def _gold_field(task: Any) -> str:
    """Return the field of the right answer.

    If the question comes in several forms, it is the field that names the right form.
    """
    return "doc_to_text" if getattr(task, "multiple_input", 0) else "doc_to_target"


def _fields(task: Any) -> list[str]:
    """Return the fields of a document that lm-eval reads.

    A task that computes its own score may have any target.
    """
    fields = ["doc_to_text"]
    has_choices = task.get_config(CHOICES) is not None
    if has_choices or task.OUTPUT_TYPE == "multiple_choice":
        fields.append(CHOICES)
    if not callable(task.get_config("process_results")):
        fields.append("doc_to_target")
    return fields


def _rendered(task: Any, field: str, doc: Any, where: str) -> Any:
    render = getattr(task, field)
    try:
        value = render(doc)
    except Exception as error:  # a template or a function of the task may raise anything
        template = task.get_config(field)
        if template is None:
            raise RecipeError(
                f"{where} has no {field}, which its output_type {task.OUTPUT_TYPE!r} needs; "
                "add it to the task"
            ) from error
        reason = one_line(error.__cause__ or error)
        raise DataError(
            f"{where} does not fit {field} {template!r} ({reason}); fix one of the two"
        ) from error
    empty = _empty_field(render, doc, str(value))
    if empty is not None:
        raise DataError(
            f"{where} has nothing as its {empty!r}, which {field} would show as {EMPTY!r}; "
            "fill it or leave the document out"
        )
    if value is None:
        raise DataError(
            f"{where} has {value} as its {field}; fill what it is made of or leave the document out"
        )
    return value


def _empty_field(render: Callable[[Any], Any], doc: Any, shown: str) -> str | None:
    """Return an empty field of a document that the rendered text shows.

    The word None alone proves nothing, as a text may contain it.
    """
    if EMPTY not in shown or not isinstance(doc, Mapping):
        return None
    for field, value in doc.items():
        filled = _filled(value)
        if filled == value:
            continue
        without_it = _count(render, {**doc, field: filled})
        if without_it < shown.count(EMPTY):
            return str(field)
    return None


def _filled(value: Any) -> Any:
    """Return a value with an empty text in place of each None in it."""
    if isinstance(value, Mapping):
        return {name: _filled(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_filled(one) for one in value]
    return "" if value is None else value


def _count(render: Callable[[Any], Any], doc: Mapping[str, Any]) -> int:
    try:
        return str(render(doc)).count(EMPTY)
    except Exception:  # noqa: BLE001 - a template that fails on an empty text shows no None either
        return 0


def _check_choices(choices: Any, where: str) -> None:
    is_list = isinstance(choices, list | tuple) and len(choices) > 0
    if not is_list or not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(
            f"{where} has {choices!r} as its doc_to_choice; "
            "give a list of texts, none of them empty"
        )


def _check_gold(field: str, gold: Any, choices: list[str], where: str) -> None:
    """Refuse a right answer that is not one of the choices; a list names several right ones."""
    is_list = isinstance(gold, list | tuple)
    answers = gold if is_list else [gold]
    for one in answers:
        is_index = isinstance(one, int) and 0 <= one < len(choices)
        is_choice = not is_list and isinstance(one, str) and one in choices
        if not is_index and not is_choice:
            raise DataError(
                f"{where} has {one!r} as its right answer ({field}), and its choices are "
                f"{choices!r}; give the index of one, from 0 to {len(choices) - 1}, or its exact "
                "text"
            )


def _check_requests(name: str, task: Any, limit: int | None) -> None:
    """Build all prompts with their few-shot examples, and refuse one that cannot be scored."""
    try:
        task.build_all_requests(limit=limit)
    except Exception as error:  # a few-shot example may have any fault that a document may have
        raise DataError(
            f"the prompts of the lm-eval task {name!r} cannot be built "
            f"({one_line(error.__cause__ or error)}); fix its few-shot examples"
        ) from error
    for request in task.instances:
        is_generated = request.request_type == "generate_until"
        has_one_text = is_generated or request.request_type == "loglikelihood_rolling"
        texts = request.args[: 1 if has_one_text else 2]
        is_text = all(isinstance(text, str) for text in texts)
        if not is_text or not (is_generated or texts[-1]):
            raise DataError(
                f"document {request.doc_id} of the lm-eval task {name!r} gives {texts!r}, which "
                "must be texts, and the scored one not empty; fix it or leave it out"
            )
