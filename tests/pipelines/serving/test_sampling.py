"""Sampled tokens follow temperature, top_p and seed; text is passed on once it is final."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pipelines.models.tokenizer import load_tokenizer
from pipelines.workflow.serving.answer_row import AnswerEnd, AnswerEvent, AnswerRow, TextPiece
from pipelines.workflow.serving.sampling import ChosenTokens, Sampler, SamplingOptions

PROBABILITIES = [0.5, 0.3, 0.15, 0.05]
SCORES = torch.tensor(PROBABILITIES).log() + 3.0
DRAWS = 4000


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_folder)


def fractions(**changes: float) -> list[float]:
    """Return how often each token is drawn."""
    sampler = Sampler(SamplingOptions(max_tokens=1, seed=1, **changes))  # type: ignore[arg-type]
    counts = Counter(sampler.choose(SCORES) for _ in range(DRAWS))
    return [counts[token] / DRAWS for token in range(len(PROBABILITIES))]


def test_temperature_1_draws_from_the_distribution() -> None:
    assert fractions() == pytest.approx(PROBABILITIES, abs=0.03)


def test_temperature_divides_the_scores() -> None:
    weights = [probability**2 for probability in PROBABILITIES]
    expected = [weight / sum(weights) for weight in weights]
    assert fractions(temperature=0.5) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.5, [1, 0, 0, 0]), (0.51, [5 / 8, 3 / 8, 0, 0]), (1e-9, [1, 0, 0, 0])]
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, expected: list[float]) -> None:
    assert fractions(top_p=top_p) == pytest.approx(expected, abs=0.03)


def test_temperature_near_0_is_greedy_and_does_not_overflow() -> None:
    for temperature in (0, 1e-300):
        assert fractions(temperature=temperature) == [1, 0, 0, 0]


def test_each_row_has_its_own_seed() -> None:
    scores = torch.zeros(3, 50)
    options = [SamplingOptions(max_tokens=1, seed=seed) for seed in (1, 2, 1)]
    chosen = ChosenTokens([Sampler(one) for one in options])
    rows = [chosen(torch.zeros(3, 1, dtype=torch.long), scores).argmax(1) for _ in range(8)]  # type: ignore[arg-type]
    first, second, third = torch.stack(rows).T.tolist()
    assert first == third != second


def run_row(
    tokenizer: PreTrainedTokenizerBase, text: str, **changes: object
) -> tuple[list[str], AnswerEnd]:
    """Generate the tokens of a text; return the pieces, and how the answer ended."""
    events: list[AnswerEvent] = []
    options = SamplingOptions(**{"max_tokens": 999, **changes})  # type: ignore[arg-type]
    end = int(tokenizer.eos_token_id)
    row = AnswerRow([1], options, tokenizer, [end], events.append)
    for token in [*tokenizer(text).input_ids, end]:
        row.add(token)
    *pieces, last = events
    assert isinstance(last, AnswerEnd)
    return [piece.text for piece in pieces if isinstance(piece, TextPiece)], last


def test_a_character_of_several_tokens_is_one_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "a 🦊 b"
    assert len(tokenizer(text).input_ids) > len(text)
    pieces, end = run_row(tokenizer, text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert (end.reason, end.completion_tokens) == ("stop", len(tokenizer(text).input_ids) + 1)


def test_the_beginning_of_a_stop_sequence_is_held_back(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, end = run_row(tokenizer, "one zz two zzz three", stop=("zzz", "never"))
    assert "".join(pieces) == "one zz two "
    assert end.reason == "stop"
    assert end.completion_tokens < len(tokenizer("one zz two zzz three").input_ids)
    pieces, _ = run_row(tokenizer, "one zz", stop=("zzz",))
    assert "".join(pieces) == "one zz"


def test_an_answer_ends_at_its_maximum_length(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces, end = run_row(tokenizer, "one two three", max_tokens=2)
    assert (end.reason, end.completion_tokens) == ("length", 2)
    assert "".join(pieces) == tokenizer.decode(tokenizer("one two three").input_ids[:2])
