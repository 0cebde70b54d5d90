"""The KL divergence equals torch's over the scored chats; unpaired files are rejected."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipelines.comparison.divergence import KLDivergence, divergences
from pipelines.comparison.record_types import ItemRecord
from pipelines.comparison.resampling import Interval, mean_interval

Records = list[ItemRecord]
Maker = Callable[..., Records]
Leave = Callable[[Records, int | str], Records]
Write = Callable[[str, torch.Tensor], Path]
BASE_AND_ADAPTER = ("base", "rank-2")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(label: str, log_probabilities: torch.Tensor) -> Path:
        path = tmp_path / f"{label}.safetensors"
        save_file({"log_probabilities": log_probabilities.numpy()}, path)
        return path

    return save


@pytest.fixture
def divergence(loss_records: Maker, write: Write) -> Callable[..., KLDivergence]:
    """Return a function from two models' distributions to their divergence over `chats` chats."""

    def measure(before: torch.Tensor, after: torch.Tensor, *, chats: int = 3) -> KLDivergence:
        files = {"base": write("base", before), "rank-2": write("rank-2", after)}
        records = loss_records("chat", [1.0] * chats)
        return divergences(records, files, [BASE_AND_ADAPTER])[BASE_AND_ADAPTER]

    return measure


def distributions(seed: int, positions: int = 6, vocabulary: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(positions, vocabulary, generator=generator)
    return logits.log_softmax(-1).half()


def reference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return torch's result for the same float16 values, in double precision."""
    total = torch.nn.functional.kl_div(
        after.double(), before.double(), reduction="sum", log_target=True
    )
    return float(total) / len(before)


def test_the_divergence_equals_torchs(loss_records: Maker, write: Write) -> None:
    """Single precision on sums of a few nats leaves about 1e-5."""
    labels = ("base", "base-nf4", "rank-2")
    tensors = {label: distributions(seed) for seed, label in enumerate(labels)}
    files = {label: write(label, tensor) for label, tensor in tensors.items()}
    pairs = [("base", "base-nf4"), ("base-nf4", "rank-2"), ("base", "rank-2"), ("rank-2", "base")]
    results = divergences(loss_records("chat", [1.0] * 3), files, pairs)
    assert list(results) == pairs
    for before, after in pairs:
        expected = reference(tensors[before], tensors[after])
        assert results[before, after].mean == pytest.approx(expected, abs=2e-5)
    forward = results["base", "rank-2"].mean
    assert forward != pytest.approx(results["rank-2", "base"].mean, abs=1e-2)


def test_the_divergence_of_a_model_from_itself_is_zero(
    divergence: Callable[..., KLDivergence],
) -> None:
    same = distributions(1)
    assert divergence(same, same) == KLDivergence(0.0, Interval(0.0, 0.0, 0.0))


def test_a_chat_that_was_left_out_is_not_counted(
    loss_records: Maker, write: Write, without: Leave
) -> None:
    before = distributions(1)
    after = distributions(2)
    files = {"base": write("base", before), "rank-2": write("rank-2", after)}
    chats = without(loss_records("chat", [1.0] * 3), "chat/1")
    kept = [0, 1, 4, 5]
    result = divergences(chats, files, [BASE_AND_ADAPTER])[BASE_AND_ADAPTER]
    assert result.mean == pytest.approx(reference(before[kept], after[kept]), abs=2e-5)


def test_a_token_with_probability_zero_in_both_models_adds_nothing(
    divergence: Callable[..., KLDivergence],
) -> None:
    """Vocabularies are padded to a round size, and some models mask the logits of the padding."""
    before = distributions(1)
    after = distributions(2)
    padding = torch.full((6, 3), -torch.inf, dtype=torch.half)
    result = divergence(torch.cat([before, padding], 1), torch.cat([after, padding], 1))
    assert result.mean == pytest.approx(reference(before, after), abs=2e-5)


def test_without_chats_there_is_no_divergence(task_records: Maker) -> None:
    assert divergences(task_records([1.0]), {}, [BASE_AND_ADAPTER]) == {}


def test_distributions_of_another_vocabulary_are_rejected(
    divergence: Callable[..., KLDivergence],
) -> None:
    with pytest.raises(ValueError, match=r"different shapes .*500.*501.*same tokenizer"):
        divergence(distributions(1), distributions(1, vocabulary=501))


def test_tokens_with_probability_zero_in_one_model_keep_the_divergence_finite(
    divergence: Callable[..., KLDivergence],
) -> None:
    before = torch.tensor([[0.0, -torch.inf]] * 6).half()
    after = torch.tensor([[-torch.inf, 0.0]] * 6).half()
    assert np.isfinite(divergence(before, after).mean)


def test_the_interval_resamples_chats_and_never_reaches_below_zero(
    divergence: Callable[..., KLDivergence],
) -> None:
    """One chat of twelve changed: the mean is a twelfth of its divergence, the low end is 0."""
    before = distributions(1, positions=24)
    after = torch.cat([distributions(2, positions=2), before[2:]])
    result = divergence(before, after, chats=12)
    by_chat = []
    for start in range(0, 24, 2):
        by_chat.append(reference(before[start : start + 2], after[start : start + 2]))
    assert result.mean == pytest.approx(np.mean(by_chat), abs=2e-5)
    assert result.interval is not None
    assert result.interval.mean == result.mean
    assert result.interval.low == 0.0
    unbounded = mean_interval(np.array(by_chat))
    assert unbounded.low < 0
    assert result.interval.high == pytest.approx(unbounded.high, abs=2e-5)


def test_a_single_chat_has_no_interval(divergence: Callable[..., KLDivergence]) -> None:
    result = divergence(distributions(0, positions=2), distributions(1, positions=2), chats=1)
    assert result.interval is None
