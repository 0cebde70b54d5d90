"""A converted adapter updates a model as the original does, in PEFT and in other programs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.readers import gguf_updates
from peft import PeftModel
from peft_adapters import CONFIG, WEIGHTS, edit_adapter, save_peft_adapter, settings_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_core import (
    AdapterError,
    ConfigError,
    ExportError,
    LoraError,
    convert_adapter,
    verify_adapter,
)
from lora_core.export.conversion import ConversionOptions
from lora_core.spectrum.updates import read_updates

Logits = Callable[[torch.nn.Module], Tensor]
# PEFT 0.21 uses a name of transformers 5.23 that is deprecated; unrelated to the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def plain(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with patterns; only read."""
    folder = tmp_path_factory.mktemp("peft") / "plain"
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 1}}
    return save_peft_adapter(llama_folder, folder, use_rslora=True, **patterns)


@pytest.fixture(scope="module")
def dora(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DoRA; only read."""
    return save_peft_adapter(llama_folder, tmp_path_factory.mktemp("peft") / "dora", use_dora=True)


@pytest.fixture(scope="module")
def peft_logits(llama_folder: Path, logits: Logits) -> Callable[[Path], Tensor]:
    """Return a function from an adapter's folder to what PEFT computes with it."""

    def compute(folder: Path) -> Tensor:
        base = AutoModelForCausalLM.from_pretrained(llama_folder)
        return logits(PeftModel.from_pretrained(base, folder).eval())

    return compute


def close(found: Tensor, expected: Tensor) -> None:
    """Compare logits of two float32 evaluations of one function."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["peft", "vllm", "lora"])
def test_peft_computes_the_same_with_the_result(
    plain: Path, tmp_path: Path, peft_logits: Callable[[Path], Tensor], to: Any
) -> None:
    convert_adapter(plain, tmp_path / "result", to)
    close(peft_logits(tmp_path / "result"), peft_logits(plain))
    values = settings_of(tmp_path / "result")
    assert values["inference_mode"] is True
    if to == "vllm":
        assert (values["r"], values["lora_alpha"], values["rank_pattern"]) == (8, 8, {})
    if to == "lora":
        assert values["use_rslora"] is False


def test_the_gguf_has_every_update(plain: Path, llama_folder: Path, tmp_path: Path) -> None:
    options = ConversionOptions(base=llama_folder)
    found = convert_adapter(plain, tmp_path / "adapter.gguf", "gguf", options)
    assert found.changes == ("written for the architecture llama",)
    updates = gguf_updates(tmp_path / "adapter.gguf", heads=4, key_heads=2)
    for name, update in read_updates(plain).items():
        torch.testing.assert_close(updates[name], update.dense(), rtol=1e-5, atol=1e-6)


def write_old(source: Path, folder: Path, key: Callable[[str], str]) -> Path:
    """Write an adapter as an old PEFT did: a pickle, other keys, and settings of its time."""
    folder.mkdir()
    tensors = {key(name): tensor for name, tensor in load_file(source / WEIGHTS).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    values = {name: value for name, value in settings_of(source).items() if name in kept}
    values |= {"enable_lora": None, "merge_weights": False, "inference_mode": False}
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "key",
    [
        lambda name: name,
        lambda name: f"module.{name}".replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model.").replace(
            "self_attn", "_orig_mod.self_attn"
        ),
    ],
    ids=["present keys", "named in data parallel", "compiled, no prefix"],
)
def test_an_old_adapter_becomes_a_present_one(
    llama_folder: Path,
    tmp_path: Path,
    peft_logits: Callable[[Path], Tensor],
    key: Callable[[str], str],
) -> None:
    original = save_peft_adapter(llama_folder, tmp_path / "original")
    old = write_old(original, tmp_path / "old", key)
    found = convert_adapter(old, tmp_path / "result", "peft")
    assert found.changes[0] == "read from the pickle adapter_model.bin"
    assert "removed the obsolete setting merge_weights" in found.changes
    assert load_file(tmp_path / "result" / WEIGHTS).keys() == load_file(original / WEIGHTS).keys()
    close(peft_logits(tmp_path / "result"), peft_logits(original))
    assert not {"enable_lora", "merge_weights"} & settings_of(tmp_path / "result").keys()


def test_a_renamed_model_gets_the_adapter_under_its_new_paths(
    plain: Path, tmp_path: Path, build_llama: Callable[..., LlamaForCausalLM], logits: Logits
) -> None:
    """The new model holds the old one in an attribute, as a multimodal model does."""

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = build_llama()

        def forward(self, **inputs: Any) -> Any:
            return self.language(**inputs)

    options = ConversionOptions(renames={"model.layers": "language.model.layers"})
    convert_adapter(plain, tmp_path / "result", "peft", options)
    values = {**settings_of(tmp_path / "result"), "task_type": None}
    (tmp_path / "result" / CONFIG).write_text(json.dumps(values))  # the wrapper only has a forward
    wrapped = PeftModel.from_pretrained(Wrapped(), tmp_path / "result").eval()
    expected = PeftModel.from_pretrained(build_llama(), plain).eval()
    close(logits(wrapped), logits(expected))
    back = ConversionOptions(renames={"language.model": "model"})
    convert_adapter(tmp_path / "result", tmp_path / "back", "peft", back)
    assert load_file(tmp_path / "back" / WEIGHTS).keys() == load_file(plain / WEIGHTS).keys()


def test_dora_becomes_plain_lora_with_the_reported_error(
    dora: Path, llama_folder: Path, tmp_path: Path
) -> None:
    """The reference is PEFT's merged weight and NumPy's best approximation of its change."""
    options = ConversionOptions(base=llama_folder, rank=6)
    found = convert_adapter(dora, tmp_path / "result", "lora", options)
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    weights = {name: value.double().clone() for name, value in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, dora).merge_and_unload().state_dict()
    lost = total = 0.0
    for name, update in read_updates(tmp_path / "result").items():
        change = merged[f"{name}.weight"].double() - weights[f"{name}.weight"]
        values = torch.linalg.svdvals(change)
        assert update.rank == 6
        error = float((change - update.dense().double()).norm() / change.norm())
        best = float(values[6:].norm() / values.norm())
        # The sum W + s·B A is rounded to float32, about 1e-5 of the change.
        assert found.relative_errors[name] == pytest.approx(best, abs=1e-4)
        assert error == pytest.approx(best, abs=1e-4)
        lost += float(values[6:].square().sum())
        total += float(values.square().sum())
    assert found.relative_error == pytest.approx((lost / total) ** 0.5, abs=1e-4)
    assert settings_of(tmp_path / "result")["use_dora"] is False


def test_dora_of_full_rank_is_exact(
    dora: Path, llama_folder: Path, tmp_path: Path, peft_logits: Callable[[Path], Tensor]
) -> None:
    options = ConversionOptions(base=llama_folder, rank=64)
    found = convert_adapter(dora, tmp_path / "result", "lora", options)
    assert found.relative_error < 1e-6
    close(peft_logits(tmp_path / "result"), peft_logits(dora))


def test_dora_stays_dora_for_peft(
    dora: Path, tmp_path: Path, peft_logits: Callable[[Path], Tensor]
) -> None:
    convert_adapter(dora, tmp_path / "result", "peft")
    assert torch.equal(peft_logits(tmp_path / "result"), peft_logits(dora))


def test_a_lower_rank_is_a_truncation_with_its_error(plain: Path, tmp_path: Path) -> None:
    found = convert_adapter(plain, tmp_path / "result", "lora", ConversionOptions(rank=2))
    result = read_updates(tmp_path / "result")
    for name, update in read_updates(plain).items():
        change = update.dense()
        error = float((change - result[name].dense()).norm() / change.norm())
        assert found.relative_errors[name] == pytest.approx(error, abs=1e-5)
    assert found.relative_errors["model.layers.0.self_attn.q_proj"] == 0


def test_our_sidecar_is_kept_and_names_the_source(
    adapter_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    options = ConversionOptions(base=llama_folder, base_name="team/llama")
    convert_adapter(adapter_folder, tmp_path / "result", "peft", options)
    before = json.loads((adapter_folder / "adapter_identity.json").read_text())
    after = json.loads((tmp_path / "result" / "adapter_identity.json").read_text())
    assert after["lineage"]["converted_from"] == before["adapter_sha256"]
    assert after["base_digests"] == before["base_digests"]
    assert after["base"] == "team/llama"
    assert settings_of(tmp_path / "result")["base_model_name_or_path"] == "team/llama"
    verify_adapter(tmp_path / "result", llama_folder)


@dataclass(frozen=True)
class Refusal:
    """A conversion that is refused."""

    source: str
    to: Any
    options: ConversionOptions
    error: type[LoraError]
    message: str


COLLIDING = {"model.layers.0": "model.layers.1"}
REFUSED = {
    "DoRA to vllm": Refusal("dora", "vllm", ConversionOptions(), ExportError, "to lora first"),
    "DoRA to gguf": Refusal("dora", "gguf", ConversionOptions(), ExportError, "to lora first"),
    "no base": Refusal("dora", "lora", ConversionOptions(), ExportError, "name the base"),
    "no config": Refusal("plain", "gguf", ConversionOptions(), ExportError, "name the base"),
    "rank": Refusal("plain", "peft", ConversionOptions(rank=2), ExportError, "has no effect"),
    "rank 0": Refusal("plain", "lora", ConversionOptions(rank=0), ConfigError, "at least 1"),
    "format": Refusal("plain", "onnx", ConversionOptions(), ExportError, "is not a format"),
    "path": Refusal(
        "plain",
        "peft",
        ConversionOptions(renames={"transformer": "model"}),
        AdapterError,
        "begins with 'transformer'",
    ),
    "collision": Refusal(
        "plain", "peft", ConversionOptions(renames=COLLIDING), AdapterError, "two tensors"
    ),
}


@pytest.mark.parametrize("refusal", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_converted_is_refused_and_nothing_is_written(
    request: pytest.FixtureRequest, tmp_path: Path, refusal: Refusal
) -> None:
    source = request.getfixturevalue(refusal.source)
    with pytest.raises(refusal.error, match=refusal.message):
        convert_adapter(source, tmp_path / "result", refusal.to, refusal.options)
    assert list(tmp_path.iterdir()) == []


def test_fused_layers_of_old_versions_are_refused(plain: Path, tmp_path: Path) -> None:
    def fuse(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        values["enable_lora"] = [True, False, True]

    old = edit_adapter(plain, tmp_path / "old", fuse)
    with pytest.raises(AdapterError, match="sets enable_lora"):
        convert_adapter(old, tmp_path / "result", "peft")


def test_an_error_names_the_source(llama_folder: Path, tmp_path: Path) -> None:
    source = save_peft_adapter(llama_folder, tmp_path / "source", modules_to_save=["lm_head"])
    with pytest.raises(ExportError, match=f"^{source}/adapter_config.json sets modules_to_save"):
        convert_adapter(source, tmp_path / "result", "vllm")


def test_the_source_is_never_overwritten(plain: Path) -> None:
    with pytest.raises(ExportError, match="overlaps"):
        convert_adapter(plain, plain / "inside", "peft")
