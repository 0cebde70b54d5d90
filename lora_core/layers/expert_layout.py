"""Which modules hold experts that can be adapted, and the layout of their adapters in PEFT files.

    gate_up_proj (E, 2I, H), down_proj (E, H, I)        E experts, H hidden, I inner, R rank
    lora_A (E·R, in): the R rows of expert 0, then those of expert 1, …
    lora_B (out, R·E): the first column of every expert, then the second of every expert, …

The layout is that of transformers' experts interface. It is recognized by attributes alone:
transformers itself is not imported.
"""

from collections.abc import Collection, Mapping

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
"""Attributes that transformers' experts interface sets, with the values LoraExperts supports."""
EXPECTED = "experts need gate_up_proj (E, 2I, H) and down_proj (E, H, I), dense and without a bias"


def supports(module: nn.Module) -> bool:
    """Return whether `module` holds experts in the supported layout, without reading a weight."""
    return objection_to(module) is None


def adapter_shapes(base: nn.Module, ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the keys and shapes of an adapter of `base`, without reading a weight.

    The keys are PEFT's, without the module's path and its dot.

    Args:
        base: an experts module, on any device.
        ranks: the adapted stacks and their ranks.

    Raises:
        TargetError: `base` has another layout or lacks a named stack.
    """
    shapes = factor_shapes(base, ranks)
    result: dict[str, tuple[int, int]] = {}
    for name, keys in peft_keys(shapes).items():
        result |= zip(keys, shapes[name], strict=True)
    return result


def peft_keys(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return PEFT's keys of A and B for each stack, given in the module's order.

    PEFT wraps the module once per parameter: the wrapper of the last parameter is the outermost.
    """
    keys = {}
    depth = len(names)
    for name in names:
        depth -= 1
        prefix = "base_layer." * depth
        keys[name] = (f"{prefix}lora_A.weight", f"{prefix}lora_B.weight")
    return keys


def factor_shapes(
    base: nn.Module, ranks: Mapping[str, int]
) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Return the shapes of A and B for each adapted stack, in the module's order."""
    objection = objection_to(base)
    if objection is not None:
        raise TargetError(f"{type(base).__name__} cannot be adapted: {objection}; {EXPECTED}")
    if not ranks or not ranks.keys() <= set(STACKS):
        raise TargetError(
            f"{sorted(ranks)} are not stacks of {type(base).__name__}; "
            f"name one or both of {', '.join(STACKS)}"
        )
    shapes = {}
    for name, stack in base.named_parameters(recurse=False):
        if name in ranks:
            experts, outputs, inputs = stack.shape
            columns = experts * ranks[name]
            shapes[name] = ((columns, inputs), (outputs, columns))
    return shapes


def objection_to(module: nn.Module) -> str | None:
    """Return why `module` does not have the layout above, or None if it does."""
    stacks = dict(module.named_parameters(recurse=False))
    shapes = {name: tuple(stack.shape) for name, stack in stacks.items()}
    if shapes.keys() != set(STACKS):
        held = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        return f"it holds {held or 'no parameter directly'}"
    for flag, expected in LAYOUT.items():
        value = getattr(module, flag, expected)
        if value != expected:
            return f"its {flag} is {value}"
    if not callable(getattr(module, "_apply_gate", None)):
        return "it has no _apply_gate, so it does not follow transformers' experts interface"
    gate_up = shapes["gate_up_proj"]
    down = shapes["down_proj"]
    if not _fit(gate_up, down):
        return f"its gate_up_proj is {gate_up} and its down_proj {down}"
    for name, stack in stacks.items():
        if not _is_dense(stack):
            return f"its {name} is stored in {stack.dtype}"
    return None


def _fit(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1])


def _is_dense(stack: Tensor) -> bool:
    # 8-bit floats need scales that this module does not read
    return stack.is_floating_point() and stack.itemsize > 1
