"""Every feature against PEFT, on four kinds of model, both ways: same files, same logits, same gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from lora_core import Identity, LoraConfig, fingerprint, inject, load_adapter, merge, save_adapter, unmerge
from lora_core.adapter.io import tensors_of
from lora_core.modules import adapter_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:UserWarning"),  # it knows no bias of B
    pytest.mark.filterwarnings("ignore:There are multiple adapter keys:UserWarning"),
]
# Both form the same sums in float32 and differ in their order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
V = 101


def llama(*, tied: bool = False, bias: bool = False) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes, tie_word_embeddings=tied, attention_bias=bias, initializer_range=0.2))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2))


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=V, **sizes, **drops, num_labels=3, initializer_range=0.2))


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=V, **sizes, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2)
    config._experts_implementation = "eager"  # grouped kernels add in another order
    return MixtralForCausalLM(config)


class Pictures(nn.Module):
    """Convolutions as in a diffusion model: strided, 1×1, with and without bias. PEFT cannot adapt dilated ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.proj_out = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor) -> Any:
        x = torch.tanh(self.second(torch.tanh(self.first(input_ids))))
        return type("Output", (), {"logits": self.head(self.proj_out(x).mean(dim=(2, 3)))})


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    fields: Mapping[str, Any]
    """The settings, in the words that both libraries share."""
    peft: Mapping[str, Any] | None = None
    """What PEFT needs to be told besides."""


def case(build: Callable[[], nn.Module], peft: Mapping[str, Any] | None = None, **fields: Any) -> Case:
    return Case(build, {"r": 4, "lora_alpha": 8, "target_modules": ("q_proj", "up_proj"), **fields}, peft)


def tied_llama() -> nn.Module:
    return llama(tied=True)


def biased_llama() -> nn.Module:
    return llama(bias=True)


ATTENTION = ("c_attn", "c_proj")
CONVS = ("first", "second", "proj_out")
CASES = {
    "llama rank_pattern": case(llama, rank_pattern={"q_proj": 2, r"1\.mlp\.up_proj": 6}, alpha_pattern={"layers.0.self_attn.q_proj": 3}),
    "llama rslora pattern": case(llama, rank_pattern={"q_proj": 2}, use_rslora=True),
    "llama exclude": case(llama, exclude_modules=("layers.0.self_attn.q_proj",)),
    "llama layers": case(llama, layers_to_transform=(1,)),
    "llama modules_to_save": case(llama, modules_to_save=("lm_head",)),
    "llama tokens": case(llama, trainable_token_indices={"embed_tokens": (7, 3)}),
    "llama tied tokens": case(tied_llama, trainable_token_indices={"embed_tokens": (7, 3)}),
    "llama bias all": case(biased_llama, bias="all"),
    "llama bias lora_only": case(biased_llama, bias="lora_only"),
    "llama lora_bias": case(llama, lora_bias=True),
    "llama dora": case(llama, use_dora=True),
    "llama dora with bias": case(biased_llama, use_dora=True, use_rslora=True),
    "llama embedding": case(llama, target_modules=("embed_tokens", "q_proj")),
    "llama dora embedding": case(llama, target_modules=("embed_tokens", "q_proj"), use_dora=True),
    "llama pissa": case(llama, init_lora_weights="pissa"),
    "llama pissa rslora": case(llama, init_lora_weights="pissa_niter_4", use_rslora=True, rank_pattern={"q_proj": 2}),
    "llama olora": case(llama, init_lora_weights="olora"),
    "llama orthogonal": case(llama, init_lora_weights="orthogonal"),
    "moe": case(mixtral, target_modules=("q_proj",), target_parameters=("experts.gate_up_proj", "experts.down_proj")),
    "moe alone": case(mixtral, target_modules=(), target_parameters=("experts.down_proj",)),
    "gpt2": case(gpt2, {"fan_in_fan_out": True}, target_modules=ATTENTION),
    "gpt2 dora": case(gpt2, {"fan_in_fan_out": True}, target_modules=ATTENTION, use_dora=True),
    "gpt2 bias all": case(gpt2, {"fan_in_fan_out": True}, target_modules=("c_attn",), bias="all"),
    "gpt2 embedding": case(gpt2, {"fan_in_fan_out": True}, target_modules=("wte", "c_attn")),
    "bert": case(bert, target_modules=("query", "value", "dense"), modules_to_save=("classifier",)),
    "bert bias": case(bert, target_modules=("query",), bias="all"),
    "conv": case(Pictures, target_modules=CONVS),
    "conv dora": case(Pictures, target_modules=CONVS, use_dora=True),
    "conv lora_bias": case(Pictures, target_modules=CONVS, lora_bias=True),
    "conv bias": case(Pictures, target_modules=CONVS, bias="lora_only"),
}
each_case = pytest.mark.parametrize("one", CASES.values(), ids=CASES.keys())


