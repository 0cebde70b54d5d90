"""Exports scored by PEFT agree with the recorded scores, a wrong export does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_core import Identity, LoraConfig, inject, load_adapter, save_adapter
from lora_core.modules import adapter_parts, replace_module
from pipelines.comparison.record_types import TaskRecord
from pipelines.config.data_section import DataSection
from pipelines.data.preparation import tokenize
from pipelines.evaluation.scoring import score_examples
from pipelines.evaluation.served import check_served, own_losses
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import Hardware
from pipelines.models.loading import load_model
from pipelines.runtime.interfaces.results import ServedCheck

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
CPU = Hardware("cpu", torch.float32, "gloo")
Check = Callable[..., ServedCheck]


@pytest.fixture
def bare(folder: Path) -> PreTrainedModel:
    return load_model(folder, "none", CPU)


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    rows = [
        {"prompt": f"Say red {number}.", "completion": "red red " * number}
        for number in range(1, 4)
    ]
    settings = DataSection(source="rows", max_tokens=200)
    return [vars(example) for example in tokenize(Dataset.from_list(rows), tokenizer, settings)]


def save(model: PreTrainedModel, folder: Path, **changes: Any) -> Path:
    """Write an adapter with two ranks and two scales, and take it out of the model."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ("q_proj", "down_proj"),
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"down_proj": 6},
        **changes,
    }
    config = LoraConfig(**settings)
    inject(model, config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    save_adapter(model, folder, config, Identity())
    remove(model)
    return folder


def remove(model: PreTrainedModel) -> None:
    for name, part in list(adapter_parts(model)):
        replace_module(model, name, part.base)  # type: ignore[arg-type]


@pytest.fixture
def check(bare: PreTrainedModel, examples: list[dict[str, Any]]) -> Check:
    """A function that scores an adapter, and then the exports of it or of another folder."""

    def run(adapter: Path, exported: Path | None = None) -> ServedCheck:
        load_adapter(bare, adapter)
        found = list(score_examples(CheckedReader(bare), examples))
        records = [record for record in found if isinstance(record, TaskRecord)]
        own = own_losses(bare, examples)
        remove(bare)
        return check_served(bare, exported or adapter, examples, records, own)

    return run


def test_exports_are_scored_like_the_adapter(
    bare: PreTrainedModel, check: Check, tmp_path: Path
) -> None:
    adapter = save(bare, tmp_path / "adapter")
    before = dict(bare.named_modules())
    ids = torch.arange(5)[None]
    with torch.no_grad():
        logits = bare(input_ids=ids).logits
    served = check(adapter)
    assert [one.name for one in served.formats] == ["peft", "vllm"]
    assert [one.reason for one in served.formats] == ["", ""]
    assert all(one.difference is not None and one.difference < 1e-5 for one in served.formats)
    assert served.is_equal
    assert 0 < served.noise_floor < 1e-5
    assert str(served).startswith("served = trained: PEFT ")
    assert {name: id(module) for name, module in bare.named_modules()} == {
        name: id(module) for name, module in before.items()
    }
    with torch.no_grad():
        assert torch.equal(bare(input_ids=ids).logits, logits)


def test_an_export_at_a_wrong_scale_is_found(
    bare: PreTrainedModel, check: Check, tmp_path: Path
) -> None:
    adapter = save(bare, tmp_path / "adapter")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in adapter.iterdir():
        (wrong / path.name).write_bytes(path.read_bytes())
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {}}))
    served = check(adapter, wrong)
    assert not served.is_equal
    assert str(served).startswith("served ≠ trained: ")


def test_what_vllm_cannot_serve_is_named(
    bare: PreTrainedModel, check: Check, tmp_path: Path
) -> None:
    served = check(save(bare, tmp_path / "adapter", use_dora=True))
    peft, vllm = served.formats
    assert peft.difference is not None
    assert vllm.difference is None
    assert "vLLM does not support DoRA" in vllm.reason
    assert served.is_equal


def test_a_folder_that_peft_cannot_read_is_reported(
    bare: PreTrainedModel, check: Check, tmp_path: Path
) -> None:
    served = check(save(bare, tmp_path / "adapter"), tmp_path / "absent")
    assert not served.is_equal
    assert all(one.reason for one in served.formats)
