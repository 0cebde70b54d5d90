"""How far one model's next tokens have moved from another's: the KL divergence over general questions put as chats.

    log_probabilities    (N, V) float16    row = one position, in the file beside each model's items

KL(before ‖ after) = mean over positions of Σ p_before (log p_before − log p_after), in nats per token. It sees any change
of the model, wanted or not, and knows no right answer: a sign to look, and never judged. On the new task it goes with
forgetting (Shenfeld et al. 2025, arXiv 2509.04259); here it is taken where nothing was meant to change. Its interval draws
whole chats, since the positions of one chat stray together.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pipelines.comparison.records import Records, scored
from pipelines.comparison.resampling import Array, Interval, ratio_interval

TENSOR = "log_probabilities"
NO_CHANCE = np.float32(np.finfo(np.float16).min)
"""Stands for −∞, whose products are no numbers."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class Divergence:
    """How far one model moved from another."""

    mean: float
    """Nats per token."""
    interval: Interval | None
    """The same with its interval, which never reaches below 0; None for a single chat."""


def divergences(
    chats: Records, files: Mapping[str, Path], pairs: Sequence[Pair]
) -> dict[Pair, Divergence]:
    """Return the KL divergence of some models from others, nats per token; none where no chat was scored.

    Args:
        chats: item records of any model, whose chats name their rows.
        files: label → distributions of that model.
        pairs: labels of before and after; each position is read once for all pairs.

    Raises:
        ValueError: two files hold other positions or another vocabulary.
    """
    rows = [record["rows"] for record in scored(chats, "chat")]
    totals: dict[Pair, list[float]] = {pair: [] for pair in (pairs if rows else [])}
    with ExitStack() as stack:
        opened = {
            label: stack.enter_context(safe_open(files[label], framework="np"))
            for pair in totals
            for label in pair
        }
        tables = {label: file.get_slice(TENSOR) for label, file in opened.items()}
        _check_shapes({label: tuple(table.get_shape()) for label, table in tables.items()})
        for first, end in rows:
            logarithms = {label: _logarithms(table[first:end]) for label, table in tables.items()}
            chances = {before: np.exp(logarithms[before]) for before, _ in totals}
            for before, after in totals:
                totals[before, after].append(
                    float(np.vdot(chances[before], logarithms[before] - logarithms[after]))
                )
    positions = np.array([end - first for first, end in rows], dtype=np.float64)
    return {pair: _divergence(np.array(sums), positions) for pair, sums in totals.items()}


def _divergence(sums: Array, positions: Array) -> Divergence:
    found = ratio_interval(sums, positions)
    floor = min(found.mean, 0.0)  # of halves, what did not move may be found a hair below 0
    return Divergence(
        found.mean,
        Interval(found.mean, max(found.low, floor), found.high) if len(sums) > 1 else None,
    )


def _logarithms(halves: NDArray[Any]) -> NDArray[np.float32]:
    return np.maximum(halves.astype(np.float32), NO_CHANCE)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the distributions have unlike shapes ({shapes}); score all models with the same tokenizer and settings"
        )
