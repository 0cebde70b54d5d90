"""What a recipe will train and what it will cost, from the base's config and the data's lengths: no weight is loaded.

    python -m pipelines.planning.plan STAGE_FOLDER

Refuses a target that matches nothing and a rank larger than a layer, before any training.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_core import LoraConfig, Target
from lora_core.base.quant import base_weight
from lora_core.budget.activations import FLOAT32
from lora_core.budget.budget import Budget, budget
from lora_core.budget.setup import Setup
from lora_core.init.spectral import is_spectral
from lora_core.modules import output_head
from lora_core.training.losses import CHUNK_ROWS
from lora_core.validation import plan_adapter
from pipelines.errors import RecipeError
from pipelines.models.hardware import COMFORTABLE
from pipelines.models.support import check_checkpointing
from pipelines.planning.examples import Examples
from pipelines.planning.ways import Engine, exchanged, in_less_memory, scaling, traffic
from pipelines.runtime.child import run_stage

PROCESSES = (1, 2, 4, 8)
"""GPUs for which every way of training is printed."""
CPU_PROCESS_BYTES = 610_000_000
"""Measured: what a rank under DeepSpeed holds resident before its first step, less the tensors then held: 612 MB over an
NF4 base, 589 MB over a dense one. Interpreter and libraries, and what loading leaves behind."""
CPU_HEAP_SLACK = 1.36
"""Measured: glibc's heap keeps freed tensors and refills their gaps in part. Resident growth over bytes kept, for one
process of SmolLM2-135M with adapters at 570 to 700 tokens a pass: 1.38 over NF4, 1.33 dense; with
MALLOC_MMAP_THRESHOLD_=1000000, which gives every large tensor back, 1.0."""
GPU_PROCESS_BYTES = 1 << 30
"""An allowance, not measured here: the CUDA context and the buffers of NCCL."""


def plan(
    folder: Path, inputs: dict[str, Any], paths: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return targets by kind and rank, each run's cost by term and what would lower it, and every other way on GPUs."""
    model, examples = (
        meta_model(paths["base"], trust_remote_code=inputs.get("trust_remote_code", False)),
        Examples.read(Path(paths["data"])),
    )
    setup = run_setup(inputs, examples.largest_share(inputs))
    if setup.checkpointing:
        check_checkpointing(model)
    lora = inputs["lora"]
    targets = {rank: plan_adapter(model, lora_config(lora, rank)) for rank in inputs["ranks"]}
    check_ratio(lora, targets[inputs["ranks"][0]])
    price = Price(model, inputs, examples)
    runs = {f"rank-{rank}": _run(price, setup, found) for rank, found in targets.items()}
    runs["control"] = price.of(replace(setup, method="full"), [])
    on_gpu, largest, engine = gpu_setup(setup), targets[max(targets)], Engine.of(inputs)
    scaled = scaling(model, on_gpu, largest, engine)
    return {
        "weights": stored_weights(model, largest, quantized=inputs["quantization"] == "nf4"),
        "targets": [
            kind for found in targets.values() for kind in _by_kind(found, lora["use_dora"])
        ],
        "runs": runs,
        "setup": asdict(setup),
        "tokens_of_a_step": examples.tokens_of_a_step(inputs),
        "alternatives": [way for way in scaled if way["processes"] in PROCESSES],
        "scaling": scaled,
        "comfortable_share": COMFORTABLE,
        "exchanged": exchanged(model, on_gpu, largest, engine),
    }, []


