"""Under autocast adapted models agree with PEFT, and a merge equals one without autocast.

On the CPU autocast multiplies in bfloat16, whose unit roundoff is 2⁻⁹ ≈ 0.002.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from trained_noise import add_noise
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lora_core import Identity, LoraConfig, inject, merge, save_adapter
from lora_core.adapter.io import tensors_of
from lora_core.modules import adapter_parts

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:There are multiple adapter keys:UserWarning"),
]


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2))


def mixtral() -> nn.Module:
    config = MixtralConfig(
        **SIZES,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


class ImageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, input_ids: Tensor) -> Any:
        images = F.one_hot(input_ids, 12)[:, None].float().expand(-1, 3, -1, -1)
        features = torch.tanh(self.second(torch.tanh(self.first(images))))
        return SimpleNamespace(logits=self.head(features.mean(dim=(2, 3))))


def case(
    build: Callable[[], nn.Module], *targets: str, **settings: Any
) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    return build, {"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}


CASES = {
    "plain": case(llama, "q_proj", "up_proj", "down_proj"),
    "dora": case(llama, "q_proj", "up_proj", use_dora=True),
    "lora_bias": case(llama, "q_proj", lora_bias=True),
    "embedding": case(llama, "embed_tokens", "q_proj"),
    "dora embedding": case(llama, "embed_tokens", use_dora=True),
    "full module": case(llama, "q_proj", modules_to_save=("lm_head",)),
    "rows": case(llama, "q_proj", trainable_token_indices={"embed_tokens": (3, 7)}),
    "experts": case(
        mixtral, "q_proj", target_parameters=("experts.gate_up_proj", "experts.down_proj")
    ),
    "conv": case(ImageModel, "first", "second"),
    "conv dora": case(ImageModel, "first", "second", use_dora=True),
}


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids).logits


def base(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return build().eval()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:UserWarning")
@pytest.mark.parametrize(("build", "settings"), CASES.values(), ids=CASES.keys())
def test_adapted_model_agrees_with_peft(
    build: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Ours is no further from the float32 result than PEFT's.

    The two round at different places, so both are compared with float32.
    """
    config = LoraConfig(**settings)
    model = base(build)
    inject(model, config, seed=1)
    add_noise(model)
    save_adapter(model, tmp_path, config, Identity())
    theirs = PeftModel.from_pretrained(base(build), tmp_path, is_trainable=True).eval()
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = logits(model)
        peft = logits(theirs)
    assert ours.dtype == peft.dtype
    peft_error = relative_error(peft, exact)
    assert 1e-4 < peft_error < 0.1
    assert relative_error(ours, exact) < 1.25 * peft_error
    our_gradients = gradients_of(ours, trained(model))
    peft_gradients = gradients_of(peft, trained(theirs))
    references = gradients_of(exact, trained(model))
    for name, gradient in our_gradients.items():
        assert gradient.dtype == torch.float32
        peft_error = relative_error(peft_gradients[name].view_as(gradient), references[name])
        assert relative_error(gradient, references[name]) < 1.25 * peft_error + 0.01, name


def relative_error(found: Tensor, exact: Tensor) -> Tensor:
    return (found.float() - exact).norm() / exact.norm()


def gradients_of(y: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad((y.float() ** 2).mean(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters under the keys of the file, for either library."""
    if not isinstance(model, PeftModel):
        return {
            key.removesuffix(".weight"): p
            for key, p in tensors_of(dict(adapter_parts(model))).items()
        }
    named = {
        name.replace(".default", "").replace(".modules_to_save", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {key.removesuffix(".weight"): parameter for key, parameter in named.items()}


@pytest.mark.parametrize(("build", "settings"), CASES.values(), ids=CASES.keys())
def test_merge_under_autocast_equals_merge_without(
    build: Callable[[], nn.Module], settings: dict[str, Any]
) -> None:
    if "lora_bias" in settings:
        pytest.skip("lora_bias cannot be merged into a layer without a bias")
    models = [base(build) for _ in range(2)]
    for model in models:
        inject(model, LoraConfig(**settings), seed=1)
        add_noise(model)
    merge(models[0])
    with torch.autocast("cpu", torch.bfloat16):
        merge(models[1])
    expected = models[0].state_dict()
    found = models[1].state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
