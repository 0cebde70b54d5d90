"""Hold the way in which a model is read against the model's own forward, on examples of the run itself.

The reference is transformers' forward on one example alone, unpadded, with eager attention. Each way of reading, the
fastest first, reads the same examples; the first that agrees is taken. The last way is the reference itself. So a family
that nobody has tried, a window, a recurrent state or custom code costs speed at worst, and never a wrong number.

What must agree:

    loss          mean negative log-likelihood of each example, nats a token
    gradient      of the summed loss, in a few trained tensors: ‖g − g*‖ / ‖g*‖

Rounding alone makes both differ, by an amount that depends on the dtype; see TOLERANCES.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.batches import Pack, pack
from pipelines.errors import BaseModelError
from pipelines.models.forward import PackReader
from pipelines.models.head import linear_head
from pipelines.models.support import why_not_packed

HEAD_ROWS = 128
TENSORS = 6
"""Trained tensors whose gradients are compared."""
FIRST_LENGTHS = (6, 16, 4)
"""Tokens of the examples on which a base is looked at before there is any data."""
LARGEST_TENSOR = 1 << 24
"""Elements of a tensor that may be one of them."""


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


@dataclass(frozen=True)
class Verified:
    """The way that was taken, and how well it agrees."""

    path: str
    """packed, or one by one."""
    own_head: bool
    """The model forms its own logits; else the head is a product in closed form."""
    examples: int
    """That were read both ways."""
    longest: int
    """Tokens of the longest of them."""
    loss_difference: float
    """Largest of any example, nats a token."""
    gradient_difference: float | None
    """Largest of any tensor, of its norm; None where no gradient was compared."""
    loss_tolerance: float
    gradient_tolerance: float
    rejected: tuple[str, ...] = ()
    """Why faster ways were not taken."""
    seconds: float = 0.0
    """That the verification took."""

    def figures(self) -> dict[str, Any]:
        """Return plain values for a stage's result."""
        return {**asdict(self), "rejected": list(self.rejected)}

    def __str__(self) -> str:
        return sentence(self.figures())


def sentence(figures: dict[str, Any]) -> str:
    """Return what a log, a report and a model card say of a verified way."""
    way = "packed path" if figures["path"] == "packed" else "path of one example at a time"
    many = f"{figures['examples']} example{'s' * (figures['examples'] != 1)} of up to {figures['longest']:,} tokens"
    gradient = figures["gradient_difference"]
    also = "" if gradient is None else f", gradients to {gradient:.0e} of their norm"
    text = f"{way} matches the model's own forward: {figures['loss_difference']:.0e} nats a token on {many}{also}"
    return text + "".join(f"; {reason}" for reason in figures["rejected"])


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
    tensors = _spread([one for one in trained.values() if one.numel() <= LARGEST_TENSOR])
    tolerance = TOLERANCES.get(dtype or model.dtype, IN_16_BITS)
    own = PackReader(model, packed=False, head=None)
    with _undisturbed(model), _computing_in(model, dtype):
        wanted = _reference(own, probes, tensors, tolerance)
        tensors, wanted = _with_gradient(tensors, wanted)
        rejected: list[str] = [] if (why := why_not_packed(model)) is None else [f"not packed: {why}"]
        for reader in _readers(model, packed=why is None):
            try:
                difference = _difference(wanted, [_measured(reader, probe, tensors) for probe in probes])
            except Exception as error:  # noqa: BLE001 - a family's own code may raise anything under inputs that it does not expect
                rejected.append(f"{_named(reader)} fails with {_one_line(error)}")
                continue
            if difference.loss <= tolerance.loss and difference.gradient <= tolerance.gradient:
                verified = _verified(reader, probes, difference, tolerance, compared=bool(tensors))
                return reader, replace(verified, rejected=tuple(rejected), seconds=round(time.perf_counter() - begun, 3))
            rejected.append(f"{_named(reader)} differs by {difference.loss:.1e} nats a token, gradients by {difference.gradient:.1e}")
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
    drawn = [words[torch.randint(len(words), (length,), generator=generator)].tolist() for length in FIRST_LENGTHS]
    examples = [{"input_ids": ids, "supervised": [False] + [True] * (len(ids) - 1)} for ids in drawn]
    return verified_reader(model, [Probe(pack(examples, str(model.device)))])[1]


