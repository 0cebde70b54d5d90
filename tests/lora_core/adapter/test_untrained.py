"""A save reports updates that stayed zero while others were trained."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_core import AdapterError, Identity, LoraConfig, inject, load_adapter, save_adapter

CONFIG = LoraConfig(r=2, lora_alpha=2, target_modules=("used", "unused"))


class Model(nn.Module):
    """Does not call one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def step(model: nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()


def test_saving_names_a_layer_that_training_did_not_use(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    inject(model, CONFIG, seed=0)
    step(model)
    with pytest.warns(UserWarning, match=r"1 updates are zero, such as .*unused\.lora_B"):
        save_adapter(model, tmp_path, CONFIG, Identity())
    torch.manual_seed(0)
    base = Model()
    with pytest.raises(AdapterError, match="1 zero updates"):
        load_adapter(base, tmp_path)
    load_adapter(base, tmp_path, check_trained=False)
    x = torch.randn(3, 8)
    assert torch.equal(base(x), model(x))


def test_saving_a_new_adapter_does_not_warn(tmp_path: Path) -> None:
    model = Model()
    inject(model, CONFIG, seed=0)
    save_adapter(model, tmp_path, CONFIG, Identity())
