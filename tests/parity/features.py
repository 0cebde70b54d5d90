"""One adapter in PEFT and here: each loads the other's files, and the gradients are compared.

Differences are the largest of any logit, as a fraction of the largest logit, and of any entry of a
gradient, as a fraction of that gradient's largest entry. PEFT's spectral initialization changes the
base, so such an adapter is saved as PEFT saves it for an unchanged base.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from parity.cases import Case
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lora_core import Identity, inject, load_adapter, save_adapter
from lora_core.adapter.io import tensors_of
from lora_core.modules import adapter_parts

NEGLIGIBLE = 1e-2
"""A gradient below this fraction of the largest is compared with the fraction itself.

It is zero except for rounding, such as that of a key's bias.
"""


def adapted(one: Case, folder: Path) -> nn.Module:
    """Return a model with our adapter, changed from its initialization, and save it in `folder`."""
    model = one.base()
    inject(model, one.config, seed=1)
    shake(trained(model))
    save_adapter(model, folder, one.config, Identity())
    return model


def effect(one: Case, folder: Path) -> float:
    """Return how much the adapter changes the logits: a load without effect differs by as much."""
    return parts_of_largest(_logits(one, one.base()), _logits(one, adapted(one, folder)))


def ours_in_peft(one: Case, folder: Path) -> float:
    """Return the difference after PEFT loads our file."""
    model = adapted(one, folder)
    theirs = PeftModel.from_pretrained(one.base(), folder).eval()
    return parts_of_largest(_logits(one, theirs), _logits(one, model))


def pefts_here(one: Case, folder: Path) -> float:
    """Return the difference after we load a file that PEFT created with the same settings."""
    theirs = get_peft_model(one.base(), one.in_peft).eval()
    options: dict[str, Any] = {}
    if one.is_spectral:
        theirs.save_pretrained(folder / "start")
        options = {"path_initial_model_for_weight_conversion": str(folder / "start")}
    shake(trained(theirs))
    expected = _logits(one, theirs)
    theirs.save_pretrained(folder, **options)
    model = one.base()
    load_adapter(model, folder)
    return parts_of_largest(_logits(one, model), expected)


def gradients(one: Case, folder: Path) -> float:
    """Return the largest difference of a gradient of the same loss; no case has dropout."""
    model = adapted(one, folder)
    theirs = get_peft_model(one.base(), one.in_peft).eval()
    theirs.load_adapter(folder, "default", is_trainable=True)
    for each in (model, theirs):
        (one.logits(each.train()) ** 2).mean().backward()
    found, expected = gradients_of(model), gradients_of(theirs)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    least = NEGLIGIBLE * max(float(gradient.abs().max()) for gradient in expected.values())
    return max(
        parts_of_largest(found[key], gradient.view_as(found[key]), least)
        for key, gradient in expected.items()
    )


@torch.no_grad()
def shake(parameters: Mapping[str, Tensor]) -> None:
    """Add noise to each trained tensor; the noise depends only on the name."""
    for key in sorted(parameters):
        generator = torch.Generator().manual_seed(sum(key.encode()))
        parameters[key].add_(0.1 * torch.randn(parameters[key].shape, generator=generator))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters under the keys of the file, for either library."""
    if not isinstance(model, PeftModel):
        return tensors_of(dict(adapter_parts(model)))
    return {_key_in_file(name): p for name, p in model.named_parameters() if p.requires_grad}


def _key_in_file(name: str) -> str:
    """Return the key under which PEFT saves one of its parameters."""
    plain = name.replace(".default", "").replace(".modules_to_save", "")
    return plain.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def parts_of_largest(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Return the largest difference as a fraction of the largest entry, or of `least` if larger."""
    difference = (found.detach() - expected.detach()).abs().max()
    return float(difference) / max(float(expected.detach().abs().max()), least)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the trained parameters, without the last part of a weight's key."""
    found = {
        key.removesuffix(".weight"): parameter.grad for key, parameter in trained(model).items()
    }
    missing = [key for key, gradient in found.items() if gradient is None]
    assert not missing, missing
    return {key: gradient.float() for key, gradient in found.items() if gradient is not None}


@torch.no_grad()
def _logits(one: Case, model: nn.Module) -> Tensor:
    return one.logits(model)
