"""The parts of a decoder's blocks, identified by the shapes and names of their modules.

`block_parts.py` describes the kinds of parts and what each saves for the backward pass. For any
other module except norms, embeddings and routers, the shapes do not determine the memory:
`uncounted` names it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_core.base.quant import base_weight
from lora_core.budget.block_parts import (
    KERNELS,
    SMOOTH,
    Activation,
    BlockPart,
    ExpertsPart,
    LatentAttentionPart,
    LinearShape,
    Norm,
    PlainPart,
    Router,
)
from lora_core.layers.expert_layout import STACKS, supports
from lora_core.modules import output_head

ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
"""Attribute names of the activation function in Hugging Face models."""


def linear_shapes(model: nn.Module) -> Iterator[LinearShape]:
    """Yield the shape of every linear layer except the output head.

    Args:
        model: a decoder or a block, on the meta device or any other.
    """
    head = output_head(model)
    for parent in model.modules():
        yield from _linears(parent, head).values()


def parts(model: nn.Module) -> list[BlockPart]:
    """Return the parts of a model in order, without the output head.

    Args:
        model: a decoder or a block, on the meta device or any other.
    """
    head = output_head(model)
    found: list[BlockPart] = []
    for module in model.modules():
        found += _projections(module, head)
        found += _experts(module)
    return found


def norms(model: nn.Module) -> Iterator[Norm]:
    """Yield the norms of a model.

    A norm inside attention that is narrower than the input of the reader before it is as wide as
    one head and reads all heads.

    Args:
        model: a decoder or a block, on the meta device or any other.
    """
    for parent in model.modules():
        readers: list[LinearShape] = []
        if not hasattr(parent, "kv_b_proj"):
            linears = list(_linears(parent, None).values())
            readers = linears[:-1]
        norm_modules = filter(_is_norm, parent.children())
        for index, norm in enumerate(norm_modules):
            width = next(norm.parameters()).numel()
            if index < len(readers) and width < readers[index].in_features:
                width = readers[index].out_features
            is_one_kernel = isinstance(norm, nn.LayerNorm)
            yield Norm(width, upcast=not is_one_kernel)


def routers(model: nn.Module) -> Iterator[Router]:
    """Yield the routers that are not linear layers.

    Args:
        model: a decoder or a block, on the meta device or any other.
    """
    for parent in model.modules():
        if not _has_experts(parent):
            continue
        for child in parent.children():
            if _is_router(child) and isinstance(child.weight, Tensor):
                yield Router(*child.weight.shape)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks: the longest list of modules, empty if there is none.

    Args:
        model: a decoder, on the meta device or any other.
    """
    longest: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(longest):
            longest = list(module)
    return longest


def uncounted(model: nn.Module) -> tuple[str, ...]:
    """Return the names of module types whose activations shapes do not determine.

    No estimate includes what these modules save.

    Args:
        model: a decoder, on the meta device or any other.
    """
    routed: set[nn.Module] = set()
    for parent in model.modules():
        if _has_experts(parent):
            routed.update(parent.children())
    unknown = set()
    for module in model.modules():
        if not _is_known(module, routed=module in routed):
            unknown.add(type(module).__name__)
    return tuple(sorted(unknown))


def _projections(parent: nn.Module, head: nn.Module | None) -> Iterator[BlockPart]:
    """Yield the part that consists of the linear layers directly under `parent`, if any."""
    shapes = _linears(parent, head)
    if not shapes:
        return
    if "kv_b_proj" in shapes:
        yield _latent_attention(shapes)
        return
    *readers, writer = shapes.values()
    yield PlainPart(tuple(readers), writer, _activation(parent))


def _latent_attention(shapes: dict[str, LinearShape]) -> LatentAttentionPart:
    """Return the attention with these linear layers; its first reads the residual stream."""
    *readers, writer = shapes.values()
    inner = [shapes["kv_b_proj"]]
    query = shapes.get("q_b_proj")
    if query is None:
        query = shapes["q_proj"]
    else:
        inner.insert(0, query)
    return LatentAttentionPart(
        stream=readers[0].in_features,
        inner=tuple(inner),
        query=query.out_features,
        writer=writer,
    )


def _experts(parent: nn.Module) -> Iterator[ExpertsPart]:
    """Yield the parts whose stacks a child of `parent` holds."""
    chosen = _chosen(parent)
    if chosen is None:
        return
    for child in parent.children():
        config = getattr(child, "config", None)
        kernel = getattr(config, "_experts_implementation", "eager")
        if kernel not in KERNELS or not supports(child):
            continue
        down = getattr(child, STACKS[1])
        _, stream, inner = down.shape
        writer = LinearShape(stream, inner)
        yield ExpertsPart(chosen, writer, kernel, _activation(child))


def _has_experts(parent: nn.Module) -> bool:
    return next(_experts(parent), None) is not None


def _chosen(parent: nn.Module) -> int | None:
    """Return how many experts a token uses: `top_k` of the parent module or of its router."""
    for module in (parent, *parent.children()):
        top_k = getattr(module, "top_k", None)
        if isinstance(top_k, int):
            return top_k
    return None


def _linears(parent: nn.Module, head: nn.Module | None) -> dict[str, LinearShape]:
    """Return the linear layers directly under `parent`, by name, except the output head."""
    shapes = {}
    for name, child in parent.named_children():
        weight = None if child is head else base_weight(child)
        if weight is not None:
            shapes[name] = LinearShape(*weight.shape)
    return shapes


def _is_known(module: nn.Module, *, routed: bool) -> bool:
    """Return whether the shapes determine what a module saves, or it saves nothing itself."""
    if next(module.parameters(recurse=False), None) is None:
        # The width of a norm without a weight is unknown.
        return not type(module).__name__.endswith("Norm")
    if isinstance(module, nn.Embedding) or _is_norm(module):
        return True
    if base_weight(module) is not None:
        return True
    return routed and (supports(module) or _is_router(module))


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module has a weight, perhaps a bias, and both are vectors."""
    own = dict(module.named_parameters(recurse=False))
    return (
        "weight" in own
        and own.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in own.values())
    )


def _is_router(module: nn.Module) -> bool:
    """Return whether a module chooses experts with a matrix and is not a linear layer."""
    weight = module._parameters.get("weight")
    return (
        base_weight(module) is None
        and weight is not None
        and weight.dim() == 2
        and hasattr(module, "top_k")
    )


def _activation(parent: nn.Module) -> Activation:
    """Return what the activation function directly under `parent` saves."""
    for name in ACTIVATIONS:
        module = getattr(parent, name, None)
        if isinstance(module, nn.Module):
            has_parameters = next(module.parameters(), None) is not None
            return SMOOTH if has_parameters else _probe_activation(module)
    return SMOOTH


def _probe_activation(module: nn.Module) -> Activation:
    """Apply an activation function on the meta device and record what autograd saves."""
    x = torch.empty(1, device="meta", requires_grad=True)
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[_storage_id(tensor)] = tensor  # keeps the storage alive, so that its id stays unique
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, unpack):
        result = module(x)
    input_id = _storage_id(x)
    others = saved.keys() - {input_id, _storage_id(result)}
    return Activation(input=input_id in saved, others=len(others))


def _storage_id(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return int(storage._cdata)
