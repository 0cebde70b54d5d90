"""Memory and traffic of the same training on more GPUs, and of changes that need less memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lora_core import Target
from lora_core.budget.budget import alternatives
from lora_core.budget.communicated import communicated_weights
from lora_core.budget.setup import METHODS, Method, Setup
from lora_core.budget.wire import SHARDINGS, CommunicatedWeights, Exchange, Traffic, wire_bytes
from pipelines.planning.examples import Examples, LargestMicroBatch
from pipelines.runtime.interfaces.inputs import LaunchFacts, PlanInputs
from pipelines.runtime.interfaces.plan_result import (
    Communication,
    Configuration,
    ConfigurationCost,
    SmallerChange,
)

PROCESSES = tuple(2**power for power in range(10))
"""1 to 512 GPUs."""
MIN_MAX_TOKENS = 8
"""Smallest suggested data.max_tokens."""


@dataclass(frozen=True)
class RecipeChange:
    """A change of one setting of the recipe."""

    setting: str
    value: bool | int | str
    setup: Setup
    """The setup that results."""


def traffic(
    model: nn.Module, setup: Setup, targets: Sequence[Target], inputs: PlanInputs
) -> Traffic:
    """Return what each rank sends in a step.

    Args:
        model: without weights.
        setup: method, sharding and number of processes.
        targets: the adapters'; none for full fine-tuning.
        inputs: the plan's.
    """
    return wire_bytes(_weights(model, setup, targets, inputs), _exchange(setup, inputs))


def scaling(
    model: nn.Module, setup: Setup, targets: Sequence[Target], inputs: PlanInputs
) -> tuple[Configuration, ...]:
    """Return memory and traffic of each method under each sharding on 1 to 512 processes.

    The number of tokens on each process is constant.

    Args:
        model: without weights.
        setup: for the hardware in question.
        targets: the adapters'.
        inputs: the plan's.
    """
    costs = _costs(model, replace(setup, checkpointing=False), targets, inputs)
    checkpointed = _costs(model, replace(setup, checkpointing=True), targets, inputs)
    configurations = []
    for (variant, cost), (_, checkpointed_cost) in zip(costs, checkpointed, strict=True):
        configuration = Configuration(
            method=variant.method,
            sharding=variant.sharding,
            processes=variant.processes,
            without_checkpointing=cost,
            with_checkpointing=checkpointed_cost,
        )
        configurations.append(configuration)
    return tuple(configurations)


def communication(
    model: nn.Module, setup: Setup, targets: Sequence[Target], inputs: PlanInputs
) -> Communication:
    """Return each method's communicated weights, and how they are communicated.

    Args:
        model: without weights.
        setup: for the hardware in question.
        targets: the adapters'.
        inputs: the plan's.
    """
    weights = _weights_by_method(model, setup, targets, inputs)
    return Communication(weights=weights, exchange=_exchange(setup, inputs))


def in_less_memory(
    setup: Setup,
    inputs: PlanInputs,
    examples: Examples,
    memory_of: Callable[[Setup], int],
) -> tuple[SmallerChange, ...]:
    """Return the single recipe changes that need less memory, the smallest first.

    Args:
        setup: of the recipe.
        inputs: the plan's.
        examples: the training examples.
        memory_of: returns the memory of a setup in bytes.
    """
    candidates = [
        *_other_passes(setup),
        *_smaller_micro_batches(setup, inputs, examples),
        *_other_launches(setup, inputs.launch),
    ]
    current = memory_of(setup)
    smaller = []
    for change in candidates:
        memory = memory_of(change.setup)
        if memory < current:
            smaller.append(
                SmallerChange(setting=change.setting, value=change.value, memory_bytes=memory)
            )
    return tuple(sorted(smaller, key=lambda change: change.memory_bytes))


def _costs(
    model: nn.Module, setup: Setup, targets: Sequence[Target], inputs: PlanInputs
) -> list[tuple[Setup, ConfigurationCost]]:
    """Return the cost of `setup` with every method, sharding and number of processes."""
    in_eight_bits = replace(setup, eight_bit_optimizer=True)
    budgets = alternatives(model, setup, targets, PROCESSES)
    eight_bit_budgets = alternatives(model, in_eight_bits, targets, PROCESSES)
    weights = _weights_by_method(model, setup, targets, inputs)
    costs = []
    for (variant, cost), (_, eight_bit_cost) in zip(budgets, eight_bit_budgets, strict=True):
        sent = wire_bytes(weights[variant.method], _exchange(variant, inputs))
        configuration_cost = ConfigurationCost(
            memory_bytes=cost.memory_bytes,
            eight_bit_bytes=eight_bit_cost.memory_bytes,
            sent_bytes=sent.wire_bytes,
        )
        costs.append((variant, configuration_cost))
    return costs


def _weights_by_method(
    model: nn.Module, setup: Setup, targets: Sequence[Target], inputs: PlanInputs
) -> dict[Method, CommunicatedWeights]:
    return {
        method: _weights(model, replace(setup, method=method), targets, inputs)
        for method in METHODS
    }


def _weights(
    model: nn.Module, setup: Setup, targets: Sequence[Target], inputs: PlanInputs
) -> CommunicatedWeights:
    persistent = inputs.launch.persistent_weights
    return communicated_weights(model, setup, targets, persistent_weights=persistent)


def _exchange(setup: Setup, inputs: PlanInputs) -> Exchange:
    """Return how the ranks of a setup share a step."""
    return Exchange(
        sharding=setup.sharding,
        processes=setup.processes,
        gradient_accumulation_steps=inputs.training.gradient_accumulation_steps,
        checkpointing=setup.checkpointing,
        reduces_to_owner=inputs.launch.reduces_to_owner,
        reuse_weights=inputs.launch.reuse_weights,
    )


def _other_passes(setup: Setup) -> Iterator[RecipeChange]:
    if not setup.checkpointing:
        changed = replace(setup, checkpointing=True)
        yield RecipeChange("training.gradient_checkpointing", True, changed)
    if setup.method == "lora":
        yield RecipeChange("base_model.quantization", "nf4", replace(setup, method="qlora"))


def _smaller_micro_batches(
    setup: Setup, inputs: PlanInputs, examples: Examples
) -> Iterator[RecipeChange]:
    doubled = 2 * inputs.training.gradient_accumulation_steps
    if inputs.processes * doubled <= inputs.training.batch_size:
        largest = examples.largest_micro_batch(inputs, doubled)
        changed = _with_micro_batch(setup, largest)
        yield RecipeChange("training.gradient_accumulation_steps", doubled, changed)
    halved = int(examples.lengths.max()) // 2
    if halved >= MIN_MAX_TOKENS:
        largest = examples.truncate(halved).largest_micro_batch(inputs)
        yield RecipeChange("data.max_tokens", halved, _with_micro_batch(setup, largest))


def _other_launches(setup: Setup, launch: LaunchFacts) -> Iterator[RecipeChange]:
    """Yield the launches that shard more; on a CPU, offloading frees no memory."""
    if setup.processes == 1:
        return
    current = SHARDINGS.index(setup.sharding)
    for name in SHARDINGS[current + 1 :]:
        if launch.device == "gpu" or name != "zero3_offload":
            config = f"{launch.device}_{name}"
            yield RecipeChange("launch.config", config, replace(setup, sharding=name))


def _with_micro_batch(setup: Setup, largest: LargestMicroBatch) -> Setup:
    logit_rows = min(setup.logit_rows, max(1, largest.supervised))
    return replace(setup, tokens=largest.tokens, logit_rows=logit_rows)
