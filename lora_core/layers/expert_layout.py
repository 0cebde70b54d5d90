"""Which modules hold experts that can be adapted, and what their adapters look like in PEFT's files.

    gate_up_proj (E, 2I, H), down_proj (E, H, I)        E experts, H hidden, I inner, R rank
    lora_A (E·R, in): the R rows of expert 0, then those of expert 1, …
    lora_B (out, R·E): the first column of every expert, then the second of every expert, …

The layout is that of transformers' experts interface, told by attributes alone: transformers itself is not imported.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lora_core.errors import TargetError

STACKS = ("gate_up_proj", "down_proj")
"""The weights of an experts module."""
LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}
"""What transformers' experts interface notes on a module, and the values under which it computes what LoraExperts does."""
EXPECTED = "experts need gate_up_proj (E, 2I, H) and down_proj (E, H, I), dense and without a bias"


def supports(module: nn.Module) -> bool:
    """Tell whether `module` holds experts in the layout that LoraExperts adapts; no weight is read."""
    return objection_to(module) is None


def adapter_shapes(base: nn.Module, ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return PEFT's keys, less the module's path and its dot, and the shapes of an adapter of `base`; no weight is read.

    Args:
        base: an experts module, on any device.
        ranks: the adapted stacks and their ranks.

    Raises:
        TargetError: `base` has another layout, or no stack of such a name.
    """
    shapes = factor_shapes(base, ranks)
    return {
        key: shape
        for name, pair in peft_keys(shapes).items()
        for key, shape in zip(pair, shapes[name], strict=True)
    }


def peft_keys(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return PEFT's keys of A and B for each stack, given in the module's order.

    PEFT wraps the module once for each of its parameters: the last one's wrapper is the outermost.
    """
    depths = {name: "base_layer." * depth for depth, name in enumerate(reversed(list(names)))}
    return {
        name: (f"{prefix}lora_A.weight", f"{prefix}lora_B.weight")
        for name, prefix in reversed(depths.items())
    }


def factor_shapes(
    base: nn.Module, ranks: Mapping[str, int]
) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Return the shapes of A and B for each adapted stack, in the module's order."""
    objection = objection_to(base)
    if objection is not None:
        raise TargetError(f"{type(base).__name__} cannot be adapted: {objection}; {EXPECTED}")
    if not ranks or not ranks.keys() <= set(STACKS):
        raise TargetError(
            f"{sorted(ranks)} are not stacks of {type(base).__name__}; name one or both of {', '.join(STACKS)}"
        )
    stacks = {
        name: stack.shape for name, stack in base.named_parameters(recurse=False) if name in ranks
    }
    return {
        name: ((e * ranks[name], inputs), (outputs, e * ranks[name]))
        for name, (e, outputs, inputs) in stacks.items()
    }


def objection_to(module: nn.Module) -> str | None:
    """Say what keeps `module` from being experts of the layout above; None where nothing does."""
    stacks = dict(module.named_parameters(recurse=False))
    shapes = {name: tuple(stack.shape) for name, stack in stacks.items()}
    if shapes.keys() != set(STACKS):
        return "it holds " + (
            ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            or "no parameter of its own"
        )
    for flag, expected in LAYOUT.items():
        if getattr(module, flag, expected) != expected:
            return f"its {flag} is {getattr(module, flag)}"
    if not callable(getattr(module, "_apply_gate", None)):
        return "it has no _apply_gate, so it does not follow transformers' experts interface"
    if not _fit(shapes["gate_up_proj"], shapes["down_proj"]):
        return (
            f"its gate_up_proj is {shapes['gate_up_proj']} and its down_proj {shapes['down_proj']}"
        )
    return next(
        (
            f"its {name} is stored in {stack.dtype}"
            for name, stack in stacks.items()
            if not _is_dense(stack)
        ),
        None,
    )


def _fit(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1])


def _is_dense(stack: Tensor) -> bool:
    return (
        stack.is_floating_point() and stack.itemsize > 1
    )  # 8-bit floats come with scales that are not seen here
