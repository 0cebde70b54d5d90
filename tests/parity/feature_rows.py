"""Every feature on each kind of model, in PEFT and here; test_features_peft.py asserts the same."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from parity.cases import CASES, Case
from parity.features import effect, gradients, ours_in_peft, pefts_here
from parity.rows import Row, at_least, at_most
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.optim import AdamW

from lora_core.training.optim import loraplus_groups

OF = "of the largest"
SEEN = 10
"""An adapter changes the logits by this multiple of the tolerance, so a lost one is detected."""


def feature_rows() -> Iterator[Row]:
    """Yield each case's differences in both directions and of the gradients, and the effect."""
    for name, one in CASES.items():
        logits = one.tolerance.logits
        if one.converts_in_peft:
            yield at_most(f"{name}: PEFT's file here", _measured(pefts_here, one), logits, OF)
        yield at_most(f"{name}: our file in PEFT", _measured(ours_in_peft, one), logits, OF)
        if not one.is_spectral:
            yield at_most(
                f"{name}: gradients", _measured(gradients, one), one.tolerance.gradients, OF
            )
        yield at_least(f"{name}: the adapter itself", _measured(effect, one), SEEN * logits, OF)


def optimizer_rows() -> Iterator[Row]:
    """Yield how many parameters get another learning rate or weight decay in LoRA+ than in PEFT."""
    for name in ("llama, all linear layers", "llama, embedding", "llama, modules_to_save"):
        yield at_most(
            f"{name}: parameters at another rate or decay",
            _parameters_set_otherwise(CASES[name]),
            0,
            "parameters",
        )


def _measured(measure: Callable[[Case, Path], float], one: Case) -> float:
    with TemporaryDirectory() as folder:
        return measure(one, Path(folder))


def _parameters_set_otherwise(one: Case) -> int:
    """Count the parameters whose learning rate or weight decay differs between PEFT and us."""
    model = get_peft_model(one.base(), one.in_peft)
    rates = {"loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3}
    expected = create_loraplus_optimizer(model, AdamW, lr=1e-3, **rates).param_groups
    ours = loraplus_groups(
        model.named_parameters(), learning_rate=1e-3, ratio=16.0, weight_decay=0.1
    )
    found = _settings(ours)
    reference = _settings(expected)
    return sum(found.get(key) != reference.get(key) for key in found.keys() | reference.keys())


def _settings(groups: list[Row]) -> dict[int, tuple[float, float]]:
    return {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
