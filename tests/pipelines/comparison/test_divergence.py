"""The KL divergence is torch's, over the positions of the chats that were scored, and refuses what does not pair."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipelines.comparison.divergence import Divergence, divergences
from pipelines.comparison.resampling import Interval, mean_interval

Values = dict[str, Any]
Records = list[Values]
Maker = Callable[..., Records]
Write = Callable[[str, torch.Tensor], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(label: str, log_probabilities: torch.Tensor) -> Path:
        path = tmp_path / f"{label}.safetensors"
        save_file({"log_probabilities": log_probabilities.numpy()}, path)
        return path

    return save


def distributions(seed: int, positions: int = 6, vocabulary: int = 500) -> torch.Tensor:
    logits = 3 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))
    return logits.log_softmax(-1).half()


def reference(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return what torch makes of the same halves, in double precision."""
    before, after = before.double(), after.double()
    return float(torch.nn.functional.kl_div(after, before, reduction="sum", log_target=True)) / len(
        before
    )


def test_the_divergence_is_torch_s(loss_records: Maker, write: Write) -> None:
    """Single precision on sums of a few nats leaves about 1e-5."""
    tensors = {
        label: distributions(seed) for seed, label in enumerate(("base", "base-nf4", "rank-2"))
    }
    files = {label: write(label, tensor) for label, tensor in tensors.items()}
    pairs = [("base", "base-nf4"), ("base-nf4", "rank-2"), ("base", "rank-2"), ("rank-2", "base")]
    found = divergences(loss_records("chat", [1.0] * 3), files, pairs)
    assert list(found) == pairs
    for before, after in pairs:
        assert found[before, after].mean == pytest.approx(
            reference(tensors[before], tensors[after]), abs=2e-5
        )
    assert found["base", "rank-2"].mean != pytest.approx(found["rank-2", "base"].mean, abs=1e-2)


def test_a_model_has_not_moved_from_itself(loss_records: Maker, write: Write) -> None:
    files = {label: write(label, distributions(1)) for label in ("base", "rank-2")}
    assert divergences(loss_records("chat", [1.0] * 3), files, [("base", "rank-2")]) == {
        ("base", "rank-2"): Divergence(0.0, Interval(0.0, 0.0, 0.0))
    }


def test_a_chat_that_was_left_out_is_not_counted(loss_records: Maker, write: Write) -> None:
    before, after = distributions(1), distributions(2)
    files = {"base": write("base", before), "rank-2": write("rank-2", after)}
    chats = loss_records("chat", [1.0] * 3)
    chats[1] = {**chats[1], "left_out": "too long for another of the models"}
    kept = [0, 1, 4, 5]
    found = divergences(chats, files, [("base", "rank-2")])
    assert found["base", "rank-2"].mean == pytest.approx(
        reference(before[kept], after[kept]), abs=2e-5
    )


def test_a_token_that_has_no_chance_in_either_model_adds_nothing(
    loss_records: Maker, write: Write
) -> None:
    """Vocabularies are padded to a round size, and some models mask what the padding would say."""
    before, after = distributions(1), distributions(2)
    masked = [
        torch.cat([one, torch.full((6, 3), -torch.inf, dtype=torch.half)], 1)
        for one in (before, after)
    ]
    files = {"base": write("base", masked[0]), "rank-2": write("rank-2", masked[1])}
    found = divergences(loss_records("chat", [1.0] * 3), files, [("base", "rank-2")])
    assert found["base", "rank-2"].mean == pytest.approx(reference(before, after), abs=2e-5)


def test_without_chats_there_is_no_divergence(task_records: Maker) -> None:
    assert divergences(task_records([1.0]), {}, [("base", "rank-2")]) == {}


def test_distributions_of_another_vocabulary_are_refused(loss_records: Maker, write: Write) -> None:
    files = {
        "base": write("base", distributions(1)),
        "rank-2": write("rank-2", distributions(1, vocabulary=501)),
    }
    with pytest.raises(ValueError, match=r"unlike shapes .*500.*501.*same tokenizer"):
        divergences(loss_records("chat", [1.0] * 3), files, [("base", "rank-2")])


def test_rare_tokens_keep_the_divergence_a_finite_number(loss_records: Maker, write: Write) -> None:
    before, after = (
        torch.tensor([[0.0, -torch.inf]] * 6).half(),
        torch.tensor([[-torch.inf, 0.0]] * 6).half(),
    )
    files = {"base": write("base", before), "rank-2": write("rank-2", after)}
    assert np.isfinite(
        divergences(loss_records("chat", [1.0] * 3), files, [("base", "rank-2")])[
            "base", "rank-2"
        ].mean
    )


def test_an_interval_is_of_chats_and_never_reaches_below_nothing(
    loss_records: Maker, write: Write
) -> None:
    """One chat of twelve moved and the others did not: the mean is a twelfth of it, and its interval ends at 0."""
    before = distributions(1, positions=24)
    after = torch.cat([distributions(2, positions=2), before[2:]])
    files = {"base": write("base", before), "rank-2": write("rank-2", after)}
    found = divergences(loss_records("chat", [1.0] * 12), files, [("base", "rank-2")])[
        "base", "rank-2"
    ]
    by_chat = [
        reference(before[place : place + 2], after[place : place + 2]) for place in range(0, 24, 2)
    ]
    assert found.mean == pytest.approx(np.mean(by_chat), abs=2e-5)
    assert found.interval is not None
    assert (found.interval.mean, found.interval.low) == (found.mean, 0.0)
    drawn = mean_interval(np.array(by_chat))
    assert (drawn.low < 0, found.interval.high) == (True, pytest.approx(drawn.high, abs=2e-5))


def test_one_chat_says_nothing_of_chance(loss_records: Maker, write: Write) -> None:
    files = {
        label: write(label, distributions(seed, positions=2))
        for seed, label in enumerate(("base", "rank-2"))
    }
    assert (
        divergences(loss_records("chat", [1.0]), files, [("base", "rank-2")])[
            "base", "rank-2"
        ].interval
        is None
    )
