"""What the tests of lora_core share: tiny models made on the spot, dense or 4-bit, and ways to compare them bit by bit."""

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
    """Let a sum be formed in one order, and tests side by side not fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def build_llama() -> Callable[..., LlamaForCausalLM]:
    """Return a maker of Llamas of two layers with grouped heads: equal arguments give equal bits."""
    return make_llama


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama, for what has to be loaded from disk."""
    folder = tmp_path_factory.mktemp("llama")
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def build_nf4_llama(llama_folder: Path) -> Callable[..., LlamaForCausalLM]:
    """Return a loader of the same Llama in NF4 with double quantisation.

    The model is in training mode (it has no dropout): in evaluation bitsandbytes swaps the stored codes for another
    layout on some processors, which test_quant.py looks at by itself.
    """

    def load(
        dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None
    ) -> LlamaForCausalLM:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype or dtype,
        )
        return AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=quantisation, dtype=dtype
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
def randomise() -> Callable[[nn.Module], None]:
    """Return a function that gives every B of an adapter values large enough to move the logits."""
    return fill_with_noise


@pytest.fixture(scope="session")
def state_of() -> Callable[[nn.Module], State]:
    return clone_state


@pytest.fixture(scope="session")
def assert_same_state() -> Callable[[State, State], None]:
    return compare_states


@pytest.fixture(scope="session")
def random_update() -> Callable[..., Update]:
    """Return a maker of updates of full rank: equal arguments give equal bits."""
    return make_update


@pytest.fixture(scope="session")
def small_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"))


@pytest.fixture
def adapted(small_config: LoraConfig) -> LlamaForCausalLM:
    """A Llama that carries an adapter with noise in it."""
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
    """What puts a part of its own before every module path; neither computes anything by being put on."""
    return request.param


@pytest.fixture
def refuses(state_of: Callable[[nn.Module], State]) -> Callable[..., None]:
    """Return a check that an action on a model raises, and that the model is then what it was."""

    def check(
        model: nn.Module, action: Callable[[], object], error: type[Exception], message: str | None
    ) -> None:
        before, trainable, adapters = state_of(model), _trainable(model), _adapters(model)
        with pytest.raises(error, match=message):
            action()
        compare_states(state_of(model), before)
        assert (_trainable(model), _adapters(model)) == (trainable, adapters)

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
        initializer_range=0.1,  # at the usual 0.02 a tiny model's logits hardly depend on its layers
    )
    torch.manual_seed(seed)
    # Through bfloat16, so that a copy in either dtype holds the same values.
    return LlamaForCausalLM(config).to(torch.bfloat16).to(dtype).eval()


def make_update(
    out_features: int, in_features: int, rank: int, *, scale: float = 1.0, seed: int = 0
) -> Update:
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(shape, generator=generator)
        for shape in ((rank, in_features), (out_features, rank))
    )
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
    different = [
        name
        for name, value in state.items()
        if value.dtype != reference[name].dtype or not torch.equal(value, reference[name])
    ]
    assert not different


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _adapters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
