"""What an accelerate config makes of the processes, as far as memory is concerned. Imports no torch."""

import json
from typing import Any

import yaml

from pipelines.errors import RecipeError
from pipelines.launch import REPOSITORY, config_file

DEEPSPEED_BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once where its config does not say."""
ENGINES = {"NO": "ddp", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp", "FSDP": "zero3"}
STAGES = ("ddp", "zero1", "zero2", "zero3")


def sharding(name: str) -> dict[str, Any]:
    """Return what a launch config means for a budget: `device` (cpu or gpu), `sharding` and `bucket_weights`.

    Raises:
        RecipeError: there is no such config, or it asks for an engine whose memory is not known here.
    """
    config = yaml.safe_load(config_file(name).read_text())
    kind = config.get("distributed_type", "NO")
    device = "cpu" if config.get("use_cpu") else "gpu"
    if kind == "DEEPSPEED":
        zero = _zero(config.get("deepspeed_config", {}))
        bucket = zero.get("reduce_bucket_size")
        return {
            "device": device,
            "sharding": STAGES[int(zero.get("stage", 0))],
            "bucket_weights": int(bucket) if isinstance(bucket, (int, float)) else DEEPSPEED_BUCKET,
        }
    if kind not in ENGINES:
        raise RecipeError(f"launch.config {name!r} has distributed_type {kind}; a plan knows {', '.join(ENGINES)} and DEEPSPEED")
    return {"device": device, "sharding": ENGINES[kind], "bucket_weights": DEEPSPEED_BUCKET}


def _zero(section: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's zero_optimization, from its own file or from accelerate's keys."""
    file = section.get("deepspeed_config_file")
    if file is None:
        return {"stage": section.get("zero_stage", 2)}
    zero: dict[str, Any] = json.loads((REPOSITORY / file).read_text()).get("zero_optimization", {})
    return zero
