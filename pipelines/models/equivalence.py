"""Compare each reader of packs with the model's own forward, on examples of the run itself.

The reference is transformers' forward on one example alone, unpadded, with eager attention. The
readers, fastest first, read the same examples, and the first that agrees is used. The last reader
is the reference itself. A family that nobody has tried, a window, a recurrent state or custom code
therefore costs speed at worst and never gives a wrong number.

A model that is trained is read in training mode, as in a training step, unless its forward is
random in that mode. `measurement` defines the losses and gradients that are compared,
`forward_checks` the checks of the reference. Rounding alone makes both differ, by an amount that
depends on the dtype; see `tolerances`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.errors import BaseModelError, one_line
from pipelines.models.forward import PackReader
from pipelines.models.forward_checks import (
    frozen_weights_unchanged,
    is_random_in_training,
    measure_reference,
)
from pipelines.models.head import linear_head
from pipelines.models.measurement import (
    LARGEST_TENSOR,
    Difference,
    Measurement,
    Probe,
    compare,
    measure,
)
from pipelines.models.packs import pack
from pipelines.models.support import why_not_packed
from pipelines.models.tolerances import Tolerance, tolerance_of
from pipelines.runtime.interfaces.verified import Verified
from pipelines.runtime.memory import is_out_of_memory

MAX_TENSORS = 6
"""Trained tensors whose gradients are compared."""
NO_PARAMETERS: Mapping[str, nn.Parameter] = MappingProxyType({})
FIRST_LENGTHS = (6, 16, 4)
"""Tokens of the random examples on which a base is verified before there is any data."""


def verified_reader(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    *,
    trained: Mapping[str, nn.Parameter] = NO_PARAMETERS,
    dtype: torch.dtype | None = None,
) -> tuple[PackReader, Verified]:
    """Return the fastest reader that agrees with the model's own forward, and how well it agrees.

    Args:
        model: as it will be trained or scored, on its device; it is left unchanged.
        probes: packs of the run's own examples, the longest among them.
        trained: the trained parameters, by name; without any, no gradient is compared.
        dtype: of the computation, if autocast makes it different from the dtype of the weights.

    Raises:
        BaseModelError: the model's own forward fails, or reads a token's future.
    """
    started = time.perf_counter()
    tolerance = tolerance_of(dtype or model.dtype)
    in_training_mode = bool(trained) and not is_random_in_training(model)
    with evaluation_mode(model), _autocast(model, dtype):
        reference = _Reference.of(model, probes, trained, tolerance)
        model.train(in_training_mode)
        with frozen_weights_unchanged(model) if in_training_mode else nullcontext():
            found = _first_that_agrees(model, reference, tolerance)
    difference = found.attempt.difference
    return found.reader, Verified(
        path=found.reader.path,
        own_head=found.reader.head is None,
        examples=sum(len(probe.pack.paths()) for probe in probes),
        longest=max(probe.pack.longest for probe in probes),
        loss_difference=difference.loss,
        gradient_difference=difference.gradient if reference.compared else None,
        loss_tolerance=tolerance.loss,
        gradient_tolerance=tolerance.gradient,
        rejected=found.rejected,
        without_gradient=_without_gradient(list(trained), reference.measurements),
        seconds=round(time.perf_counter() - started, 3),
    )


@dataclass(frozen=True)
class _Attempt:
    """What one reader computes, and how far it is from the reference."""

    measurements: list[Measurement]
    difference: Difference


@dataclass(frozen=True)
class _Reference:
    """What the model's own forward computes in evaluation mode."""

    probes: Sequence[Probe]
    trained: Mapping[str, nn.Parameter]
    measurements: list[Measurement]
    compared: list[int]
    """Indices of the trained tensors whose gradients are compared."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        probes: Sequence[Probe],
        trained: Mapping[str, nn.Parameter],
        tolerance: Tolerance,
    ) -> "_Reference":
        """Measure the own forward, and check it; see `measure_reference`."""
        own = PackReader(model, packed=False, head=None)
        parameters = list(trained.values())
        measurements = measure_reference(own, probes, parameters, tolerance)
        return cls(probes, trained, measurements, _compared_tensors(parameters, measurements))

    def attempt(self, reader: PackReader) -> _Attempt:
        """Measure a reader and compare it with the reference."""
        parameters = list(self.trained.values())
        found = [measure(reader, probe, parameters) for probe in self.probes]
        expected = [one.select(self.compared) for one in self.measurements]
        compared = [one.select(self.compared) for one in found]
        return _Attempt(found, compare(expected, compared))

    def bypassed(self, attempt: _Attempt) -> list[str]:
        """Return the trained tensors that affect the loss here and not in an attempt.

        A parent module that reads the weight of a layer directly bypasses its adapter, as Gemma 3n
        does in training mode.
        """
        names = []
        for index, name in enumerate(self.trained):
            had_gradient = any(one.gradients[index] is not None for one in self.measurements)
            has_none = all(one.gradients[index] is None for one in attempt.measurements)
            if had_gradient and has_none:
                names.append(name)
        return names


@dataclass(frozen=True)
class _Agreement:
    """The first reader that agrees with the reference."""

    reader: PackReader
    attempt: _Attempt
    rejected: tuple[str, ...]
    """Why faster readers are not used."""


def _first_that_agrees(
    model: PreTrainedModel, reference: _Reference, tolerance: Tolerance
) -> _Agreement:
    """Return the fastest reader that agrees.

    Raises:
        BaseModelError: none agrees, not even the own forward in the mode that is compared, or a
            tensor is trained that this mode does not use.
    """
    family = model.config.model_type
    reason = why_not_packed(model)
    rejected = [] if reason is None else [f"not packed: {reason}"]
    for reader in _readers(model, packed=reason is None):
        try:
            attempt = reference.attempt(reader)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # a family's code may raise anything under inputs that it does not expect
            rejected.append(f"{_name(reader)} fails with {one_line(error, limit=160)}")
            continue
        difference = attempt.difference
        agrees = difference.is_within(tolerance)
        if agrees or not reader.packed:
            _refuse_bypassed(reference.bypassed(attempt), family)
        if agrees:
            return _Agreement(reader, attempt, tuple(rejected))
        rejected.append(
            f"{_name(reader)} differs by {difference.loss:.1e} nats per token, "
            f"gradients by {difference.gradient:.1e}"
        )
    raise BaseModelError(
        f"no way of reading base model family {family!r} agrees with its own forward in evaluation "
        f"mode ({'; '.join(rejected)}); it cannot be trained or scored reliably here; take another "
        "base"
    )


def _refuse_bypassed(tensors: Sequence[str], family: str) -> None:
    """Refuse trained tensors that the model uses when it is scored, but not in training mode."""
    if tensors:
        raise BaseModelError(
            f"base model family {family!r} does not use {len(tensors)} trained tensors in "
            f"training mode, among them {tensors[0]}, and uses them when it is scored; add "
            "the module's name to lora.exclude_modules"
        )


def combined(found: Sequence[Verified]) -> Verified:
    """Return the result of verifications of one reader on different examples."""
    gradients = [one.gradient_difference for one in found if one.gradient_difference is not None]
    rejected = list[str]()
    without_gradient = list[str]()
    for one in found:
        rejected += one.rejected
        without_gradient += one.without_gradient
    changes = {
        "examples": sum(one.examples for one in found),
        "longest": max(one.longest for one in found),
        "loss_difference": max(one.loss_difference for one in found),
        "gradient_difference": max(gradients, default=None),
        "rejected": tuple(dict.fromkeys(rejected)),
        "without_gradient": tuple(dict.fromkeys(without_gradient)),
        "seconds": max(one.seconds for one in found),
    }
    return found[0].model_copy(update=changes)


def first_look(model: PreTrainedModel) -> Verified:
    """Verify the reader on a few random tokens, before there is any data.

    Later stages verify it again on their data.

    Raises:
        BaseModelError: see `verified_reader`.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = ordinary_tokens(model)
    examples = []
    for length in FIRST_LENGTHS:
        drawn = torch.randint(len(vocabulary), (length,), generator=generator)
        supervised = [False] + [True] * (length - 1)
        examples.append({"input_ids": vocabulary[drawn].tolist(), "supervised": supervised})
    _, verified = verified_reader(model, [Probe(pack(examples, str(model.device)))])
    return verified


