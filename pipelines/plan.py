"""What a recipe will train and what it will cost, from the base's config alone: no weight is loaded.

    python -m pipelines.plan STAGE_FOLDER

Refuses a target that matches nothing and a rank larger than a layer, before any training.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_core import LoraConfig, Target, plan_targets
from lora_core.budget import Budget, full_budget, lora_budget
from pipelines.child import run_stage


def plan(folder: Path, inputs: dict[str, Any], paths: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return, for each rank and for the control, trained weights, file size and memory; and the targets by kind."""
    config = AutoConfig.from_pretrained(paths["base"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    runs: dict[str, Any] = {}
    targets: list[Target] = []
    for rank in inputs["ranks"]:
        targets = plan_targets(model, lora_config(inputs["lora"], rank))
        budget = lora_budget(model, targets, quantized=inputs["quantization"] == "nf4", tokens=inputs["tokens"], shards=inputs["processes"])
        runs[f"rank-{rank}"] = {"scale": targets[0].scale, **_plain(budget)}
    runs["control"] = _plain(full_budget(model, tokens=inputs["tokens"], shards=inputs["processes"]))
    return {"targets": _by_kind(targets), "runs": runs}, []


def lora_config(settings: dict[str, Any], rank: int) -> LoraConfig:
    """Return the library's config of one rank, from a recipe's lora section."""
    targets = settings["target_modules"]
    return LoraConfig(
        r=rank,
        lora_alpha=settings["alpha"],
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        lora_dropout=settings["dropout"],
        use_rslora=settings["use_rslora"],
        init_lora_weights=settings["init"],
    )


def _plain(budget: Budget) -> dict[str, int]:
    return {**vars(budget), "memory_bytes": budget.memory_bytes}


def _by_kind(targets: list[Target]) -> list[dict[str, Any]]:
    """Group targets by the last part of their name and their shape."""
    groups: dict[tuple[str, int, int], int] = {}
    for target in targets:
        key = (target.name.rpartition(".")[2], target.out_features, target.in_features)
        groups[key] = groups.get(key, 0) + 1
    return [{"name": n, "out_features": o, "in_features": i, "count": count} for (n, o, i), count in groups.items()]


if __name__ == "__main__":
    run_stage(plan)
