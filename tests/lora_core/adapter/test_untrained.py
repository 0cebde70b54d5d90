"""A save reports updates that stayed zero while others were trained."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_core import AdapterError, Identity, LoraConfig, inject, load_adapter, save_adapter
from lora_core.adapter.json_files import IDENTITY

CONFIG = LoraConfig(r=2, lora_alpha=2, target_modules=("used", "unused"))


class Model(nn.Module):
    """Calls one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.table = nn.Embedding(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def step(model: nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()


def adapted(config: LoraConfig) -> Model:
    torch.manual_seed(0)
    model = Model()
    inject(model, config, seed=0)
    return model


def base() -> Model:
    torch.manual_seed(0)
    return Model()


def test_saving_names_a_layer_that_training_did_not_use(tmp_path: Path) -> None:
    model = adapted(CONFIG)
    step(model)
    with pytest.warns(UserWarning, match="1 updates are zero, of unused, and 1 are trained"):
        save_adapter(model, tmp_path, CONFIG, Identity())
    loaded = base()
    load_adapter(loaded, tmp_path)  # reported when it was saved
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))


def test_zero_update_that_no_save_reported_is_refused(tmp_path: Path) -> None:
    model = adapted(CONFIG)
    step(model)
    with pytest.warns(UserWarning, match="1 updates are zero"):
        save_adapter(model, tmp_path, CONFIG, Identity())
    (tmp_path / IDENTITY).unlink()
    with pytest.raises(AdapterError, match="1 zero updates"):
        load_adapter(base(), tmp_path)
    load_adapter(base(), tmp_path, check_trained=False)


def test_saving_names_an_embedding_that_training_did_not_use(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=("used", "table"))
    model = adapted(config)
    step(model)
    with pytest.warns(UserWarning, match="1 updates are zero, of table, and 1 are trained"):
        save_adapter(model, tmp_path, config, Identity())
    load_adapter(base(), tmp_path)


def test_saving_a_new_adapter_does_not_warn(tmp_path: Path) -> None:
    save_adapter(adapted(CONFIG), tmp_path, CONFIG, Identity())
    load_adapter(base(), tmp_path)
