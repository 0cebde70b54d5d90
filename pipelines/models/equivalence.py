"""Compare the path by which a model is read with the model's own forward, on examples of the run itself.

The reference is transformers' forward on one example alone, unpadded, with eager attention. Each path, the fastest first,
reads the same examples, and the first that agrees is used. The last path is the reference itself. A family that nobody has
tried, a window, a recurrent state or custom code therefore costs speed at worst and never gives a wrong number.

What is trained is read in training mode, as a step will be, where nothing in that is random. What must agree:

    loss          mean negative log-likelihood of each example, nats per token
    gradient      of the summed loss, in a few trained tensors: ‖g − g*‖ / ‖g*‖; there the mean loss of the whole pack is compared

Rounding alone makes both differ, by an amount that depends on the dtype; see TOLERANCES.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.errors import BaseModelError
from pipelines.models.forward import PackReader
from pipelines.models.head import linear_head
from pipelines.models.packs import Pack, pack
from pipelines.models.support import why_not_packed
from pipelines.models.verified import Verified
from pipelines.runtime.memory import is_out_of_memory

HEAD_ROWS = 128
TENSORS = 6
"""Trained tensors whose gradients are compared."""
OPENING = 16
"""Tokens of an example on which it is seen that none reads its future."""
FIRST_LENGTHS = (6, 16, 4)
"""Tokens of the examples on which a base is looked at before there is any data."""
SMALL_TENSOR, LARGEST_TENSOR, LARGEST_TOTAL = 1 << 20, 1 << 24, 1 << 26
"""Elements of a gradient that is always kept for that, of one that may be, and of all that are."""


@dataclass(frozen=True)
class Tolerance:
    """How far two ways of computing the same may differ by rounding."""

    loss: float
    """Nats a token."""
    gradient: float
    """Of the gradient's norm."""


TOLERANCES = {torch.float32: Tolerance(1e-4, 1e-3)}
IN_16_BITS = Tolerance(2e-2, 1e-1)


@dataclass(frozen=True)
class Probe:
    """A pack that both ways read."""

    pack: Pack
    gradient: bool = False
    """Compare the gradient of its loss as well."""


def verified_reader(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    *,
    trained: Mapping[str, nn.Parameter] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PackReader, Verified]:
    """Return the fastest way of reading packs that agrees with the model's own forward, and how well it does.

    Args:
        model: as it will be trained or scored, on its device; left as it is.
        probes: packs of the run's own examples, the longest among them.
        trained: what is trained, by name; without any no gradient is compared.
        dtype: of the computation, where autocast makes it another than the weights'.

    Raises:
        BaseModelError: the model's own forward fails, or reads a token's future.
    """
    begun = time.perf_counter()
    trained = trained or {}
    tolerance = TOLERANCES.get(dtype or model.dtype, IN_16_BITS)
    as_trained = bool(trained) and not _is_random_in_training(model)
    with _undisturbed(model), _computing_in(model, dtype):
        every = _reference(
            PackReader(model, packed=False, head=None), probes, list(trained.values()), tolerance
        )
        tensors, wanted = _compared(list(trained.values()), every)
        model.train(as_trained)
        with _frozen_weights_unchanged(model) if as_trained else nullcontext():
            reader, difference, rejected = _first_that_agrees(
                model,
                tolerance,
                lambda one: _difference(
                    wanted, [_measured(one, probe, tensors) for probe in probes]
                ),
            )
    verified = _verified(reader, probes, difference, tolerance, compared=bool(tensors))
    return reader, replace(
        verified,
        rejected=rejected,
        without_gradient=_without_gradient(list(trained), every),
        seconds=round(time.perf_counter() - begun, 3),
    )


def _first_that_agrees(
    model: PreTrainedModel, tolerance: Tolerance, compare: "Callable[[PackReader], _Difference]"
) -> "tuple[PackReader, _Difference, tuple[str, ...]]":
    """Return the first way of reading that agrees with the reference, how well it does, and why those before it were not taken."""
    why = why_not_packed(model)
    rejected = [] if why is None else [f"not packed: {why}"]
    for reader in _readers(model, packed=why is None):
        try:
            difference = compare(reader)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # a family's own code may raise anything under inputs that it does not expect
            rejected.append(f"{_named(reader)} fails with {_one_line(error)}")
            continue
        if difference.loss <= tolerance.loss and difference.gradient <= tolerance.gradient:
            return reader, difference, tuple(rejected)
        rejected.append(
            f"{_named(reader)} differs by {difference.loss:.1e} nats a token, gradients by {difference.gradient:.1e}"
        )
    raise BaseModelError(
        f"base model family {model.config.model_type!r} gives different losses when it reads the same example twice "
        f"({'; '.join(rejected)}); it cannot be trained or scored reliably here; take another base"
    )


