"""How far one model's next tokens have moved from another's: the KL divergence over general questions put as chats.

    log_probabilities    (N, V) float16    row = one position, in the file beside each model's items

KL(before ‖ after) = mean over positions of Σ p_before (log p_before − log p_after), in nats per token. It sees any change
of the model, wanted or not, and knows no right answer: a sign to look, and never judged. On the new task it goes with
forgetting (Shenfeld et al. 2025, arXiv 2509.04259); here it is taken where nothing was meant to change.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from pipelines.judging.records import Records, scored

TENSOR = "log_probabilities"
NO_CHANCE = np.float32(np.finfo(np.float16).min)
"""Stands for −∞, whose products are no numbers."""
Pair = tuple[str, str]


def divergences(chats: Records, files: Mapping[str, Path], pairs: Sequence[Pair]) -> dict[Pair, float]:
    """Return the KL divergence of some models from others, nats per token; none where no chat was scored.

    Args:
        chats: item records of any model, whose chats name their rows.
        files: label → distributions of that model.
        pairs: labels of before and after; each position is read once for all pairs.

    Raises:
        ValueError: two files hold other positions or another vocabulary.
    """
    rows = [record["rows"] for record in scored(chats, "chat")]
    totals = dict.fromkeys(pairs if rows else [], 0.0)
    with ExitStack() as stack:
        opened = {label: stack.enter_context(safe_open(files[label], framework="np")) for pair in totals for label in pair}
        tables = {label: file.get_slice(TENSOR) for label, file in opened.items()}
        _check_shapes({label: tuple(table.get_shape()) for label, table in tables.items()})
        for first, end in rows:
            logarithms = {label: _logarithms(table[first:end]) for label, table in tables.items()}
            chances = {before: np.exp(logarithms[before]) for before, _ in totals}
            for before, after in totals:
                totals[before, after] += float(np.vdot(chances[before], logarithms[before] - logarithms[after]))
    positions = sum(end - first for first, end in rows)
    return {pair: round(total / positions, 6) for pair, total in totals.items()}


def _logarithms(halves: NDArray[Any]) -> NDArray[np.float32]:
    return np.maximum(halves.astype(np.float32), NO_CHANCE)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the distributions have unlike shapes ({shapes}); score all models with the same tokenizer and settings")
