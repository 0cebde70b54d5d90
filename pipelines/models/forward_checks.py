"""Checks of the model's own forward, which serves as the reference.

It must run on text alone, give finite losses, hide the future from each token, and leave weights
unchanged that are not trained.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.errors import BaseModelError, one_line
from pipelines.models.forward import PackReader
from pipelines.models.measurement import Measurement, Probe, measure
from pipelines.models.tolerances import Tolerance
from pipelines.runtime.memory import is_out_of_memory

LEAK_TOKENS = 16
"""First tokens of an example on which the check for leaks of the future runs."""


def measure_reference(
    own: PackReader, probes: Sequence[Probe], tensors: Sequence[nn.Parameter], tolerance: Tolerance
) -> list[Measurement]:
    """Measure the probes with the model's own forward, and check that forward.

    Args:
        own: reads one example at a time, by eager attention, with the model's own logits.
        probes: packs of examples of the run.
        tensors: the trained parameters, whose gradients are measured.
        tolerance: what rounding explains.

    Raises:
        BaseModelError: the forward fails, gives a loss that is not finite, or reads the future.
    """
    family = own.model.config.model_type
    try:
        measurements = [measure(own, probe, tensors) for probe in probes]
        leak = _future_leak(own, probes)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BaseModelError(
            f"base model family {family!r} cannot read text by its own forward "
            f"({one_line(error, limit=160)}); check that transformers supports it without further "
            "inputs, or take another base"
        ) from error
    losses = chain.from_iterable(measurement.losses for measurement in measurements)
    if not all(map(math.isfinite, losses)):
        raise BaseModelError(
            f"base model family {family!r} gives a loss that is not finite on an example of this "
            "run by its own forward; check that the files of the base are complete, and that its "
            "weights are finite in the dtype that it is loaded in"
        )
    if leak > 10 * tolerance.loss:
        raise BaseModelError(
            f"base model family {family!r} is not a causal language model: a token's logits change "
            f"by {leak:.1e} with the tokens after it; take a decoder-only base such as Llama, Qwen "
            "or Mistral"
        )
    return measurements


@torch.no_grad()
def _future_leak(own: PackReader, probes: Sequence[Probe]) -> float:
    """Return how much the logits of the first tokens change if only the token after them changes.

    The check runs on the beginning of the shortest example.
    """
    examples = _examples_of_several_tokens(probes)
    if not examples:
        return 0.0
    ids = min(examples, key=len)[:LEAK_TOKENS]
    first = ids[0]
    last = ids[-1]
    other = ids.clone()
    # any other token that the vocabulary surely has
    other[-1] = first if first != last else last // 2
    pair = torch.stack([ids, other])
    logits = own.model(input_ids=pair).logits[:, :-1]
    before, after = logits.float().log_softmax(dim=2)
    return float((before - after).abs().max())


def _examples_of_several_tokens(probes: Sequence[Probe]) -> list[Tensor]:
    examples = []
    for probe in probes:
        for path in probe.pack.paths():
            if len(path.places) > 1:
                examples.append(probe.pack.input_ids[path.places])
    return examples


def is_random_in_training(model: PreTrainedModel) -> bool:
    """Return whether a forward in training mode is random: dropout, or noise in a router."""
    settings = [vars(model.config), vars(model.config.get_text_config())]
    settings += [vars(module) for module in model.modules()]
    values = []
    for one in settings:
        for name, value in one.items():
            if "drop" in name or "jitter" in name:
                values.append(value)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            values.append(module.p)
    return any(isinstance(value, float) and value > 0 for value in values)


@contextmanager
def frozen_weights_unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Refuse a model whose forward in training mode writes to weights that are not trained.

    Gemma 3n does: its clamps write to 4-bit codes.

    Raises:
        BaseModelError: the number of such weights, and the first one.
    """
    before = _frozen_checksums(model)
    try:
        yield
    finally:
        after = _frozen_checksums(model)
        changed = [name for name in before if not _is_same(before[name], after[name])]
        if changed:
            raise BaseModelError(
                f"base model family {model.config.model_type!r} changes {len(changed)} weights "
                f"that are not trained when it is read in training mode, among them {changed[0]}; "
                "set base_model.quantization to none, or take another base"
            )


def _frozen_checksums(model: PreTrainedModel) -> dict[str, float]:
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            found[name] = _checksum(parameter)
    return found


def _checksum(parameter: Tensor) -> float:
    values = parameter.detach()
    # summed in the wider dtype without a wider copy of the weights
    dtype = torch.float64 if values.is_floating_point() else torch.int64
    return float(values.sum(dtype=dtype))


def _is_same(before: float, after: float) -> bool:
    """Return whether two checksums are equal; weights that no token uses may be NaN in both."""
    return before == after or (math.isnan(before) and math.isnan(after))
