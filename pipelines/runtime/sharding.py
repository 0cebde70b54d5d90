"""What an accelerate config means, and which combinations with a recipe cannot work.

Imports no torch.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from lora_core.budget.wire import PERSISTENT_WEIGHTS, REUSE_WEIGHTS, Sharding
from pipelines.config.recipe import Recipe
from pipelines.errors import RecipeError
from pipelines.runtime.interfaces.inputs import LaunchFacts
from pipelines.runtime.interfaces.results import BaseResult
from pipelines.runtime.launcher import REPOSITORY, WITHOUT_GPUS, config_file

DEEPSPEED_BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once by default."""
OWN_BUCKET = 50_000_000
"""The value in the configs of infra/deepspeed. A plan compares those alternatives if the launch
config uses another engine."""
ENGINES: dict[str, Sharding] = {
    "NO": "ddp",
    "MULTI_CPU": "ddp",
    "MULTI_GPU": "ddp",
    "FSDP": "zero3",
}
ZERO_STAGES: tuple[Sharding, ...] = ("ddp", "zero1", "zero2", "zero3")
SINGLE_PROCESS = ("NO", "MULTI_CPU")
"""Values of distributed_type for which accelerate's launcher starts one process, whatever
--num_processes is."""


@dataclass(frozen=True)
class LaunchConfig:
    """The content of a launch config."""

    name: str
    kind: str
    """accelerate's distributed_type."""
    on_cpu: bool
    settings: dict[str, Any]
    """The accelerate config."""
    section: dict[str, Any]
    """Its deepspeed_config section."""
    deepspeed: dict[str, Any]
    """DeepSpeed's config, from its own file or from accelerate's keys; empty for other engines."""

    @classmethod
    def read(cls, name: str) -> "LaunchConfig":
        """Read a config of infra/accelerate by name, or any by path; RecipeError if absent."""
        settings = yaml.safe_load(config_file(name).read_text())
        kind = settings.get("distributed_type", "NO")
        section = settings.get("deepspeed_config") or {}
        deepspeed = _deepspeed(name, section) if kind == "DEEPSPEED" else {}
        return cls(name, kind, bool(settings.get("use_cpu")), settings, section, deepspeed)

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's zero_optimization section."""
        section: dict[str, Any] = self.deepspeed.get("zero_optimization", {})
        return section

    @property
    def stage(self) -> int:
        """The ZeRO stage; 0 for other engines."""
        return int(self.zero.get("stage", 0))

    @property
    def gradient_accumulation_steps(self) -> Any:
        """The value that the config itself sets; "auto" if it leaves the choice to the recipe."""
        own = self.section.get("gradient_accumulation_steps", "auto")
        return self.deepspeed.get("gradient_accumulation_steps", own)


def launch_facts(name: str) -> LaunchFacts:
    """Return what a launch config means for a plan: device, sharding and communication.

    Raises:
        RecipeError: the config does not exist, or a plan does not know the memory of its engine.
    """
    launch = LaunchConfig.read(name)
    if launch.kind != "DEEPSPEED" and launch.kind not in ENGINES:
        raise RecipeError(
            f"launch.config {name!r} has distributed_type {launch.kind}; "
            f"a plan knows {', '.join(ENGINES)} and DEEPSPEED"
        )
    default_bucket = DEEPSPEED_BUCKET if launch.deepspeed else OWN_BUCKET
    return LaunchFacts(
        device="cpu" if launch.on_cpu else "gpu",
        sharding=_sharding(launch),
        bucket_weights=_number(launch, "reduce_bucket_size", default_bucket),
        persistent_weights=_number(
            launch, "stage3_param_persistence_threshold", PERSISTENT_WEIGHTS
        ),
        reuse_weights=_number(launch, "stage3_max_reuse_distance", REUSE_WEIGHTS),
        reduces_to_owner=launch.zero.get("use_multi_rank_bucket_allreduce") is False,
    )


def hide_gpus_if_on_cpu(config: str) -> None:
    """Hide the GPUs from all stages of this process if a launch config is for the CPU."""
    if LaunchConfig.read(config).on_cpu:
        os.environ.update(WITHOUT_GPUS)


def check_forward_path(recipe: Recipe, base: BaseResult) -> None:
    """Reject a base without the packed forward path if ZeRO-3 shards its weights.

    Under ZeRO-3 every rank must run the same number of forward passes; without packing, the number
    differs.

    Args:
        recipe: the recipe.
        base: what the base's stage reported.

    Raises:
        RecipeError: the combination cannot be trained.
    """
    forward = base.forward
    if forward.is_packed or recipe.launch.processes == 1:
        return
    if launch_facts(recipe.launch.config).sharding in ("zero3", "zero3_offload"):
        raise RecipeError(
            f"launch.config {recipe.launch.config!r} shards the weights of {base.id}, which is "
            f"read one example at a time ({'; '.join(forward.rejected)}), and its ranks would "
            "have to read equally many; use ddp, zero1 or zero2"
        )


def check_launch(recipe: Recipe) -> None:
    """Reject a launch config that cannot train this recipe, before anything is trained.

    Raises:
        RecipeError: each reason, and what to write instead.
    """
    launch = LaunchConfig.read(recipe.launch.config)
    problems = find_problems(launch, recipe)
    if problems:
        raise RecipeError(f"launch.config {launch.name!r} {'; and '.join(problems)}")


