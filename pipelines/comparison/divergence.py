"""KL divergence between two models' next-token distributions, on general questions as chats.

    log_probabilities    (N, V) float16    row = one position; the file is next to the model's items

KL(before ‖ after) = mean over positions of Σ p_before (log p_before − log p_after), in nats per
token. It detects any change of the model, wanted or not, and uses no right answer. It is a hint to
look closer and is never judged. On the new task it correlates with forgetting (Shenfeld et al.
2025, arXiv 2509.04259); here it is measured on questions that training should not affect. Its
interval resamples complete chats, since the positions of one chat are correlated.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pipelines.comparison.record_types import ChatRecord
from pipelines.comparison.records import Records, of_type
from pipelines.comparison.resampling import Array, Interval, ratio_interval

TENSOR = "log_probabilities"
LOG_ZERO = np.float32(np.finfo(np.float16).min)
"""Replaces −∞, whose product with 0 is NaN."""
Pair = tuple[str, str]
"""Labels of the models before and after."""


@dataclass(frozen=True)
class KLDivergence:
    """Divergence of one model from another."""

    mean: float
    """Nats per token."""
    interval: Interval | None
    """The mean with its interval, which never reaches below 0; None for a single chat."""


def divergences(
    chats: Records, files: Mapping[str, Path], pairs: Sequence[Pair]
) -> dict[Pair, KLDivergence]:
    """Return the KL divergence of each pair, in nats per token; empty if no chat was scored.

    Args:
        chats: item records of any model; its chats name their rows.
        files: label → distributions of that model.
        pairs: labels of before and after; each position is read once for all pairs.

    Raises:
        ValueError: two files have different positions or vocabularies.
    """
    rows = [record.rows for record in of_type(chats, ChatRecord)]
    if not rows:
        return {}
    lengths = np.diff(np.array(rows)).ravel().astype(np.float64)
    sums = _sums_by_chat(rows, files, pairs)
    return {pair: _divergence(np.array(values), lengths) for pair, values in sums.items()}


def _sums_by_chat(
    rows: Sequence[tuple[int, int]], files: Mapping[str, Path], pairs: Sequence[Pair]
) -> dict[Pair, list[float]]:
    """Return, for each pair, the divergence summed over the positions of each chat.

    Args:
        rows: first row and end of each chat.
        files: label → distributions of that model.
        pairs: labels of before and after.
    """
    sums: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    with ExitStack() as stack:
        tables = _open_tables(stack, files, pairs)
        for first, end in rows:
            logs = {}
            for label, table in tables.items():
                logs[label] = _logarithms(table[first:end])
            for pair, value in _sums_over_positions(logs, pairs).items():
                sums[pair].append(value)
    return sums


def _open_tables(
    stack: ExitStack, files: Mapping[str, Path], pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Open the distributions of every model in the pairs; their shapes must be equal."""
    tables = {}
    shapes = {}
    for label in dict.fromkeys(itertools.chain(*pairs)):
        file = stack.enter_context(safe_open(files[label], framework="np"))
        tables[label] = file.get_slice(TENSOR)
        shapes[label] = tuple(tables[label].get_shape())
    _check_shapes(shapes)
    return tables


def _sums_over_positions(
    logs: Mapping[str, NDArray[np.float32]], pairs: Sequence[Pair]
) -> dict[Pair, float]:
    """Return Σ p_before (log p_before − log p_after) of each pair."""
    probabilities: dict[str, NDArray[np.float32]] = {}
    sums = {}
    for before, after in pairs:
        if before not in probabilities:
            probabilities[before] = np.exp(logs[before])
        difference = logs[before] - logs[after]
        sums[before, after] = float(np.vdot(probabilities[before], difference))
    return sums


def _divergence(sums: Array, lengths: Array) -> KLDivergence:
    """Return the divergence per position, from each chat's sum and number of positions."""
    result = ratio_interval(sums, lengths)
    if len(sums) == 1:
        return KLDivergence(result.mean, None)
    floor = min(result.mean, 0.0)  # in float16, an unchanged model may be slightly below 0
    interval = Interval(result.mean, max(result.low, floor), result.high)
    return KLDivergence(result.mean, interval)


def _logarithms(halves: NDArray[Any]) -> NDArray[np.float32]:
    return np.maximum(halves.astype(np.float32), LOG_ZERO)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"the distributions have different shapes ({shapes}); "
            "score all models with the same tokenizer and settings"
        )