def in_peft(one: Case) -> PeftLoraConfig:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in one.fields.items()}
    if "trainable_token_indices" in plain:
        plain["trainable_token_indices"] = {name: list(rows) for name, rows in plain["trainable_token_indices"].items()}
    return PeftLoraConfig(**plain, **(one.peft or {}))


def base(one: Case) -> nn.Module:
    torch.manual_seed(3)
    return one.build().eval()


def inputs(one: Case) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if one.build is Pictures:
        return torch.randn(2, 3, 9, 9, generator=generator)
    return torch.randint(0, 12, (2, 9), generator=generator)  # few rows, so that the trained ones come up


def logits(model: nn.Module, one: Case) -> Tensor:
    return model(input_ids=inputs(one)).logits


@torch.no_grad()
def shake(parameters: Mapping[str, Tensor]) -> None:
    """Move everything that is trained, the same for the same name."""
    for key in sorted(parameters):
        generator = torch.Generator().manual_seed(sum(key.encode()))
        parameters[key].add_(0.1 * torch.randn(parameters[key].shape, generator=generator))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained under the keys of the file, in either library."""
    if not isinstance(model, PeftModel):
        return tensors_of(dict(adapter_parts(model)))
    return {name.replace(".default", "").replace(".modules_to_save", ""): p for name, p in model.named_parameters() if p.requires_grad}


@each_case
def test_step_0_is_the_base_bit_for_bit(one: Case) -> None:
    model, config = base(one), LoraConfig(**one.fields)
    before, identity = logits(model, one), fingerprint(model)
    inject(model, config, seed=1)
    after = logits(model, one)
    if config.use_dora or config.init_lora_weights != "kaiming":  # a row over its own length, or a start less itself: a rounding
        torch.testing.assert_close(after, before, **CLOSE)
    else:
        assert torch.equal(after, before)
    assert fingerprint(model) == identity


@each_case
def test_peft_loads_ours_and_we_load_peft(one: Case, tmp_path: Path) -> None:
    model, config = base(one), LoraConfig(**one.fields)
    plain = logits(model, one)
    inject(model, config, seed=1)
    shake(trained(model))
    save_adapter(model, tmp_path / "ours", config, Identity())
    theirs = PeftModel.from_pretrained(base(one), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs, one), logits(model, one), **CLOSE)
    assert (logits(model, one) - plain).abs().max() > 0.01
    theirs.save_pretrained(tmp_path / "theirs")
    again = base(one)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again, one), logits(model, one))


@each_case
def test_gradients_are_pefts(one: Case, tmp_path: Path) -> None:
    model, config = base(one), LoraConfig(**one.fields)
    if config.init_lora_weights != "kaiming":
        pytest.skip("the trained pair is half of what is written")
    inject(model, config, seed=1)
    shake(trained(model))
    save_adapter(model, tmp_path / "ours", config, Identity())
    theirs = get_peft_model(base(one), in_peft(one)).eval()
    theirs.load_adapter(tmp_path / "ours", "default", is_trainable=True)
    for each in (model, theirs):
        (logits(each, one) ** 2).mean().backward()
    ours, peft = trained(model), trained(theirs)
    same = {key: key.removesuffix(".weight") for key in ours if ".lora_magnitude_vector" in key}
    for key, parameter in ours.items():
        other = next(p for name, p in peft.items() if name.removesuffix(".weight") == same.get(key, key).removesuffix(".weight"))
        assert parameter.grad is not None and other.grad is not None, key
        torch.testing.assert_close(
            parameter.grad, other.grad.view_as(parameter), rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


@each_case
def test_only_the_adapter_gets_gradients(one: Case) -> None:
    model = base(one)
    inject(model, LoraConfig(**one.fields), seed=1)
    logits(model, one).sum().backward()
    own = {id(p) for p in trained(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@pytest.mark.parametrize("one", [CASES[name] for name in CASES if name not in ("llama lora_bias", "conv lora_bias")])
def test_merged_it_computes_the_same_and_unmerged_it_is_what_it_was(one: Case) -> None:
    model, config = base(one), LoraConfig(**one.fields)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    inject(model, config, seed=1)
    shake(trained(model))
    adapted, state = logits(model, one), {key: p.detach().clone() for key, p in trained(model).items()}
    merged = merge(model)
    assert not list(adapter_parts(model))
    torch.testing.assert_close(logits(model, one), adapted, **CLOSE)
    unmerge(model, merged)
    assert torch.equal(logits(model, one), adapted)
    assert all(torch.equal(p, state[key]) for key, p in trained(model).items())
    for name, part in adapter_parts(model):
        for own, value in part.base.named_parameters():
            assert torch.equal(value, bits[f"{name}.{own}"])