def ordinary_tokens(model: PreTrainedModel) -> Tensor:
    """Return the tokens that the config gives no part to, such as that of padding or of an image."""
    config = model.config
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    special = {value for name, value in values.items() if "token" in name and isinstance(value, int)}
    words = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index, arg-type]
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


def _reference(own: PackReader, probes: Sequence[Probe], tensors: Sequence[nn.Parameter], tolerance: Tolerance) -> list[_Seen]:
    """Read the probes by the model's own forward, and see that it reads no token's future."""
    family = own.model.config.model_type
    try:
        seen = [_measured(own, probe, tensors) for probe in probes]
        leak = _future_seen(own, probes[0].pack)
    except Exception as error:
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
    """Read a probe one way."""
    with torch.no_grad():
        likelihoods, _ = reader.log_likelihoods(probe.pack, HEAD_ROWS)
    losses = [float(-likelihoods[path.rows].mean()) for path in probe.pack.paths()]
    if not (probe.gradient and tensors):
        return _Seen(losses, [None] * len(tensors))
    with torch.enable_grad():
        gradients = torch.autograd.grad(reader.loss(probe.pack), list(tensors), allow_unused=True)
    return _Seen(losses, [None if one is None else one.detach().float() for one in gradients])


@torch.no_grad()
def _future_seen(own: PackReader, pack: Pack) -> float:
    """Return by how much the logits of an example change when its last token is another."""
    ids = pack.input_ids[pack.paths()[0].places]
    other = ids.clone()
    other[-1] = ids[0] if ids[0] != ids[-1] else ids[len(ids) // 2]
    before, after = (own.model(input_ids=one[None]).logits[0, :-1].float().log_softmax(dim=1) for one in (ids, other))
    return float((before - after).abs().max())


@dataclass(frozen=True)
class _Difference:
    loss: float
    gradient: float


def _difference(wanted: Sequence[_Seen], found: Sequence[_Seen]) -> _Difference:
    """Return the largest differences; what is not finite differs by infinity."""
    losses = [abs(a - b) for one, other in zip(wanted, found, strict=True) for a, b in zip(one.losses, other.losses, strict=True)]
    gradients = [
        _relative(a, b) for one, other in zip(wanted, found, strict=True) for a, b in zip(one.gradients, other.gradients, strict=True)
    ]
    return _Difference(_largest(losses), _largest(gradients))


def _relative(wanted: Tensor | None, found: Tensor | None) -> float:
    if wanted is None or not bool(wanted.any()):
        return 0.0
    return float("inf") if found is None else float((found - wanted).norm() / wanted.norm())


def _largest(values: Sequence[float]) -> float:
    return max((value if value == value else float("inf") for value in values), default=0.0)


def _spread(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return a few parameters from the first to the last."""
    if len(parameters) <= 2 * TENSORS:
        return list(parameters)
    step = (len(parameters) - 1) / (2 * TENSORS - 1)
    return [parameters[round(place * step)] for place in range(2 * TENSORS)]


def _with_gradient(tensors: Sequence[nn.Parameter], seen: Sequence[_Seen]) -> tuple[list[nn.Parameter], list[_Seen]]:
    """Keep the tensors that the reference gives a gradient; A of an adapter has none while B is zero."""
    places = [
        place
        for place in range(len(tensors))
        if any((gradient := one.gradients[place]) is not None and bool(gradient.any()) for one in seen)
    ][:TENSORS]
    return [tensors[place] for place in places], [_Seen(one.losses, [one.gradients[place] for place in places]) for one in seen]


def _verified(reader: PackReader, probes: Sequence[Probe], difference: _Difference, tolerance: Tolerance, *, compared: bool) -> Verified:
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


@contextmanager
def _computing_in(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute in a dtype other than the weights', as training with float32 masters does."""
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype not in (None, torch.float32, model.dtype)):
        yield


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Read without dropout, and leave the model and the random state as they were."""
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
