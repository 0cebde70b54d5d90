"""Ranks from the spectra of the layers' inputs: EVA redistributes the total rank over the layers.

Source: EVA (Paischer et al. 2024, arXiv 2410.07170), section 3.3.
"""

import math
import re
from dataclasses import replace

from torch import nn

from lora_core.calibration.eva import Batches, input_spectra, redistribute_ranks
from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from lora_core.targets import Target
from lora_core.validation import plan_adapter


def eva_ranks(
    model: nn.Module,
    config: LoraConfig,
    data: Batches,
    *,
    rho: float = 2.0,
) -> LoraConfig:
    """Return `config` with larger ranks for the layers whose inputs have more strong directions.

    The sum of the ranks and the scale of each layer are unchanged. A layer that gets rank 0 is not
    a target of the new config.

    Args:
        model: without an adapter; run without gradients, and not changed.
        config: with linear targets only.
        data: calls that each run one batch through `model`.
        rho: maximum ratio of a layer's new rank to its rank in `config`; at least 1 (no change).

    Raises:
        TargetError, ConfigError: see `plan_adapter`, `input_spectra` and `redistribute_ranks`.
    """
    if not (math.isfinite(rho) and rho >= 1):
        raise ConfigError(f"rho={rho!r} must be at least 1; 2 is common")
    targets = plan_adapter(model, replace(config, init_lora_weights="eva"))
    limits = {target.name: _limit(target, rho) for target in targets}
    spectra = input_spectra(model, limits, data, rank=max(limits.values()))
    explained = {name: spectra[name].explained[:limit] for name, limit in limits.items()}
    total = sum(target.rank for target in targets)
    ranks = redistribute_ranks(explained, total)
    above_zero = {name: rank for name, rank in ranks.items() if rank}
    return _with_ranks(config, above_zero)


def _limit(target: Target, rho: float) -> int:
    """Return the largest new rank of a target."""
    largest = round(rho * target.rank)
    return min(largest, target.in_features, target.out_features)


def _with_ranks(config: LoraConfig, ranks: dict[str, int]) -> LoraConfig:
    """Return a config that lists the targets, with patterns for ranks and alphas that differ."""
    rank_pattern = {}
    alpha_pattern = {}
    for name, rank in ranks.items():
        divisor = math.sqrt(rank) if config.use_rslora else rank
        alpha = config.scale_of(name) * divisor
        pattern = re.escape(name)
        if rank != config.r:
            rank_pattern[pattern] = rank
        if alpha != config.lora_alpha:
            alpha_pattern[pattern] = alpha
    return replace(
        config,
        target_modules=tuple(ranks),
        exclude_modules=(),
        layers_to_transform=(),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