def first_look(model: PreTrainedModel) -> Verified:
    """Verify the way of reading on a few tokens drawn at random, before there is any data; later stages do so on their own.

    Raises:
        BaseModelError: see `verified_reader`.
    """
    generator = torch.Generator().manual_seed(0)
    words = ordinary_tokens(model)
    drawn = [
        words[torch.randint(len(words), (length,), generator=generator)].tolist()
        for length in FIRST_LENGTHS
    ]
    examples = [
        {"input_ids": ids, "supervised": [False] + [True] * (len(ids) - 1)} for ids in drawn
    ]
    return verified_reader(model, [Probe(pack(examples, str(model.device)))])[1]


def ordinary_tokens(model: PreTrainedModel) -> Tensor:
    """Return the tokens that the config gives no part to, such as that of padding or of an image."""
    config = model.config
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    special = {
        value for name, value in values.items() if "token" in name and isinstance(value, int)
    }
    words = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    return torch.tensor([token for token in range(words) if token not in special])


def _readers(model: PreTrainedModel, *, packed: bool) -> Iterator[PackReader]:
    """Yield the ways of reading, the fastest first; the last is the reference itself."""
    head = linear_head(model)
    for is_packed in (True, False) if packed else (False,):
        if head is not None:
            yield PackReader(model, is_packed, head)
        yield PackReader(model, is_packed, None)


@dataclass(frozen=True)
class _Seen:
    """What one way makes of a probe."""

    losses: list[float]
    """Mean negative log-likelihood of each example."""
    gradients: list[Tensor | None]
    has_gradients: bool = False


def _reference(
    own: PackReader, probes: Sequence[Probe], tensors: Sequence[nn.Parameter], tolerance: Tolerance
) -> list[_Seen]:
    """Read the probes by the model's own forward, and see that it reads no token's future."""
    family = own.model.config.model_type
    try:
        seen = [_measured(own, probe, tensors) for probe in probes]
        leak = _future_seen(own, probes)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BaseModelError(
            f"base model family {family!r} cannot read text by its own forward ({_one_line(error)}); see that transformers "
            "supports it without further inputs, or take another base"
        ) from error
    if not all(math.isfinite(loss) for one in seen for loss in one.losses):
        raise BaseModelError(
            f"base model family {family!r} gives a loss that is not finite on an example of this run by its own forward; see that the "
            "files of the base are whole, and that its weights are finite in the dtype that it is loaded in"
        )
    if leak > 10 * tolerance.loss:
        raise BaseModelError(
            f"base model family {family!r} is no causal language model: a token's logits change by {leak:.1e} with the tokens after it; "
            "take a decoder-only base such as Llama, Qwen or Mistral"
        )
    return seen


def _measured(reader: PackReader, probe: Probe, tensors: Sequence[nn.Parameter]) -> _Seen:
    """Read a probe one way, in one pass."""
    if probe.gradient and tensors:
        loss, gradients = _loss_and_gradients(reader, probe.pack, tensors)
        return _Seen([loss], gradients, has_gradients=True)
    with torch.no_grad():
        likelihoods, _ = reader.log_likelihoods(probe.pack, HEAD_ROWS)
    losses = [float(-likelihoods[path.rows].mean()) for path in probe.pack.paths()]
    return _Seen(losses, [None] * len(tensors))


