"""Ranks by what each layer's inputs offer: EVA's redistribution of one total over the layers.

Source: EVA (Paischer et al. 2024, arXiv 2410.07170), section 3.3.
"""

import math
import re
from dataclasses import replace

from torch import nn

from lora_core.calibration.eva import Batches, input_spectra, redistributed
from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from lora_core.targets import Target
from lora_core.validation import plan_adapter


def eva_ranks(
    model: nn.Module, config: LoraConfig, data: Batches, *, rho: float = 2.0
) -> LoraConfig:
    """Return `config` with its ranks moved to the layers whose inputs have more strong directions.

    The sum of the ranks and the scale of each layer stay; a layer that gets no rank is no target of the new config.

    Args:
        model: carries no adapter; run without gradients, and not changed.
        config: linear targets alone.
        data: calls that each push one batch through `model`.
        rho: no layer gets more than so many times its own rank; at least 1, where nothing moves.

    Raises:
        TargetError, ConfigError: see `plan_adapter`, `input_spectra` and `redistributed`.
    """
    if not (math.isfinite(rho) and rho >= 1):
        raise ConfigError(f"rho={rho!r} must be at least 1; 2 is common")
    targets = plan_adapter(model, replace(config, init_lora_weights="eva"))
    limits = {target.name: _limit(target, rho) for target in targets}
    spectra = input_spectra(model, limits, data, rank=max(limits.values()))
    explained = {name: spectra[name].explained[:limit] for name, limit in limits.items()}
    ranks = redistributed(explained, sum(target.rank for target in targets))
    return _with_ranks(config, {name: rank for name, rank in ranks.items() if rank})


def _limit(target: Target, rho: float) -> int:
    return min(round(rho * target.rank), target.in_features, target.out_features)


def _with_ranks(config: LoraConfig, ranks: dict[str, int]) -> LoraConfig:
    """Spell the targets out, with patterns for those whose rank or alpha is not the config's own."""
    alphas = {
        name: config.scale_of(name) * (math.sqrt(rank) if config.use_rslora else rank)
        for name, rank in ranks.items()
    }
    return replace(
        config,
        target_modules=tuple(ranks),
        exclude_modules=(),
        layers_to_transform=(),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != config.r},
        alpha_pattern={
            re.escape(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha
        },
    )
