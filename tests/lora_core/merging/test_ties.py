"""A merge into a weight that others share changes what its adapter changed, survives a file, and is undone to the object."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from lora_core import LoraConfig, MergeError, inject, load_adapter, merge, unmerge
from lora_core.base.sharing import FLAG, is_head_tied, memory_of
from lora_core.layers.trained import TiedHead, TrainedRows
from lora_core.modules import adapter_parts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
]
V = 101
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# The sum W0 + s·B·A is rounded to float32 once, and so are 32 products.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2
    )


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(llama_config())


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2
        )
    )


def llava() -> PreTrainedModel:
    """A model whose config holds the text model's, both of which say that the head is tied."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=llama_config(),
            image_token_index=V - 1,
            tie_word_embeddings=True,
        )
    )


def bert() -> PreTrainedModel:
    """A model that ties a bias as well, so that one tie is left."""
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=32, initializer_range=0.2))


def umt5() -> PreTrainedModel:
    """A model of four users of one weight, which scales its logits by what the config says of ties."""
    sizes = {
        "vocab_size": V,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return UMT5ForConditionalGeneration(UMT5Config(**sizes, decoder_start_token_id=0))


@dataclass(frozen=True)
class Case:
    build: Callable[[], PreTrainedModel]
    settings: dict[str, Any]
    says_tied: bool = False
    """What the config says after the merge."""
    rows_alone: bool = False
    """Only rows of the shared weight are trained, and it stays shared."""

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(**self.settings)


def case(
    build: Callable[[], PreTrainedModel],
    *targets: str,
    says_tied: bool = False,
    rows_alone: bool = False,
    **settings: Any,
) -> Case:
    return Case(
        build,
        {"r": 4, "lora_alpha": 8, "target_modules": targets, **settings},
        says_tied,
        rows_alone,
    )


CASES = {
    "head": case(llama, "lm_head", "q_proj"),
    "embedding": case(llama, "embed_tokens"),
    "both": case(llama, "embed_tokens", "lm_head"),
    "dora": case(llama, "lm_head", use_dora=True),
    "dora embedding": case(llama, "embed_tokens", use_dora=True),
    "whole head": case(llama, "q_proj", modules_to_save=("lm_head",)),
    "whole embedding": case(llama, "q_proj", modules_to_save=("embed_tokens",)),
    "both whole": case(llama, "q_proj", modules_to_save=("embed_tokens", "lm_head")),
    "head and whole embedding": case(llama, "lm_head", modules_to_save=("embed_tokens",)),
    "rows": case(
        llama,
        "q_proj",
        trainable_token_indices={"embed_tokens": (3, 7)},
        says_tied=True,
        rows_alone=True,
    ),
    "gpt2 head": case(gpt2, "lm_head"),
    "gpt2 embedding": case(gpt2, "wte", "c_attn"),
    "llava head": case(llava, "lm_head"),
    "llava embedding": case(llava, "embed_tokens"),
    "bert head": case(bert, "cls.predictions.decoder", says_tied=True),
    "bert embedding": case(bert, "word_embeddings", says_tied=True),
    "umt5 head": case(umt5, "lm_head", says_tied=True),
    "umt5 encoder": case(umt5, "encoder.embed_tokens", says_tied=True),
    "umt5 shared": case(umt5, "shared", says_tied=True),
    "umt5 all": case(
        umt5, "shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head", says_tied=True
    ),
    "umt5 rows": case(
        umt5, "q", trainable_token_indices={"encoder.embed_tokens": (3, 7)}, says_tied=True
    ),
}
each_case = pytest.mark.parametrize("one", CASES.values(), ids=CASES.keys())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(
        2, 12, (2, 9), generator=torch.Generator().manual_seed(5)
    )  # few rows, so that the trained ones come up
    return model(
        input_ids=ids,
        **({"decoder_input_ids": ids[:, ::2]} if model.config.is_encoder_decoder else {}),
    ).logits


@torch.no_grad()
def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def base(one: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    return one.build().eval()


def adapted(one: Case) -> PreTrainedModel:
    model = base(one)
    inject(model, one.lora, seed=0)
    shake(model)
    return model


def objects(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def in_peft(one: Case) -> PeftLoraConfig:
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in one.settings.items()
    }
    return PeftLoraConfig(**plain, init_lora_weights=False, fan_in_fan_out=one.build is gpt2)


def says(model: PreTrainedModel) -> list[bool]:
    return [config.tie_word_embeddings for config in (model.config, model.config.get_text_config())]


@each_case
def test_the_merged_model_computes_what_the_adapted_one_did(one: Case) -> None:
    model = adapted(one)
    before = logits(model)
    merge(model)
    assert not list(adapter_parts(model))
    torch.testing.assert_close(logits(model), before, **CLOSE)


@each_case
def test_who_was_not_adapted_keeps_its_bits(one: Case) -> None:
    model, plain = adapted(one), objects(base(one))
    trained = {name for name, part in adapter_parts(model) if not isinstance(part, TiedHead)}
    follows = {name for name, part in adapter_parts(model) if isinstance(part, TiedHead)}
    merge(model)
    changed = {
        name.rpartition(".")[0]
        for name, value in objects(model).items()
        if not torch.equal(value, plain[name])
    }
    assert changed == trained | follows


@each_case
def test_a_file_gives_the_merged_model_back(one: Case, tmp_path: Path) -> None:
    model = adapted(one)
    merge(model)
    assert says(model) == [one.says_tied] * 2
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    values = objects(again)
    assert all(torch.equal(value, values[name]) for name, value in objects(model).items())


@each_case
def test_unmerge_ties_the_very_parameters_again(one: Case) -> None:
    model = adapted(one)
    before, state, ties, parameters = (
        logits(model),
        {k: v.clone() for k, v in model.state_dict().items()},
        says(model),
        objects(model),
    )
    merged = merge(model)
    is_tied = memory_of(model.get_output_embeddings().weight) == memory_of(
        model.get_input_embeddings().weight
    )
    assert is_tied is one.rows_alone
    unmerge(model, merged)
    assert says(model) == ties == [True, True]
    assert torch.equal(logits(model), before)
    found = objects(model)
    assert found.keys() == parameters.keys() and all(
        found[name] is parameter for name, parameter in parameters.items()
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "head",
        "embedding",
        "both",
        "dora",
        "dora embedding",
        "gpt2 embedding",
        "bert embedding",
        "umt5 encoder",
    ],
)
def test_it_is_what_an_unmerged_adapter_of_peft_computes(name: str, tmp_path: Path) -> None:
    one = CASES[name]
    theirs = get_peft_model(base(one), in_peft(one)).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = base(one)
    load_adapter(model, tmp_path)
    before = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    torch.testing.assert_close(before, logits(theirs), **CLOSE)
    assert (before - logits(base(one))).abs().max() > 0.1


@pytest.mark.parametrize(
    "trained", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")], ids="+".join
)
def test_a_tie_by_storage_is_a_tie(trained: tuple[str, ...], tmp_path: Path) -> None:
    """Two parameters over one storage, as a tie made by hand or by a sharded load leaves them."""
    model = llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data, requires_grad=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=trained), seed=0)
    shake(model)
    before, parameters = logits(model), objects(model)
    merged = merge(model)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(model))
    unmerge(model, merged)
    assert torch.equal(logits(model), before) and model.config.tie_word_embeddings is True
    assert all(parameters[name] is found for name, found in objects(model).items())
    assert memory_of(model.get_output_embeddings().weight) == memory_of(
        model.get_input_embeddings().weight
    )


