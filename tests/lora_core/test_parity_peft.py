"""Parity with PEFT: each library loads what the other saves, and both compute the same logits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import AdapterError, Identity, LoraConfig, inject, load_adapter, merge, save_adapter

Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
REGEX = r".*layers\.1\.(self_attn\.[qv]|mlp\.up)_proj"
CONFIGS = {
    "list": LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj")),
    "suffix path": LoraConfig(
        r=4, lora_alpha=8, target_modules=("self_attn.q_proj", "model.layers.1.mlp.up_proj")
    ),
    "regex": LoraConfig(r=4, lora_alpha=8, target_modules=REGEX),
    "rslora": LoraConfig(r=4, lora_alpha=8, target_modules=("v_proj",), use_rslora=True),
    "all-linear": LoraConfig(r=4, lora_alpha=8),
    "gaussian": LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", lora_dropout=0.1),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
# PEFT 0.21 uses a name that transformers 6 renames; this does not concern the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
# Both compute x·W and s·B·A·x in float32; they differ by a few rounding errors of 6e-8 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def in_peft(config: LoraConfig) -> PeftLoraConfig:
    """Return the equivalent PEFT config, with random B so that the adapter changes the logits."""
    targets = config.target_modules
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=False,
    )


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def saved_by_us(
    build_llama: Build, randomize: Callable[[nn.Module], None], tmp_path: Path
) -> Callable[[LoraConfig], LlamaForCausalLM]:
    """Return a factory of adapted models that saves the adapter to tmp_path / "ours"."""

    def make(config: LoraConfig) -> LlamaForCausalLM:
        model = build_llama()
        inject(model, config, seed=0)
        randomize(model)
        save_adapter(model, tmp_path / "ours", config, Identity())
        return model

    return make


@pytest.fixture
def saved_by_peft(build_llama: Build, tmp_path: Path) -> Callable[[PeftLoraConfig], PeftModel]:
    """Return a factory of PEFT models that saves the adapter to tmp_path / "peft"."""

    def make(config: PeftLoraConfig) -> PeftModel:
        model = get_peft_model(build_llama(), config).eval()
        model.save_pretrained(tmp_path / "peft")
        return model

    return make


@each_config
def test_peft_loads_our_adapter_with_same_logits_and_no_warning(
    build_llama: Build,
    saved_by_us: Callable[..., LlamaForCausalLM],
    logits: Logits,
    tmp_path: Path,
    config: LoraConfig,
) -> None:
    model = saved_by_us(config)
    # A warning, for example about a missing key, is an error here.
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    assert (logits(model) - logits(build_llama())).abs().max() > 0.1


def test_peft_warns_about_missing_key(
    build_llama: Build, saved_by_us: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """Without this warning, the test above would prove nothing."""
    saved_by_us(CONFIGS["list"])
    path = tmp_path / "ours" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(build_llama(), tmp_path / "ours")


@each_config
def test_peft_adapter_loads_with_same_logits(
    build_llama: Build,
    saved_by_peft: Callable[..., PeftModel],
    logits: Logits,
    tmp_path: Path,
    config: LoraConfig,
) -> None:
    theirs = saved_by_peft(in_peft(config))
    model = build_llama()
    load_adapter(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    assert (logits(model) - logits(build_llama())).abs().max() > 0.1


@each_config
def test_both_adapt_the_same_modules(
    build_llama: Build,
    saved_by_peft: Callable[..., PeftModel],
    saved_by_us: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
    config: LoraConfig,
) -> None:
    saved_by_us(config)
    saved_by_peft(in_peft(config))
    ours = load_adapter(build_llama(), tmp_path / "ours")
    theirs = load_adapter(build_llama(), tmp_path / "peft")
    assert ours == theirs


def test_regex_that_also_matches_blocks_loads_in_peft(
    build_llama: Build, saved_by_us: Callable[..., LlamaForCausalLM], logits: Logits, tmp_path: Path
) -> None:
    """The file lists only the linear layers that match, because PEFT raises for other matches."""
    model = saved_by_us(LoraConfig(r=4, lora_alpha=8, target_modules=r"model\.layers\.1\..*"))
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


def test_all_linear_excludes_head_with_same_last_name(
    randomize: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """The file lists names for `all-linear`; none of them may match the head."""

    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"proj": nn.Linear(8, 8)})
            self.head = nn.ModuleDict({"proj": nn.Linear(8, 8)})

        def get_output_embeddings(self) -> nn.Module:
            return self.head["proj"]

    model = TwoLayers()
    config = LoraConfig(r=2, lora_alpha=4)
    injected = inject(model, config, seed=0)
    assert [target.name for target in injected] == ["body.proj"]
    save_adapter(model, tmp_path / "ours", config, Identity())
    loaded = load_adapter(TwoLayers(), tmp_path / "ours", check_base=False)
    assert [target.name for target in loaded] == ["body.proj"]


def test_merged_weights_match_peft(
    build_llama: Build, saved_by_us: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model = saved_by_us(CONFIGS["all-linear"])
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path / "ours").merge_and_unload()
    merge(model)
    assert list(model.state_dict()) == list(theirs.state_dict())
    for name, weight in model.state_dict().items():
        # One product of 4 terms and one sum, each rounded to float32.
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_gradients_match_peft(
    build_llama: Build, saved_by_us: Callable[..., LlamaForCausalLM], tokens: Tensor, tmp_path: Path
) -> None:
    model = saved_by_us(CONFIGS["all-linear"])
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path / "ours", is_trainable=True)
    for each in (model, theirs):
        each.train()(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    reference = {
        name.removeprefix("base_model.model."): gradient
        for name, gradient in gradients_of(theirs).items()
    }
    ours = gradients_of(model)
    assert {f"{name}.default.weight" for name in ours} == reference.keys()
    for name, gradient in ours.items():
        expected = reference[f"{name}.default.weight"]
        # Float32 through two layers, relative to the largest entry of each gradient.
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(
    "features",
    [{"use_qalora": True, "qalora_group_size": 16}],
    ids=str,
)
def test_unsupported_peft_feature_raises(
    build_llama: Build,
    saved_by_peft: Callable[..., PeftModel],
    refuses: Callable[..., None],
    tmp_path: Path,
    features: dict[str, object],
) -> None:
    saved_by_peft(PeftLoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **features))
    model = build_llama()
    refuses(
        model, lambda: load_adapter(model, tmp_path / "peft"), AdapterError, next(iter(features))
    )


def test_peft_adapter_of_changed_base_raises(
    build_llama: Build,
    saved_by_peft: Callable[..., PeftModel],
    refuses: Callable[..., None],
    tmp_path: Path,
) -> None:
    """PiSSA subtracts B·A from the base weight: on the unchanged base it would count twice."""
    saved_by_peft(
        PeftLoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa"
        )
    )
    model = build_llama()
    refuses(model, lambda: load_adapter(model, tmp_path / "peft"), AdapterError, "pissa")


def test_config_file_has_only_fields_that_peft_knows(
    saved_by_us: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    saved_by_us(CONFIGS["list"])
    values = json.loads((tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8"))
    assert values.keys() <= set(PeftLoraConfig.__dataclass_fields__)
