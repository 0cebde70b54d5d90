"""PEFT is the outside reference: what one library saves, the other loads, and both compute the same logits."""

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
# PEFT 0.21 asks transformers 5.23 under a name that transformers renames in 6; nothing about the adapter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
# Both form x·W and s·B·A·x in float32 and differ in the order of a few roundings of 6e-8 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def in_peft(config: LoraConfig) -> PeftLoraConfig:
    """Return the same adapter in PEFT's words, with noise in B so that it moves the logits."""
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules
        if isinstance(config.target_modules, str)
        else list(config.target_modules),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=False,
    )


@pytest.fixture
def saved_by_us(
    build_llama: Build, randomise: Callable[[nn.Module], None], tmp_path: Path
) -> Callable[[LoraConfig], LlamaForCausalLM]:
    """Return a maker of adapted models that leaves their adapter in tmp_path / "ours"."""

    def make(config: LoraConfig) -> LlamaForCausalLM:
        model = build_llama()
        inject(model, config, seed=0)
        randomise(model)
        save_adapter(model, tmp_path / "ours", config, Identity())
        return model

    return make


@pytest.fixture
def saved_by_peft(build_llama: Build, tmp_path: Path) -> Callable[[PeftLoraConfig], PeftModel]:
    """Return a maker of PEFT models that leaves their adapter in tmp_path / "peft"."""

    def make(config: PeftLoraConfig) -> PeftModel:
        model = get_peft_model(build_llama(), config).eval()
        model.save_pretrained(tmp_path / "peft")
        return model

    return make


@each_config
def test_peft_loads_ours_with_the_same_logits_and_no_warning(
    build_llama: Build,
    saved_by_us: Callable[..., LlamaForCausalLM],
    logits: Logits,
    tmp_path: Path,
    config: LoraConfig,
) -> None:
    model = saved_by_us(config)
    theirs = PeftModel.from_pretrained(
        build_llama(), tmp_path / "ours"
    ).eval()  # a warning, as of a missing key, is an error here
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    assert (logits(model) - logits(build_llama())).abs().max() > 0.1


def test_peft_warns_of_a_key_that_it_misses(
    build_llama: Build, saved_by_us: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """Without this warning the silence above would say nothing."""
    saved_by_us(CONFIGS["list"])
    path = tmp_path / "ours" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(build_llama(), tmp_path / "ours")


@each_config
def test_we_load_theirs_with_the_same_logits(
    build_llama: Build,
    saved_by_peft: Callable[..., PeftModel],
    logits: Logits,
    tmp_path: Path,
    config: LoraConfig,
) -> None:
    theirs, model = saved_by_peft(in_peft(config)), build_llama()
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
    ours, theirs = (load_adapter(build_llama(), tmp_path / who) for who in ("ours", "peft"))
    assert ours == theirs


def test_a_regex_that_also_matches_blocks_still_loads_in_peft(
    build_llama: Build, saved_by_us: Callable[..., LlamaForCausalLM], logits: Logits, tmp_path: Path
) -> None:
    """We adapt the linear layers among the matches, PEFT refuses the rest: the file must name the layers alone."""
    model = saved_by_us(LoraConfig(r=4, lora_alpha=8, target_modules=r"model\.layers\.1\..*"))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(build_llama(), tmp_path / "ours").eval()),
        logits(model),
        **CLOSE,
    )


def test_all_linear_names_no_head_that_shares_its_last_name(
    randomise: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """The file spells `all-linear` in names; a name that the output head shares must not adapt the head."""

    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"proj": nn.Linear(8, 8)})
            self.head = nn.ModuleDict({"proj": nn.Linear(8, 8)})

        def get_output_embeddings(self) -> nn.Module:
            return self.head["proj"]

    model, config = TwoLayers(), LoraConfig(r=2, lora_alpha=4)
    assert [target.name for target in inject(model, config, seed=0)] == ["body.proj"]
    save_adapter(model, tmp_path / "ours", config, Identity())
    assert [
        target.name for target in load_adapter(TwoLayers(), tmp_path / "ours", check_base=False)
    ] == ["body.proj"]


def test_the_merged_weights_are_theirs(
    build_llama: Build, saved_by_us: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model = saved_by_us(CONFIGS["all-linear"])
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path / "ours").merge_and_unload()
    merge(model)
    assert list(model.state_dict()) == list(theirs.state_dict())
    for name, weight in model.state_dict().items():
        # One product of 4 terms and one sum, each rounded to float32.
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_gradients_are_theirs(
    build_llama: Build, saved_by_us: Callable[..., LlamaForCausalLM], tokens: Tensor, tmp_path: Path
) -> None:
    model = saved_by_us(CONFIGS["all-linear"])
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path / "ours", is_trainable=True)
    for each in (model, theirs):
        each.train()(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    reference = {
        name.removeprefix("base_model.model."): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {f"{name}.default.weight" for name in found} == reference.keys()
    for name, gradient in found.items():
        expected = reference[f"{name}.default.weight"]
        # Two layers forward and back in float32, relative to the largest entry of each gradient.
        torch.testing.assert_close(
            gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )


@pytest.mark.parametrize(
    "features",
    [
        {"use_qalora": True, "qalora_group_size": 16},
        {"layers_pattern": "layers", "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_features_of_theirs_that_we_lack_are_refused(
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


def test_their_adapter_of_a_changed_base_is_refused(
    build_llama: Build,
    saved_by_peft: Callable[..., PeftModel],
    refuses: Callable[..., None],
    tmp_path: Path,
) -> None:
    """PiSSA takes A and B out of the base weight: beside the unchanged base they would count twice."""
    saved_by_peft(
        PeftLoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa"
        )
    )
    model = build_llama()
    refuses(model, lambda: load_adapter(model, tmp_path / "peft"), AdapterError, "pissa")


def test_the_config_file_holds_no_field_that_peft_does_not_know(
    saved_by_us: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    saved_by_us(CONFIGS["list"])
    values = json.loads((tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8"))
    assert values.keys() <= set(PeftLoraConfig.__dataclass_fields__)