def meta_model(base: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model that a folder's config describes, without weights."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return model


def run_setup(inputs: dict[str, Any], share: dict[str, int]) -> Setup:
    """Return how the adapters are trained, as the library's budget wants it."""
    setup = Setup(
        method="qlora" if inputs["quantization"] == "nf4" else "lora",
        tokens=share["tokens"],
        sharding=inputs["sharding"],
        processes=inputs["processes"],
        checkpointing=inputs["training"]["gradient_checkpointing"],
        dropout=inputs["lora"]["dropout"] > 0,
        dora=inputs["lora"]["use_dora"],
        logit_rows=min(CHUNK_ROWS, max(1, share["supervised"])),
        bucket_weights=inputs["bucket_weights"],
    )
    return cpu_setup(setup) if inputs["device"] == "cpu" else gpu_setup(setup)


def cpu_setup(setup: Setup) -> Setup:
    """Return the same training in float32 on a CPU, whose memory is what lies resident."""
    return replace(
        setup,
        compute_bytes=4,
        fused_optimizer=False,
        heap_slack=CPU_HEAP_SLACK,
        mapped_checkpoint=True,
        process_bytes=CPU_PROCESS_BYTES,
    )


def gpu_setup(setup: Setup) -> Setup:
    """Return the same training in bfloat16 on a GPU, over float32 masters of what is fully trained."""
    return replace(
        setup,
        compute_bytes=2,
        masters=True,
        fused_optimizer=True,
        heap_slack=1.0,
        mapped_checkpoint=False,
        process_bytes=GPU_PROCESS_BYTES,
    )


def lora_config(settings: dict[str, Any], rank: int) -> LoraConfig:
    """Return the library's config of one rank, from a recipe's lora section."""
    return LoraConfig(
        r=rank,
        lora_alpha=settings["alpha"],
        target_modules=_names(settings["target_modules"]),
        target_parameters=tuple(settings["target_parameters"]),
        exclude_modules=_names(settings["exclude_modules"]),
        layers_to_transform=tuple(settings["layers_to_transform"]),
        lora_dropout=settings["dropout"],
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
        init_lora_weights=settings["init"],
    )


def check_ratio(lora: dict[str, Any], targets: list[Target]) -> None:
    """Refuse LoRA+ where it changes no rate."""
    if (
        lora["loraplus_ratio"] != 1
        and not lora["use_dora"]
        and all(target.layer == "embedding" for target in targets)
    ):
        raise RecipeError(
            f"lora.loraplus_ratio {lora['loraplus_ratio']:g} has no effect: both factors of an embedding learn at one rate; use 1"
        )


def _names(value: str | list[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class Price:
    """Finds what runs of one recipe cost."""

    model: nn.Module
    """Without weights."""
    inputs: dict[str, Any]
    """The plan's."""
    examples: Examples

    def of(self, setup: Setup, targets: list[Target], starts: int = 0) -> dict[str, Any]:
        """Return a run's budget, its memory were gradient checkpointing the other way, what would need less, and what a rank sends.

        Args:
            setup: how it is trained.
            targets: the adapter's; none for the control.
            starts: weights of a start that stays beside the trained pair, in memory and in the file.
        """

        def needed(way: Setup) -> int:
            return _with_starts(budget(self.model, way, targets), way, starts).memory_bytes

        cost = _with_starts(budget(self.model, setup, targets), setup, starts)
        return {
            **vars(cost),
            "memory_bytes": cost.memory_bytes,
            "other_checkpointing_bytes": needed(
                replace(setup, checkpointing=not setup.checkpointing)
            ),
            "less": in_less_memory(setup, self.inputs, self.examples, needed),
            "sent_bytes": traffic(self.model, setup, targets, Engine.of(self.inputs)).wire_bytes,
        }


def _with_starts(cost: Budget, setup: Setup, starts: int) -> Budget:
    held = cost.weight_bytes + setup.held_bytes * starts
    return replace(cost, file_bytes=cost.file_bytes + FLOAT32 * starts, weight_bytes=held)


def _run(price: Price, setup: Setup, targets: list[Target]) -> dict[str, Any]:
    """Return an adapter's rank and scale, the rank that its file has, and its cost."""
    rank, doubles = targets[0].rank, is_spectral(price.inputs["lora"]["init"])
    starts = sum(target.trained_weights for target in targets) if doubles else 0
    file_rank = 2 * rank if doubles else rank
    return {
        "rank": rank,
        "scale": targets[0].scale,
        "file_rank": file_rank,
        **price.of(setup, targets, starts),
    }


def stored_weights(
    model: nn.Module, targets: list[Target], *, quantized: bool
) -> list[dict[str, Any]]:
    """Return all weights of the base by the last parts of their names: how each kind is stored, and whether it is adapted."""
    head, adapted = output_head(model), {target.name for target in targets}
    kinds: dict[tuple[str, str, bool], list[int]] = {}
    own = {
        id(parameter): name for name, parameter in model.named_parameters()
    }  # a tied weight is counted where it comes first
    for path, module in model.named_modules():
        in_4_bits = quantized and module is not head and base_weight(module) is not None
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if own[id(parameter)] != full:
                continue
            what = re.sub(r"\.\d+\.", ".*.", full)
            is_adapted = (path in adapted and name == "weight") or full in adapted
            stored = "nf4" if in_4_bits and name == "weight" else "dense"
            kinds.setdefault((what, stored, is_adapted), []).append(parameter.numel())
    return [
        {
            "name": name,
            "stored": stored,
            "adapted": is_adapted,
            "count": len(sizes),
            "weights": sum(sizes),
        }
        for (name, stored, is_adapted), sizes in kinds.items()
    ]


def _by_kind(targets: list[Target], use_dora: bool) -> list[dict[str, Any]]:
    """Group targets by the last part of their name and their shape; weights are those of the whole group, with DoRA's lengths."""
    groups: dict[tuple[str, int, int], list[Target]] = {}
    for target in targets:
        groups.setdefault(
            (target.name.rpartition(".")[2], target.out_features, target.in_features), []
        ).append(target)
    return [
        {
            "name": name,
            "out_features": out,
            "in_features": wide,
            "count": len(group),
            "rank": group[0].rank,
            "scale": group[0].scale,
            "trained_weights": sum(target.trained_weights for target in group)
            + use_dora * out * len(group),
        }
        for (name, out, wide), group in groups.items()
    ]


if __name__ == "__main__":
    run_stage(plan)
