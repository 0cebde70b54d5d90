"""Run a case and describe how the outcome differs from what is expected; empty if it does not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from dataset_checks.bases import base
from dataset_checks.expectations import Learned, Refused, RowCase
from pipelines.config.data_section import DataSection
from pipelines.data.preparation import tokenize
from pipelines.data.rendering.example import Example
from pipelines.errors import DataError

MAX_TOKENS = 4000


@dataclass(frozen=True)
class RowOutcome:
    """What became of the rows of a case."""

    problem: str
    """How it differs from what is expected; empty if it does not."""
    examples: tuple[Example, ...] = ()


def run_row_case(case: RowCase) -> RowOutcome:
    """Tokenize the rows of a case and compare the examples with its expectation."""
    try:
        settings = DataSection.model_validate(
            {"source": "rows", "max_tokens": MAX_TOKENS, **case.settings}
        )
        examples = tuple(tokenize(case.rows, base(case.base), settings))
    except (DataError, ValidationError) as error:
        return RowOutcome(refusal_problem(case.expected, str(error)))
    except Exception as error:  # noqa: BLE001 - any other error is a wrong outcome
        return RowOutcome(f"a traceback: {type(error).__name__}: {error}")
    if isinstance(case.expected, Refused):
        found = [base(case.base).decode(example.input_ids) for example in examples]
        return RowOutcome(f"not refused, but learned as {found!r}", examples)
    return RowOutcome("; ".join(_problems(case, case.expected, examples)), examples)


def refusal_problem(expected: object, message: str) -> str:
    """Return what is wrong with a refusal; empty if it is expected and has every word."""
    if not isinstance(expected, Refused):
        return f"refused: {message}"
    missing = [word for word in expected.words if word not in message]
    return f"refused without {missing}: {message}" if missing else ""


def supervised_runs(supervised: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the first and the end index of each run of supervised tokens."""
    runs: list[tuple[int, int]] = []
    for index, is_on in enumerate(supervised):
        if is_on and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        elif is_on:
            runs.append((index, index + 1))
    return runs


def _problems(
    case: RowCase, expected: Sequence[Learned], examples: Sequence[Example]
) -> Iterator[str]:
    tokenizer = base(case.base)
    if len(expected) != len(examples):
        texts = [tokenizer.decode(example.input_ids) for example in examples]
        yield f"{len(examples)} examples instead of {len(expected)}: {texts!r}"
        return
    for wanted, example in zip(expected, examples, strict=True):
        yield from _differences(wanted, example, tokenizer)
    notes = {note for example in examples for note in example.notes}
    if notes != set(case.notes):
        yield f"notes {sorted(notes)} instead of {sorted(case.notes)}"
    groups = len({example.group for example in examples})
    if case.groups not in (None, groups):
        yield f"{groups} groups instead of {case.groups}"


def _differences(
    wanted: Learned, example: Example, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    ids = tokenizer(wanted.text, add_special_tokens=False).input_ids
    if ids != example.input_ids:
        yield f"the text {tokenizer.decode(example.input_ids)!r} instead of {wanted.text!r}"
    runs = supervised_runs(example.supervised)
    spans = [_decoded_span(example.input_ids, run, tokenizer) for run in runs]
    if [_without_spaces(span) for span in spans] != [
        _without_spaces(span) for span in wanted.spans
    ]:
        yield f"supervised {spans!r} instead of {list(wanted.spans)!r}"
    end = tokenizer(wanted.spans[-1].rstrip(), add_special_tokens=False).input_ids[-1]
    if example.end_token != end:
        yield f"the end token {example.end_token} instead of {end}"
    if example.reference != wanted.reference:
        yield f"reference {example.reference!r} instead of {wanted.reference!r}"


def _decoded_span(
    ids: Sequence[int], run: tuple[int, int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return the text of tokens after those before them, with the spaces between the two."""
    before = tokenizer.decode(list(ids[: run[0]]))
    return str(tokenizer.decode(list(ids[: run[1]])))[len(before) :]


def _without_spaces(span: str) -> str:
    """Return a text without the spaces at its start, of which some tokenizers write one more.

    Whether they are learned is checked by the tokens of TRL.
    """
    return span.lstrip(" ")
