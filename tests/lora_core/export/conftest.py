"""Fixtures for exports: an adapter saved by PEFT in several settings, and checks of every file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from lora_core.errors import LoraError

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "odd rank": {"r": 6},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 1, "v_proj": 24},
    },
    "patterns, rslora": {
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of PEFT's LoraConfig."""
    return request.param


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return tmp_path / "result"


@pytest.fixture
def peft_model(
    build_llama: Callable[..., LlamaForCausalLM], adapter: Path
) -> Callable[..., PeftModel]:
    """Return a function that adapts a model with PEFT and saves the adapter."""

    def make(**settings: Any) -> PeftModel:
        defaults = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False}
        config = PeftLoraConfig(task_type="CAUSAL_LM", **(defaults | settings))
        model = get_peft_model(build_llama(), config).eval()
        model.save_pretrained(adapter, save_embedding_layers=False)
        return model

    return make


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Return a check that an export raises and changes no file."""

    def check(action: Callable[[], object], error: type[LoraError], message: str) -> None:
        before = content_of(tmp_path)
        with pytest.raises(error, match=message):
            action()
        assert content_of(tmp_path) == before

    return check


@pytest.fixture
def llama_config(llama_folder: Path) -> Path:
    return llama_folder / "config.json"


@pytest.fixture
def files() -> Callable[[Path], dict[str, bytes]]:
    """Return a function from a folder to the content of every file in it."""
    return content_of


@pytest.fixture
def deltas() -> Callable[[PeftModel], dict[str, Tensor]]:
    """Return a function from a PEFT model to PEFT's own ΔW of each adapted module."""
    return deltas_of


def content_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below `folder`, including hidden ones."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def deltas_of(model: PeftModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            path = name.removeprefix("base_model.model.")
            found[path] = module.get_delta_weight("default").detach()
    return found