def ordinary_tokens(model: PreTrainedModel) -> Tensor:
    """Return the tokens without a special role in the config, such as padding or an image."""
    config = model.config
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    special = set()
    for name, value in values.items():
        if "token" in name and isinstance(value, int):
            special.add(value)
    vocabulary_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    return torch.tensor([token for token in range(vocabulary_size) if token not in special])


def _readers(model: PreTrainedModel, *, packed: bool) -> Iterator[PackReader]:
    """Yield the readers, fastest first; the last is the reference itself."""
    head = linear_head(model)
    for is_packed in (True, False) if packed else (False,):
        if head is not None:
            yield PackReader(model, is_packed, head)
        yield PackReader(model, is_packed, None)


def _compared_tensors(
    parameters: Sequence[nn.Parameter], reference: Sequence[Measurement]
) -> list[int]:
    """Return the indices of a few tensors, from first to last, with a gradient in the reference.

    A of an adapter has none while B is zero.
    """
    candidates = []
    for index, parameter in enumerate(parameters):
        gradients = [one.gradients[index] for one in reference]
        if parameter.numel() <= LARGEST_TENSOR and any(map(_is_nonzero, gradients)):
            candidates.append(index)
    if len(candidates) <= MAX_TENSORS:
        return candidates
    step = (len(candidates) - 1) / (MAX_TENSORS - 1)
    return [candidates[round(number * step)] for number in range(MAX_TENSORS)]


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _without_gradient(names: Sequence[str], reference: Sequence[Measurement]) -> tuple[str, ...]:
    """Name the trained tensors that affect no loss; empty if no gradient was measured."""
    if not any(one.has_gradients for one in reference):
        return ()
    found = []
    for index, name in enumerate(names):
        gradients = [one.gradients[index] for one in reference]
        if all(gradient is None for gradient in gradients):
            found.append(name)
    return tuple(found)


@contextmanager
def _autocast(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute in a dtype other than the weights', as training with float32 masters does."""
    is_needed = dtype not in (None, torch.float32, model.dtype)
    with torch.autocast(model.device.type, dtype=dtype, enabled=is_needed):
        yield


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Read without dropout inside a block, and restore the mode of the model afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _name(reader: PackReader) -> str:
    head = "its own logits" if reader.head is None else "the head in closed form"
    return f"{reader.path} with {head}"
