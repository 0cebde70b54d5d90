"""What an accelerate config makes of the processes, and which of its combinations with a recipe cannot work. Imports no torch."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lora_core.budget.wire import PERSISTENT_WEIGHTS, REUSE_WEIGHTS
from pipelines.config.recipe import Recipe
from pipelines.errors import RecipeError
from pipelines.runtime.launcher import REPOSITORY, WITHOUT_GPUS, config_file

DEEPSPEED_BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once where its config does not say."""
OWN_BUCKET = 50_000_000
"""What the configs of infra/deepspeed say: theirs are the ways that are weighed where the launch is none of DeepSpeed's."""
ENGINES = {"NO": "ddp", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp", "FSDP": "zero3"}
STAGES = ("ddp", "zero1", "zero2", "zero3")
ALONE = ("NO", "MULTI_CPU")
"""Types for which accelerate's launcher starts one process, whatever it is asked for."""


@dataclass(frozen=True)
class Launch:
    """A launch config, read."""

    name: str
    kind: str
    """accelerate's distributed_type."""
    on_cpu: bool
    settings: dict[str, Any]
    """The accelerate config."""
    section: dict[str, Any]
    """Its part on DeepSpeed."""
    deepspeed: dict[str, Any]
    """DeepSpeed's config, from its own file or from accelerate's keys; empty for other engines."""

    @classmethod
    def read(cls, name: str) -> "Launch":
        """Read a config of infra/accelerate by name, or any by path; raises RecipeError where there is none."""
        settings = yaml.safe_load(config_file(name).read_text())
        kind = settings.get("distributed_type", "NO")
        section = settings.get("deepspeed_config") or {}
        deepspeed = _deepspeed(name, section) if kind == "DEEPSPEED" else {}
        return cls(name, kind, bool(settings.get("use_cpu")), settings, section, deepspeed)

    @property
    def zero(self) -> dict[str, Any]:
        """Return DeepSpeed's zero_optimization."""
        section: dict[str, Any] = self.deepspeed.get("zero_optimization", {})
        return section

    @property
    def stage(self) -> int:
        """Return ZeRO's stage; 0 for other engines."""
        return int(self.zero.get("stage", 0))

    @property
    def gradient_accumulation_steps(self) -> Any:
        """Return the micro-batches that the config itself asks for; "auto" where it leaves them to the recipe."""
        return self.deepspeed.get(
            "gradient_accumulation_steps", self.section.get("gradient_accumulation_steps", "auto")
        )


def sharding(name: str) -> dict[str, Any]:
    """Return what a launch config means for a plan: device (cpu or gpu), sharding, and how its engine moves weights and gradients.

    Raises:
        RecipeError: there is no such config, or it asks for an engine whose memory is not known here.
    """
    launch = Launch.read(name)
    if launch.kind != "DEEPSPEED" and launch.kind not in ENGINES:
        raise RecipeError(
            f"launch.config {name!r} has distributed_type {launch.kind}; a plan knows {', '.join(ENGINES)} and DEEPSPEED"
        )
    return {
        "device": "cpu" if launch.on_cpu else "gpu",
        "sharding": _sharding(launch),
        "bucket_weights": _number(
            launch, "reduce_bucket_size", DEEPSPEED_BUCKET if launch.deepspeed else OWN_BUCKET
        ),
        "persistent_weights": _number(
            launch, "stage3_param_persistence_threshold", PERSISTENT_WEIGHTS
        ),
        "reuse_weights": _number(launch, "stage3_max_reuse_distance", REUSE_WEIGHTS),
        "reduces_to_owner": launch.zero.get("use_multi_rank_bucket_allreduce") is False,
    }


def keep_to_device(config: str) -> None:
    """Have all that this process starts compute where a launch config says, scoring too: under one for the CPU no GPU is seen."""
    if Launch.read(config).on_cpu:
        os.environ.update(WITHOUT_GPUS)


def check_path(recipe: Recipe, base: Mapping[str, Any]) -> None:
    """Refuse a base that is read one example at a time under a launch whose ranks must all read as many.

    Args:
        recipe: the recipe.
        base: what the base's stage reported.

    Raises:
        RecipeError: the launch shares weights (ZeRO-3) among several processes.
    """
    is_shared = sharding(recipe.launch.config)["sharding"] in ("zero3", "zero3_offload")
    if base["forward"]["path"] != "packed" and is_shared and recipe.launch.processes > 1:
        raise RecipeError(
            f"launch.config {recipe.launch.config!r} shares the weights of {base['id']}, which is read one example at a time "
            f"({'; '.join(base['forward']['rejected'])}), and its ranks would have to read as many; use ddp, zero1 or zero2"
        )


def check_launch(recipe: Recipe) -> None:
    """Refuse a launch that cannot train this recipe, before anything is trained.

    Raises:
        RecipeError: each reason, and what to write instead.
    """
    launch = Launch.read(recipe.launch.config)
    problems = refusals(launch, recipe)
    if problems:
        raise RecipeError(f"launch.config {launch.name!r} {'; and '.join(problems)}")


def refusals(launch: Launch, recipe: Recipe) -> list[str]:
    """Return why a launch cannot train a recipe, a clause for each reason; empty where it can. Pure."""
    return [problem for rule in RULES if (problem := rule(launch, recipe)) is not None]


def _one_process(launch: Launch, recipe: Recipe) -> str | None:
    processes = recipe.launch.processes
    if launch.kind not in ALONE or processes == 1:
        return None
    return (
        f"has distributed_type {launch.kind}, for which accelerate starts one process, and launch.processes is {processes}; use "
        f"{_device(launch)}_ddp, or 1 process"
    )


def _fsdp(launch: Launch, recipe: Recipe) -> str | None:
    if launch.kind != "FSDP":
        return None
    use = f"use {_device(launch)}_zero3"
    if launch.on_cpu:
        return f"asks for FSDP on a CPU, which accelerate turns into DDP without a word: nothing would be shared out; {use}"
    if recipe.base_model.quantization == "nf4":
        return f"asks for FSDP, which lays weights of one dtype together, and the codes of nf4 are bytes beside floating-point weights; {use}"
    return f"asks for FSDP, whose shares are not gathered where checkpoints and adapters are saved; {use}"


def _loaded_in_shares(launch: Launch, recipe: Recipe) -> str | None:
    if launch.stage < 3 or launch.section.get("zero3_init_flag") is not True:
        return None
    if recipe.base_model.quantization == "nf4":
        return "sets zero3_init_flag, and 4-bit codes are made of whole weights, not of a rank's share; set it to false"
    return "sets zero3_init_flag, which has no effect: each rank loads the base whole and then shares it out; set it to false"


def _half_precision_on_cpu(launch: Launch, recipe: Recipe) -> str | None:
    forced = [
        name for name in ("bf16", "fp16") if launch.deepspeed.get(name, {}).get("enabled") is True
    ]
    mixed = launch.settings.get("mixed_precision", "no")
    forced += [f"mixed_precision {mixed}"] if mixed in ("bf16", "fp16", "fp8") else []
    if not launch.on_cpu or not forced:
        return None
    return f"forces {' and '.join(forced)} on a CPU, where the computation is in float32; leave it out, or to 'auto'"


def _nothing_shared(launch: Launch, recipe: Recipe) -> str | None:
    if launch.kind != "DEEPSPEED" or launch.stage > 0:
        return None
    return f"starts DeepSpeed at stage 0, which shares nothing and would not shorten gradients; use {_device(launch)}_ddp"


def _other_accumulation(launch: Launch, recipe: Recipe) -> str | None:
    parts, wanted = launch.gradient_accumulation_steps, recipe.training.gradient_accumulation_steps
    if parts in ("auto", wanted):
        return None
    return f"sets gradient_accumulation_steps to {parts}, and training.gradient_accumulation_steps is {wanted}; set the first to 'auto'"


def _own_optimizer(launch: Launch, recipe: Recipe) -> str | None:
    named = [name for name in ("optimizer", "scheduler") if name in launch.deepspeed]
    if not named:
        return None
    return f"brings DeepSpeed's own {' and '.join(named)}, and the recipe's learning rates would be ignored; take them out"


Rule = Callable[[Launch, Recipe], str | None]
RULES: tuple[Rule, ...] = (
    _one_process,
    _fsdp,
    _loaded_in_shares,
    _half_precision_on_cpu,
    _nothing_shared,
    _other_accumulation,
    _own_optimizer,
)


def _device(launch: Launch) -> str:
    return "cpu" if launch.on_cpu else "gpu"


def _sharding(launch: Launch) -> str:
    """Name what is shared; on a CPU the host's memory is the process's own, so that offloading changes nothing of it."""
    if launch.kind != "DEEPSPEED":
        return ENGINES[launch.kind]
    offloads = launch.zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return (
        "zero3_offload"
        if launch.stage == 3 and offloads and not launch.on_cpu
        else STAGES[launch.stage]
    )


def _number(launch: Launch, key: str, default: int) -> int:
    value = launch.zero.get(key)
    return int(value) if isinstance(value, (int, float)) else default


def _deepspeed(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's config, from the file that accelerate's section names or from accelerate's own keys."""
    file = section.get("deepspeed_config_file")
    if file is None:
        offload = {"device": section.get("offload_optimizer_device", "none")}
        return {
            "zero_optimization": {
                "stage": section.get("zero_stage", 2),
                "offload_optimizer": offload,
            }
        }
    path = REPOSITORY / file
    if not path.is_file():
        raise RecipeError(
            f"launch.config {name!r} names deepspeed_config_file {file!r}, and there is no {path}; give its whole path"
        )
    found: dict[str, Any] = json.loads(path.read_text())
    return found
