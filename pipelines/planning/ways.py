"""Other ways to train the same: on more GPUs, and in less memory. What each needs, and what it sends."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from lora_core import Target
from lora_core.budget.budget import alternatives
from lora_core.budget.moved import moved
from lora_core.budget.setup import METHODS, Setup
from lora_core.budget.wire import SHARDINGS, Exchange, Traffic, wire_bytes
from pipelines.planning.examples import Examples

PROCESSES = tuple(2**power for power in range(10))
"""One to 512 GPUs."""
LEAST_TOKENS = 8
"""Of data.max_tokens."""


@dataclass(frozen=True)
class Engine:
    """How a launch's engine moves weights and gradients."""

    gradient_accumulation_steps: int
    persistent_weights: int
    reuse_weights: int
    reduces_to_owner: bool

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> "Engine":
        """Take it from a plan's inputs."""
        names = ("persistent_weights", "reuse_weights", "reduces_to_owner")
        return cls(
            inputs["training"]["gradient_accumulation_steps"],
            **{name: inputs[name] for name in names},
        )

    def exchange(self, setup: Setup) -> Exchange:
        """Return how the ranks of a setup share a step."""
        return Exchange(
            setup.sharding,
            setup.processes,
            self.gradient_accumulation_steps,
            setup.checkpointing,
            self.reduces_to_owner,
            self.reuse_weights,
        )


def traffic(model: nn.Module, setup: Setup, targets: Sequence[Target], engine: Engine) -> Traffic:
    """Return what each rank sends in a step."""
    return wire_bytes(
        moved(model, setup, targets, persistent_weights=engine.persistent_weights),
        engine.exchange(setup),
    )


def scaling(
    model: nn.Module, setup: Setup, targets: list[Target], engine: Engine
) -> list[dict[str, Any]]:
    """Return memory and traffic of each method under each sharding on 1 to 512 processes, with the same tokens on each.

    Args:
        model: without weights.
        setup: of the hardware in question.
        targets: the adapters'.
        engine: see `Engine`.
    """
    plain, smaller = (replace(setup, checkpointing=on) for on in (False, True))
    weights = {
        name: moved(
            model,
            replace(setup, method=name),
            targets,
            persistent_weights=engine.persistent_weights,
        )
        for name in METHODS
    }
    setups = (plain, _in_eight_bits(plain), smaller, _in_eight_bits(smaller))
    rows = zip(*(alternatives(model, one, targets, PROCESSES) for one in setups), strict=True)
    return [
        {
            "method": way.method,
            "sharding": way.sharding,
            "processes": way.processes,
            "memory_bytes": cost.memory_bytes,
            "eight_bit_bytes": eight_bit.memory_bytes,
            "checkpointed_bytes": less.memory_bytes,
            "checkpointed_eight_bit_bytes": least.memory_bytes,
            "sent_bytes": wire_bytes(weights[way.method], engine.exchange(way)).wire_bytes,
            "checkpointed_sent_bytes": wire_bytes(
                weights[way.method], engine.exchange(checkpointed)
            ).wire_bytes,
        }
        for (way, cost), (_, eight_bit), (checkpointed, less), (_, least) in rows
    ]


def _in_eight_bits(setup: Setup) -> Setup:
    return replace(setup, eight_bit_optimizer=True)


def exchanged(
    model: nn.Module, setup: Setup, targets: list[Target], engine: Engine
) -> dict[str, Any]:
    """Return what moves of each method's weights, and how, so that traffic on any number of processes follows without the model."""
    weights = {
        name: moved(
            model,
            replace(setup, method=name),
            targets,
            persistent_weights=engine.persistent_weights,
        )
        for name in METHODS
    }
    how = {
        name: value
        for name, value in asdict(engine.exchange(setup)).items()
        if name not in ("sharding", "processes")
    }
    return {"weights": {name: asdict(one) for name, one in weights.items()}, "exchange": how}


def in_less_memory(
    setup: Setup, inputs: dict[str, Any], examples: Examples, needed: Callable[[Setup], int]
) -> list[dict[str, Any]]:
    """Return the single changes of a recipe that need less memory than it does, the smallest first: setting, value and bytes.

    Args:
        setup: as the recipe has it.
        inputs: the plan's.
        examples: what it trains on.
        needed: memory of a setup in bytes.
    """
    tried = [
        *_other_passes(setup),
        *_smaller_shares(setup, inputs, examples),
        *_other_launches(setup, inputs["device"]),
    ]
    found = [
        {"setting": name, "value": value, "memory_bytes": needed(way)} for name, value, way in tried
    ]
    return sorted(
        (way for way in found if way["memory_bytes"] < needed(setup)),
        key=lambda way: int(way["memory_bytes"]),
    )


Change = tuple[str, Any, Setup]
"""A setting of the recipe, its value, and the setup that it makes."""


def _other_passes(setup: Setup) -> Iterator[Change]:
    if not setup.checkpointing:
        yield "training.gradient_checkpointing", True, replace(setup, checkpointing=True)
    if setup.method == "lora":
        yield "base_model.quantization", "nf4", replace(setup, method="qlora")


def _smaller_shares(setup: Setup, inputs: dict[str, Any], examples: Examples) -> Iterator[Change]:
    training, tokens = inputs["training"], max(examples.lengths) // 2
    parts = 2 * training["gradient_accumulation_steps"]
    if inputs["processes"] * parts <= training["batch_size"]:
        other = {**inputs, "training": {**training, "gradient_accumulation_steps": parts}}
        yield (
            "training.gradient_accumulation_steps",
            parts,
            _of_share(setup, examples.largest_share(other)),
        )
    if tokens >= LEAST_TOKENS:
        yield (
            "data.max_tokens",
            tokens,
            _of_share(setup, examples.cut(tokens).largest_share(inputs)),
        )


def _other_launches(setup: Setup, device: str) -> Iterator[Change]:
    """Yield the launches that share more; on a CPU, what is offloaded stays in the same memory."""
    names = SHARDINGS if device == "gpu" else SHARDINGS[: SHARDINGS.index("zero3") + 1]
    if setup.processes > 1:
        for name in names[SHARDINGS.index(setup.sharding) + 1 :]:
            yield "launch.config", f"{device}_{name}", replace(setup, sharding=name)


def _of_share(setup: Setup, share: dict[str, int]) -> Setup:
    return replace(
        setup, tokens=share["tokens"], logit_rows=min(setup.logit_rows, max(1, share["supervised"]))
    )
