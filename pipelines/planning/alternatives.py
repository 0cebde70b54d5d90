"""Memory and traffic of the same training on more GPUs, and of changes that need less memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from lora_core import Target
from lora_core.budget.budget import alternatives
from lora_core.budget.communicated import communicated_weights
from lora_core.budget.setup import METHODS, Setup
from lora_core.budget.wire import SHARDINGS, CommunicatedWeights, Exchange, Traffic, wire_bytes
from pipelines.planning.examples import Examples

PROCESSES = tuple(2**power for power in range(10))
"""1 to 512 GPUs."""
MIN_MAX_TOKENS = 8
"""Smallest suggested data.max_tokens."""
RecipeChange = tuple[str, Any, Setup]
"""A setting of the recipe, its new value, and the setup that results."""


@dataclass(frozen=True)
class EngineSettings:
    """How a launch's engine communicates weights and gradients."""

    gradient_accumulation_steps: int
    persistent_weights: int
    reuse_weights: int
    reduces_to_owner: bool

    @classmethod
    def from_inputs(cls, inputs: dict[str, Any]) -> "EngineSettings":
        """Read the settings from a plan's inputs."""
        return cls(
            gradient_accumulation_steps=inputs["training"]["gradient_accumulation_steps"],
            persistent_weights=inputs["persistent_weights"],
            reuse_weights=inputs["reuse_weights"],
            reduces_to_owner=inputs["reduces_to_owner"],
        )

    def exchange(self, setup: Setup) -> Exchange:
        """Return how the ranks of a setup share a step."""
        return Exchange(
            sharding=setup.sharding,
            processes=setup.processes,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            checkpointing=setup.checkpointing,
            reduces_to_owner=self.reduces_to_owner,
            reuse_weights=self.reuse_weights,
        )


def traffic(
    model: nn.Module, setup: Setup, targets: Sequence[Target], engine: EngineSettings
) -> Traffic:
    """Return what each rank sends in a step."""
    weights = communicated_weights(
        model, setup, targets, persistent_weights=engine.persistent_weights
    )
    return wire_bytes(weights, engine.exchange(setup))


def scaling(
    model: nn.Module, setup: Setup, targets: list[Target], engine: EngineSettings
) -> list[dict[str, Any]]:
    """Return memory and traffic of each method under each sharding on 1 to 512 processes.

    The number of tokens on each process is constant.

    Args:
        model: without weights.
        setup: for the hardware in question.
        targets: the adapters'.
        engine: how the launch's engine communicates.
    """
    plain = replace(setup, checkpointing=False)
    checkpointed = replace(setup, checkpointing=True)
    setups = (plain, _in_eight_bits(plain), checkpointed, _in_eight_bits(checkpointed))
    budgets = [alternatives(model, one, targets, PROCESSES) for one in setups]
    weights = _weights_by_method(model, setup, targets, engine)
    rows = []
    for plain_row, eight_bit_row, checkpointed_row, least_row in zip(*budgets, strict=True):
        configuration, cost = plain_row
        checkpointed_configuration, checkpointed_cost = checkpointed_row
        traffic_plain = wire_bytes(weights[configuration.method], engine.exchange(configuration))
        traffic_checkpointed = wire_bytes(
            weights[configuration.method], engine.exchange(checkpointed_configuration)
        )
        row = {
            "method": configuration.method,
            "sharding": configuration.sharding,
            "processes": configuration.processes,
            "memory_bytes": cost.memory_bytes,
            "eight_bit_bytes": eight_bit_row[1].memory_bytes,
            "checkpointed_bytes": checkpointed_cost.memory_bytes,
            "checkpointed_eight_bit_bytes": least_row[1].memory_bytes,
            "sent_bytes": traffic_plain.wire_bytes,
            "checkpointed_sent_bytes": traffic_checkpointed.wire_bytes,
        }
        rows.append(row)
    return rows


def exchanged(
    model: nn.Module, setup: Setup, targets: list[Target], engine: EngineSettings
) -> dict[str, Any]:
    """Return each method's communicated weights, and how they are communicated.

    This determines the traffic on any number of processes without the model.
    """
    weights = _weights_by_method(model, setup, targets, engine)
    exchange = asdict(engine.exchange(setup))
    del exchange["sharding"]
    del exchange["processes"]
    return {
        "weights": {method: asdict(one) for method, one in weights.items()},
        "exchange": exchange,
    }


def in_less_memory(
    setup: Setup,
    inputs: dict[str, Any],
    examples: Examples,
    memory_of: Callable[[Setup], int],
) -> list[dict[str, Any]]:
    """Return the single recipe changes that need less memory, the smallest first.

    Each has the setting, its value and the memory in bytes.

    Args:
        setup: of the recipe.
        inputs: the plan's.
        examples: the training examples.
        memory_of: returns the memory of a setup in bytes.
    """
    candidates = [
        *_other_passes(setup),
        *_smaller_micro_batches(setup, inputs, examples),
        *_other_launches(setup, inputs["device"]),
    ]
    current = memory_of(setup)
    smaller = []
    for setting, value, changed in candidates:
        memory = memory_of(changed)
        if memory < current:
            smaller.append({"setting": setting, "value": value, "memory_bytes": memory})
    return sorted(smaller, key=lambda change: int(change["memory_bytes"]))


def _weights_by_method(
    model: nn.Module, setup: Setup, targets: list[Target], engine: EngineSettings
) -> dict[str, CommunicatedWeights]:
    weights: dict[str, CommunicatedWeights] = {}
    for method in METHODS:
        weights[method] = communicated_weights(
            model,
            replace(setup, method=method),
            targets,
            persistent_weights=engine.persistent_weights,
        )
    return weights


def _in_eight_bits(setup: Setup) -> Setup:
    return replace(setup, eight_bit_optimizer=True)


def _other_passes(setup: Setup) -> Iterator[RecipeChange]:
    if not setup.checkpointing:
        yield "training.gradient_checkpointing", True, replace(setup, checkpointing=True)
    if setup.method == "lora":
        yield "base_model.quantization", "nf4", replace(setup, method="qlora")


def _smaller_micro_batches(
    setup: Setup, inputs: dict[str, Any], examples: Examples
) -> Iterator[RecipeChange]:
    training = inputs["training"]
    doubled = 2 * training["gradient_accumulation_steps"]
    if inputs["processes"] * doubled <= training["batch_size"]:
        changed = {**inputs, "training": {**training, "gradient_accumulation_steps": doubled}}
        largest = examples.largest_micro_batch(changed)
        yield (
            "training.gradient_accumulation_steps",
            doubled,
            _with_micro_batch(setup, largest),
        )
    halved = max(examples.lengths) // 2
    if halved >= MIN_MAX_TOKENS:
        largest = examples.truncate(halved).largest_micro_batch(inputs)
        yield "data.max_tokens", halved, _with_micro_batch(setup, largest)


def _other_launches(setup: Setup, device: str) -> Iterator[RecipeChange]:
    """Yield the launches that shard more; on a CPU, offloading frees no memory."""
    if setup.processes == 1:
        return
    current = SHARDINGS.index(setup.sharding)
    for name in SHARDINGS[current + 1 :]:
        if device == "gpu" or name != "zero3_offload":
            yield "launch.config", f"{device}_{name}", replace(setup, sharding=name)


def _with_micro_batch(setup: Setup, largest: dict[str, int]) -> Setup:
    logit_rows = min(setup.logit_rows, max(1, largest["supervised"]))
    return replace(setup, tokens=largest["tokens"], logit_rows=logit_rows)