def find_problems(launch: LaunchConfig, recipe: Recipe) -> list[str]:
    """Return why a launch config cannot train a recipe, one clause per reason; empty if it can.

    Pure.

    Args:
        launch: as accelerate reads it.
        recipe: what would be trained.
    """
    problems = [rule(launch, recipe) for rule in RULES]
    return [problem for problem in problems if problem is not None]


def _one_process(launch: LaunchConfig, recipe: Recipe) -> str | None:
    processes = recipe.launch.processes
    if launch.kind not in SINGLE_PROCESS or processes == 1:
        return None
    return (
        f"has distributed_type {launch.kind}, for which accelerate starts one process, but "
        f"launch.processes is {processes}; use {_device(launch)}_ddp, or 1 process"
    )


def _fsdp(launch: LaunchConfig, recipe: Recipe) -> str | None:
    if launch.kind != "FSDP":
        return None
    use = f"use {_device(launch)}_zero3"
    if launch.on_cpu:
        return (
            "uses FSDP on a CPU, which accelerate silently replaces with DDP, so that nothing "
            f"would be sharded; {use}"
        )
    if recipe.base_model.quantization == "nf4":
        return (
            "uses FSDP, which flattens weights of one dtype together, but nf4 codes are bytes "
            f"among floating-point weights; {use}"
        )
    return (
        "uses FSDP, whose shards are not gathered when checkpoints and adapters are saved; " + use
    )


def _zero3_init(launch: LaunchConfig, recipe: Recipe) -> str | None:
    if launch.stage < 3 or launch.section.get("zero3_init_flag") is not True:
        return None
    if recipe.base_model.quantization == "nf4":
        return (
            "sets zero3_init_flag, but 4-bit codes are computed from complete weights, not from a "
            "rank's shard; set it to false"
        )
    return (
        "sets zero3_init_flag, which has no effect: each rank loads the complete base and then "
        "shards it; set it to false"
    )


def _half_precision_on_cpu(launch: LaunchConfig, recipe: Recipe) -> str | None:
    if not launch.on_cpu:
        return None
    forced = []
    for name in ("bf16", "fp16"):
        if launch.deepspeed.get(name, {}).get("enabled") is True:
            forced.append(name)
    mixed = launch.settings.get("mixed_precision", "no")
    if mixed in ("bf16", "fp16", "fp8"):
        forced.append(f"mixed_precision {mixed}")
    if not forced:
        return None
    return (
        f"forces {' and '.join(forced)} on a CPU, where computation is in float32; remove it, or "
        "set it to 'auto'"
    )


def _zero_stage_0(launch: LaunchConfig, recipe: Recipe) -> str | None:
    if launch.kind != "DEEPSPEED" or launch.stage > 0:
        return None
    return (
        "starts DeepSpeed at stage 0, which shards nothing and would not clip gradients; use "
        f"{_device(launch)}_ddp"
    )


def _other_accumulation(launch: LaunchConfig, recipe: Recipe) -> str | None:
    steps = launch.gradient_accumulation_steps
    expected = recipe.training.gradient_accumulation_steps
    if steps in ("auto", expected):
        return None
    return (
        f"sets gradient_accumulation_steps to {steps}, but training.gradient_accumulation_steps "
        f"is {expected}; set the first to 'auto'"
    )


def _other_optimizer(launch: LaunchConfig, recipe: Recipe) -> str | None:
    named = [name for name in ("optimizer", "scheduler") if name in launch.deepspeed]
    if not named:
        return None
    return (
        f"defines DeepSpeed's own {' and '.join(named)}, so that the recipe's learning rates would "
        "be ignored; remove it"
    )


Rule = Callable[[LaunchConfig, Recipe], str | None]
RULES: tuple[Rule, ...] = (
    _one_process,
    _fsdp,
    _zero3_init,
    _half_precision_on_cpu,
    _zero_stage_0,
    _other_accumulation,
    _other_optimizer,
)


def _device(launch: LaunchConfig) -> str:
    return "cpu" if launch.on_cpu else "gpu"


def _sharding(launch: LaunchConfig) -> Sharding:
    """Return the name of the sharding.

    On a CPU offloading changes nothing: host and process share one memory.
    """
    if launch.kind != "DEEPSPEED":
        return ENGINES[launch.kind]
    offloads = launch.zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if launch.stage == 3 and offloads and not launch.on_cpu:
        return "zero3_offload"
    return ZERO_STAGES[launch.stage]


def _number(launch: LaunchConfig, key: str, default: int) -> int:
    value = launch.zero.get(key)
    return int(value) if isinstance(value, (int, float)) else default


def _deepspeed(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's config from the named file or from accelerate's own keys."""
    file = section.get("deepspeed_config_file")
    if file is None:
        offload = {"device": section.get("offload_optimizer_device", "none")}
        zero = {"stage": section.get("zero_stage", 2), "offload_optimizer": offload}
        return {"zero_optimization": zero}
    path = REPOSITORY / file
    if not path.is_file():
        raise RecipeError(
            f"launch.config {name!r} names deepspeed_config_file {file!r}, and there is no {path}; "
            "give its absolute path"
        )
    config: dict[str, Any] = json.loads(path.read_text())
    return config