def test_rows_of_an_embedding_that_is_tied_by_storage_are_followed_by_the_head() -> None:
    model = llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data, requires_grad=False)
    inject(model, CASES["rows"].lora, seed=0)
    assert isinstance(model.lm_head, TiedHead) and isinstance(model.model.embed_tokens, TrainedRows)
    shake(model)
    before = logits(model)
    merged = merge(model)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    assert memory_of(model.lm_head.weight) == memory_of(model.model.embed_tokens.weight)
    unmerge(model, merged)
    assert torch.equal(logits(model), before)


def test_weights_of_one_size_in_other_places_are_no_tie() -> None:
    whole = torch.zeros(8, 4)
    one, other = nn.Parameter(whole[:4]), nn.Parameter(whole[4:])
    assert memory_of(one) == memory_of(nn.Parameter(whole[:4])) != memory_of(other)
    assert memory_of(nn.Parameter(whole[:4].T)) != memory_of(one)
    without = [nn.Parameter(torch.empty(4, 4, device="meta")) for _ in range(2)]
    assert memory_of(without[0]) != memory_of(without[1])


def test_what_fails_after_weights_were_stored_is_undone(refuses: Callable[..., None]) -> None:
    """The config is told last, and this one cannot be."""

    @dataclass(frozen=True)
    class Frozen:
        tie_word_embeddings: bool = True

    model = adapted(CASES["both"])
    before, parameters = logits(model), objects(model)
    model.config, real = Frozen(), model.config
    refuses(model, lambda: merge(model), FrozenInstanceError, FLAG)
    assert all(parameters[name] is found for name, found in objects(model).items())
    model.config = real
    assert torch.equal(logits(model), before) and is_head_tied(model)


def test_a_module_that_stands_twice_is_refused(refuses: Callable[..., None]) -> None:
    """Its second place computes without the adapter, and would not after the merge."""
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=("first",)), seed=0)
    refuses(model, lambda: merge(model), MergeError, "first is in the model at another path too")


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ("1",)}, {"bias": "all"}], ids=["whole", "bias"]
)
def test_training_a_merged_model_on_does_not_reach_what_can_be_unmerged(
    settings: dict[str, Any],
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=("0",), **settings), seed=0)
    shake(model)
    state = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    merged = merge(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    unmerge(model, merged)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in state.items())
