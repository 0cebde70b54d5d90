"""Fixtures of the lora_core tests: tiny dense or 4-bit models, and bit-exact comparisons."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lora_core import Identity, LoraConfig, LoraLinear, inject, lora_layers, save_adapter
from lora_core.spectrum.updates import Update

VOCABULARY = 101
State = dict[str, Tensor]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Fix the summation order, and keep parallel tests from competing for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def build_llama() -> Callable[..., LlamaForCausalLM]:
    """Return a factory of two-layer Llamas with grouped heads: equal arguments give equal bits."""
    return make_llama


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama, for tests that load from disk."""
    folder = tmp_path_factory.mktemp("llama")
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def build_nf4_llama(llama_folder: Path) -> Callable[..., LlamaForCausalLM]:
    """Return a loader of the same Llama in NF4 with double quantization.

    The model is in training mode (it has no dropout): in evaluation mode, bitsandbytes changes the
    layout of the stored codes on some processors, which test_quant.py covers.
    """

    def load(
        dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None
    ) -> LlamaForCausalLM:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype or dtype,
        )
        return AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=quantization, dtype=dtype
        ).train()

    return load


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def logits(tokens: Tensor) -> Callable[[nn.Module], Tensor]:
    """Return a function from a language model to its logits on `tokens`."""

    @torch.no_grad()
    def compute(model: nn.Module) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    return compute


@pytest.fixture(scope="session")
def randomize() -> Callable[[nn.Module], None]:
    """Return a function that fills every B of an adapter with values that change the logits."""
    return fill_with_noise


@pytest.fixture(scope="session")
def state_of() -> Callable[[nn.Module], State]:
    return clone_state


@pytest.fixture(scope="session")
def assert_same_state() -> Callable[[State, State], None]:
    return compare_states


@pytest.fixture(scope="session")
def random_update() -> Callable[..., Update]:
    """Return a factory of updates of full rank: equal arguments give equal bits."""
    return make_update


@pytest.fixture(scope="session")
def small_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"))


@pytest.fixture
def adapted(small_config: LoraConfig) -> LlamaForCausalLM:
    """A Llama with a random adapter."""
    model = make_llama()
    inject(model, small_config, seed=5)
    fill_with_noise(model)
    return model


@pytest.fixture
def adapter_folder(adapted: LlamaForCausalLM, small_config: LoraConfig, tmp_path: Path) -> Path:
    """The saved adapter of `adapted`."""
    folder = tmp_path / "adapter"
    save_adapter(adapted, folder, small_config, Identity(base="tiny llama"))
    return folder


@pytest.fixture(
    params=[partial(torch.compile, backend="eager"), nn.DataParallel], ids=["compiled", "parallel"]
)
def wrapper(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    """A wrapper that prefixes every module path; wrapping alone computes nothing."""
    return request.param


@pytest.fixture
def refuses(state_of: Callable[[nn.Module], State]) -> Callable[..., None]:
    """Return a check that an action on a model raises and leaves the model unchanged."""

    def check(
        model: nn.Module, action: Callable[[], object], error: type[Exception], message: str | None
    ) -> None:
        before = state_of(model)
        trainable = _trainable(model)
        adapters = _adapters(model)
        with pytest.raises(error, match=message):
            action()
        compare_states(state_of(model), before)
        assert _trainable(model) == trainable
        assert _adapters(model) == adapters

    return check


def make_llama(
    *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = False
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
        initializer_range=0.1,  # with the usual 0.02, the logits hardly depend on the layers
    )
    torch.manual_seed(seed)
    # Rounded to bfloat16, so that copies in both dtypes have the same values.
    return LlamaForCausalLM(config).to(torch.bfloat16).to(dtype).eval()


def make_update(
    out_features: int, in_features: int, rank: int, *, scale: float = 1.0, seed: int = 0
) -> Update:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_features, generator=generator)
    b = torch.randn(out_features, rank, generator=generator)
    return Update(a, b, scale)


@torch.no_grad()
def fill_with_noise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    for _, layer in lora_layers(model):
        layer.lora_B.copy_(0.2 * torch.randn(layer.lora_B.shape, generator=generator))


def clone_state(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def compare_states(state: State, reference: State) -> None:
    assert state.keys() == reference.keys()
    for name, value in state.items():
        assert value.dtype == reference[name].dtype, name
        assert torch.equal(value, reference[name]), name


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _adapters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