def _loss_and_gradients(
    reader: PackReader, pack: Pack, tensors: Sequence[nn.Parameter]
) -> tuple[float, list[Tensor | None]]:
    """Return the mean loss of a pack and its gradients: None where a tensor took no part, empty where it is not worth its memory.

    Each gradient is taken as soon as it is there, so that those of a whole model never exist together.
    """
    found: list[Tensor | None] = [None] * len(tensors)
    room = [LARGEST_TOTAL]

    def taken(place: int, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None, "the hook is called once there is one"
        room[0] -= gradient.numel()
        is_kept = gradient.numel() <= SMALL_TENSOR or (
            gradient.numel() <= LARGEST_TENSOR and room[0] > 0
        )
        found[place] = gradient if is_kept else gradient.new_empty(0)

    hooks = [
        tensor.register_post_accumulate_grad_hook(partial(taken, place))
        for place, tensor in enumerate(tensors)
    ]
    try:
        with torch.enable_grad():
            loss = reader.loss(pack)
            torch.autograd.backward(loss, inputs=list(tensors))
    finally:
        for hook in hooks:
            hook.remove()
        for tensor in tensors:
            tensor.grad = None
    return float(loss.detach()) / len(pack.predicts), found


@torch.no_grad()
def _future_seen(own: PackReader, probes: Sequence[Probe]) -> float:
    """Return by how much the logits of the first tokens of the shortest example change when the last of them is another."""
    examples = [
        probe.pack.input_ids[path.places]
        for probe in probes
        for path in probe.pack.paths()
        if len(path.places) > 1
    ]
    if not examples:
        return 0.0
    ids = min(examples, key=len)[:OPENING]
    other = ids.clone()
    other[-1] = (
        ids[0] if ids[0] != ids[-1] else ids[-1] // 2
    )  # any other token that the vocabulary surely has
    before, after = (
        own.model(input_ids=torch.stack([ids, other])).logits[:, :-1].float().log_softmax(dim=2)
    )
    return float((before - after).abs().max())


@dataclass(frozen=True)
class _Difference:
    loss: float
    gradient: float


def _difference(wanted: Sequence[_Seen], found: Sequence[_Seen]) -> _Difference:
    """Return the largest differences; what is not finite differs by infinity."""
    losses = [
        abs(a - b)
        for one, other in zip(wanted, found, strict=True)
        for a, b in zip(one.losses, other.losses, strict=True)
    ]
    gradients = [
        _relative(a, b)
        for one, other in zip(wanted, found, strict=True)
        for a, b in zip(one.gradients, other.gradients, strict=True)
    ]
    return _Difference(_largest(losses), _largest(gradients))


def _relative(wanted: Tensor | None, found: Tensor | None) -> float:
    if wanted is None or not bool(wanted.any()):
        return 0.0
    return (
        float("inf")
        if found is None
        else float((found.float() - wanted.float()).norm() / wanted.float().norm())
    )


def _largest(values: Sequence[float]) -> float:
    return max((value if value == value else float("inf") for value in values), default=0.0)


def _compared(
    parameters: Sequence[nn.Parameter], seen: Sequence[_Seen]
) -> tuple[list[nn.Parameter], list[_Seen]]:
    """Choose a few tensors, from the first to the last, that the reference gives a gradient; A of an adapter has none while B is zero."""
    able = [
        place
        for place, parameter in enumerate(parameters)
        if parameter.numel() <= LARGEST_TENSOR
        and any(_is_moved(one.gradients[place]) for one in seen)
    ]
    step = (len(able) - 1) / (TENSORS - 1)
    places = (
        able if len(able) <= TENSORS else [able[round(number * step)] for number in range(TENSORS)]
    )
    return [parameters[place] for place in places], [
        _Seen(one.losses, [one.gradients[place] for place in places]) for one in seen
    ]


def _is_moved(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _without_gradient(names: Sequence[str], seen: Sequence[_Seen]) -> tuple[str, ...]:
    """Name what is trained and took no part in the loss of any example; nothing where no gradient was asked for."""
    if not any(one.has_gradients for one in seen):
        return ()
    return tuple(
        name
        for place, name in enumerate(names)
        if all(one.gradients[place] is None for one in seen)
    )


def _verified(
    reader: PackReader,
    probes: Sequence[Probe],
    difference: _Difference,
    tolerance: Tolerance,
    *,
    compared: bool,
) -> Verified:
    return Verified(
        path=reader.path,
        own_head=reader.head is None,
        examples=sum(len(probe.pack.paths()) for probe in probes),
        longest=max(probe.pack.longest for probe in probes),
        loss_difference=difference.loss,
        gradient_difference=difference.gradient if compared else None,
        loss_tolerance=tolerance.loss,
        gradient_tolerance=tolerance.gradient,
    )


def _is_random_in_training(model: PreTrainedModel) -> bool:
    """Return whether a forward in training mode draws anything: dropout, or noise in a router."""
    settings = [
        vars(model.config),
        vars(model.config.get_text_config()),
        *(vars(module) for module in model.modules()),
    ]
    named = [
        value
        for one in settings
        for name, value in one.items()
        if "drop" in name or "jitter" in name
    ]
    layers = [
        module.p for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)
    ]
    return any(isinstance(value, float) and value > 0 for value in [*named, *layers])


@contextmanager
def _frozen_weights_unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Refuse a model whose forward in training mode writes to weights that are not trained, as Gemma 3n's clamps do to 4-bit codes.

    Raises:
        BaseModelError: the first such weight.
    """
    frozen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    before = {name: _checksum(parameter) for name, parameter in frozen.items()}
    try:
        yield
    finally:
        changed = [
            name for name, parameter in frozen.items() if _checksum(parameter) != before[name]
        ]
        if changed:
            raise BaseModelError(
                f"base model family {model.config.model_type!r} changes {len(changed)} weights that are not trained when it is read in "
                f"training mode, among them {changed[0]}; set base_model.quantization to none, or take another base"
            )


def _checksum(parameter: Tensor) -> float:
    total = (
        parameter.detach().double().sum()
        if parameter.is_floating_point()
        else parameter.detach().sum(dtype=torch.int64)
    )
    return float(total)


@contextmanager
def _computing_in(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute in a dtype other than the weights', as training with float32 masters does."""
    with torch.autocast(
        model.device.type, dtype=dtype, enabled=dtype not in (None, torch.float32, model.dtype)
    ):
        yield


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Read without dropout, and leave the model in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _named(reader: PackReader) -> str:
    return f"{reader.path} with {'the head in closed form' if reader.head is not None else 'its own logits'}"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
