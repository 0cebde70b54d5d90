"""Encoder and decoder use what is trained of the weight that they share.

The reference is a plain model whose shared weight holds the trained values.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_core import (
    AdapterError,
    Identity,
    LoraConfig,
    TargetError,
    inject,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
)
from lora_core.modules import adapter_parts

V = 40
ROWS = (5, 6)
IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(3))
IDS[:, 2:4] = torch.tensor(ROWS)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 20,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def t5() -> PreTrainedModel:
    sizes = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def bart() -> PreTrainedModel:
    return BartForConditionalGeneration(BartConfig(**SIZES, scale_embedding=True))


def m2m100() -> PreTrainedModel:
    return M2M100ForConditionalGeneration(M2M100Config(**SIZES))


each_model = pytest.mark.parametrize("make", [t5, bart, m2m100])
Make = Callable[[], PreTrainedModel]


def build(make: Make) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=IDS, decoder_input_ids=IDS).logits
    return output


def train(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn(parameter.shape)


def config(make: Make, **settings: Any) -> LoraConfig:
    fields = {"target_modules": ("q",) if make is t5 else ("q_proj",), **settings}
    return LoraConfig(r=2, lora_alpha=2, **fields)


@pytest.mark.filterwarnings("ignore:PEFT applies what is trained:UserWarning")
@each_model
@pytest.mark.parametrize("name", ["shared", "encoder.embed_tokens"])
def test_trained_rows_reach_every_user_of_the_weight(make: Make, name: str, tmp_path: Path) -> None:
    lora = config(make, trainable_token_indices={name: ROWS})
    model = build(make)
    inject(model, lora, seed=0)
    torch.testing.assert_close(logits(model), logits(build(make)), rtol=1e-5, atol=1e-5)
    rows = [value for key, value in model.named_parameters() if key.endswith("tokens_delta")]
    assert len(rows) == 1
    rows[0].data.normal_(generator=torch.Generator().manual_seed(1))
    plain = build(make)
    plain.get_input_embeddings().weight.data[list(ROWS)] = rows[0].detach()
    adapted = logits(model)
    torch.testing.assert_close(adapted, logits(plain), **CLOSE)
    save_adapter(model, tmp_path / "adapter", lora, Identity())
    loaded = build(make)
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), adapted)
    merge(model)
    torch.testing.assert_close(logits(model), logits(plain), **CLOSE)
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(plain), **CLOSE)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a deprecated name
@each_model
def test_rows_that_peft_trained_on_the_shared_weight_give_its_logits(
    make: Make, tmp_path: Path
) -> None:
    targets = ["q"] if make is t5 else ["q_proj"]
    theirs = get_peft_model(
        build(make),
        PeftConfig(r=2, target_modules=targets, trainable_token_indices={"shared": list(ROWS)}),
    ).eval()
    train(theirs)
    theirs.save_pretrained(tmp_path)
    model = build(make)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)


@each_model
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_adapter_of_the_shared_weight_reaches_encoder_and_decoder(
    make: Make, use_dora: bool
) -> None:
    """The head keeps the base's weight, as under any adapter of an embedding."""
    model = build(make)
    inject(model, config(make, target_modules=("shared",), use_dora=use_dora), seed=0)
    train(model)
    [(_, layer)] = lora_layers(model)
    plain = build(make)
    weight = nn.Parameter(plain.get_input_embeddings().weight.detach() + layer.delta().T)
    for name, module in plain.named_modules():
        if name.endswith("embed_tokens"):
            module.weight = weight
    adapted = logits(model)
    torch.testing.assert_close(adapted, logits(plain), **CLOSE)
    merge(model)
    torch.testing.assert_close(logits(model), adapted, **CLOSE)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a deprecated name
def test_rows_that_peft_trained_for_one_user_are_refused(tmp_path: Path) -> None:
    rows = {"encoder.embed_tokens": list(ROWS)}
    settings = PeftConfig(r=2, target_modules=["q"], trainable_token_indices=rows)
    theirs = get_peft_model(build(t5), settings)
    train(theirs)
    theirs.save_pretrained(tmp_path)
    model = build(t5)
    with pytest.raises(AdapterError, match="trained for one user of a shared weight"):
        load_adapter(model, tmp_path)
    assert not list(adapter_parts(model))


def test_saving_warns_that_peft_does_not_apply_an_update_of_the_shared_weight(
    tmp_path: Path,
) -> None:
    model = build(bart)
    lora = config(bart, target_modules=("shared",))
    inject(model, lora, seed=0)
    train(model)
    with pytest.warns(UserWarning, match="PEFT applies what is trained of a shared embedding"):
        save_adapter(model, tmp_path / "adapter", lora, Identity())
    loaded = build(bart)
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


@each_model
def test_training_reaches_the_rows_through_every_user(make: Make) -> None:
    """A plain model whose shared weight is trained gives the reference gradient."""
    model = build(make)
    inject(model, config(make, trainable_token_indices={"shared": ROWS}), seed=0)
    plain = build(make)
    for one in (model, plain):
        one(input_ids=IDS, decoder_input_ids=IDS).logits.square().sum().backward()
    expected = plain.get_input_embeddings().weight.grad[list(ROWS)]
    [rows] = [value for key, value in model.named_parameters() if key.endswith("tokens_delta")]
    torch.testing.assert_close(rows.grad, expected, rtol=1e-3, atol=1e-3)


@each_model
def test_names_of_two_users_of_one_weight_are_refused(make: Make) -> None:
    model = build(make)
    with pytest.raises(TargetError, match="share one weight; name only one of them"):
        inject(model, config(make, trainable_token_indices={"embed_tokens": ROWS}), seed=0)
    assert not list(adapter_parts(model))


@each_model
def test_full_training_of_an_embedding_that_is_never_called_is_refused(make: Make) -> None:
    model = build(make)
    with pytest.raises(TargetError, match="shared, which only holds the weight"):
        inject(model, config(make, modules_to_save=("shared",)), seed=0)
    assert not list(adapter_parts(model))
