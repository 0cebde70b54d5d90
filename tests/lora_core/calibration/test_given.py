"""A start that is given is what training starts from, whole or not at all; one that must be given cannot be forgotten."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from lora_core import (
    AdapterError,
    Bank,
    ConfigError,
    Identity,
    LoraConfig,
    TargetError,
    inject,
    load_adapter,
    lora_layers,
    save_adapter,
    set_starts,
)
from lora_core.adapter.adapter_files import read_json
from lora_core.calibration.eva import eva_starts

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
NAMES = (Q, DOWN)
Build = Callable[..., LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
# Sums of at most 128 products in float32, formed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:lora with eva initialization used with low_cpu_mem_usage=False:UserWarning"
    ),
]


def config(init: str = "kaiming", **fields: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": NAMES, "init_lora_weights": init, **fields}
    )


def calibration_batches(model: nn.Module, tokens: Tensor) -> list[Callable[[], object]]:
    return [partial(model, input_ids=row[None], use_cache=False) for row in tokens]


def pairs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a start for every layer of an adapted model, neither factor of which is zero."""
    generator = torch.Generator().manual_seed(2)
    factors = {name: (layer.lora_A, layer.lora_B) for name, layer in lora_layers(model)}
    return {
        name: tuple(0.1 * torch.randn(f.shape, generator=generator) for f in pair)
        for name, pair in factors.items()
    }


def originals(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a saved model by module path, as they were before any rounding."""
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {name.removesuffix(".weight"): value for name, value in state.items()}


@pytest.fixture
def quantized(llama_folder: Path) -> Callable[[str], LlamaForCausalLM]:
    """Return a loader of the saved Llama in nf4, fp4 or int8, in training mode (it has no dropout)."""

    def load(kind: str) -> LlamaForCausalLM:
        bits = (
            {"load_in_8bit": True}
            if kind == "int8"
            else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
        )
        settings = BitsAndBytesConfig(**bits)
        return AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=settings, dtype=torch.float32
        ).train()

    return load


# --- set_starts ---


def test_a_given_a_is_what_training_starts_from_and_step_0_is_the_base(
    build_llama: Build, logits: Logits
) -> None:
    model = build_llama()
    before = logits(model)
    inject(model, config(), seed=1)
    given = {name: a for name, (a, _) in pairs(model).items()}
    set_starts(model, given)
    for name, layer in lora_layers(model):
        assert torch.equal(layer.lora_A, given[name])
        assert not layer.lora_B.any()
        assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_given_pair_moves_the_weight_by_its_product(
    build_llama: Build, logits: Logits, use_dora: bool
) -> None:
    """Under DoRA too: the rows keep the lengths of W0 + s·B·A, so that the sum itself is what computes."""
    model, dense = build_llama(), build_llama()
    inject(model, config(use_dora=use_dora), seed=1)
    set_starts(model, pairs(model))
    for name, (a, b) in pairs(model).items():
        dense.get_submodule(name).weight.data += 1.5 * b @ a
    torch.testing.assert_close(logits(model), logits(dense), **CLOSE)
    assert (logits(model) - logits(build_llama())).abs().max() > 0.01


def test_a_wrapper_changes_no_name(
    build_llama: Build, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    model = build_llama()
    inject(model, config(), seed=1)
    set_starts(wrapper(model), pairs(model))
    assert torch.equal(dict(lora_layers(model))[Q].lora_B, pairs(model)[Q][1])


def misshapen(given: dict[str, Any]) -> None:
    given[DOWN] = (given[DOWN][0], given[DOWN][1].T)


def of_one_rank_more(given: dict[str, Any]) -> None:
    given[DOWN] = torch.zeros(5, 128)


def not_finite(given: dict[str, Any]) -> None:
    given[DOWN][1][3, 2] = torch.inf


def of_whole_numbers(given: dict[str, Any]) -> None:
    given[DOWN] = torch.ones(4, 128, dtype=torch.int64)


def with_a_name_too_many(given: dict[str, Any]) -> None:
    given["model.layers.1.mlp.up_proj"] = torch.zeros(4, 64)


def with_a_name_too_few(given: dict[str, Any]) -> None:
    del given[DOWN]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            misshapen,
            ConfigError,
            rf"the B given for {DOWN} is \(4, 64\) and its layer holds \(64, 4\)",
        ),
        (of_one_rank_more, ConfigError, r"the A given for .* is \(5, 128\)"),
        (not_finite, ConfigError, f"the B given for {DOWN} .* no finite floats"),
        (of_whole_numbers, ConfigError, "torch.int64"),
        (
            with_a_name_too_many,
            TargetError,
            "1 starts have no adapted linear layer, such as 'model.layers.1.mlp.up_proj'",
        ),
        (with_a_name_too_few, TargetError, f"1 adapted layers have no start, such as {DOWN}"),
    ],
)
def test_starts_that_do_not_fit_are_refused_whole(
    build_llama: Build,
    refuses: Callable[..., None],
    spoil: Callable[[dict[str, Any]], None],
    error: type[Exception],
    message: str,
) -> None:
    """The first start is right each time, and is not put in either."""
    model = build_llama()
    inject(model, config(), seed=1)
    given: dict[str, Any] = pairs(model)
    spoil(given)
    refuses(model, lambda: set_starts(model, given), error, message)


def test_a_model_without_an_adapter_has_nothing_to_start(build_llama: Build) -> None:
    with pytest.raises(TargetError, match="carries no update of a linear layer"):
        set_starts(build_llama(), {Q: torch.zeros(4, 64)})


def test_a_start_from_the_weight_is_not_written_over(
    build_llama: Build, refuses: Callable[..., None]
) -> None:
    """What is taken off again would no longer be what was put in."""
    model = build_llama()
    inject(model, config("olora"), seed=1)
    refuses(
        model, lambda: set_starts(model, pairs(model)), TargetError, f"{Q} starts from its weight"
    )


# --- what must be given cannot be forgotten, and nothing is given in vain ---


@pytest.mark.parametrize(
    ("init", "given", "message"),
    [
        ("eva", {}, "'eva' is found from 'data', and none is given; pass data= to `inject`"),
        ("loftq", {}, "'loftq' is found from 'original', and none is given"),
        ("eva", {"original": {}}, "'eva' is found from 'data'"),
        (
            "kaiming",
            {"data": []},
            "'data' has no effect on init_lora_weights='kaiming'; leave it out, or use 'eva'",
        ),
        (
            "pissa",
            {"original": {}},
            "'original' has no effect on init_lora_weights='pissa'; leave it out, or use 'loftq'",
        ),
    ],
)
def test_a_start_and_what_it_is_found_from_come_together(
    build_llama: Build, refuses: Callable[..., None], init: str, given: dict[str, Any], message: str
) -> None:
    model = build_llama()
    refuses(model, lambda: inject(model, config(init), seed=0, **given), ConfigError, message)


def test_a_bank_starts_no_adapter_plainly_that_asks_for_data(build_llama: Build) -> None:
    bank = Bank(build_llama())
    with pytest.raises(ConfigError, match="use `set_starts`"):
        bank.add("one", config("eva"), seed=0)
    assert bank.names == []


# --- from data ---


def test_eva_starts_in_the_strongest_directions_of_what_each_layer_reads(
    build_llama: Build, tokens: Tensor, logits: Logits
) -> None:
    """The reference decomposes all inputs at once, in float64, with hooks of its own."""
    model, seen = build_llama(), {name: [] for name in NAMES}
    before, every = logits(model), calibration_batches(model, tokens)
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: seen[n].append(args[0].flatten(0, -2))
        )
        for n in NAMES
    ]
    for push in every:
        push()
    for hook in hooks:
        hook.remove()
    inject(model, config("eva"), seed=1, data=every)
    for name, layer in lora_layers(model):
        rows = torch.cat(seen[name]).detach().double()
        best = torch.linalg.svdvals(rows)
        kept = (rows @ layer.lora_A.detach().double().T).norm() ** 2 / (best[:4] ** 2).sum()
        # The second batch meets only the 4 directions that were kept of the first one's 9.
        assert 0.95 < kept.item() <= 1 + 1e-6, name
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(4), rtol=0, atol=1e-5)
    assert torch.equal(logits(model), before)


def test_eva_is_the_start_that_the_inputs_of_the_base_give(
    build_nf4_llama: Build, tokens: Tensor, logits: Logits
) -> None:
    model = build_nf4_llama()
    before = logits(model)
    found = eva_starts(model, dict.fromkeys(NAMES, 4), calibration_batches(model, tokens))
    inject(model, config("eva"), seed=1, data=calibration_batches(model, tokens))
    assert all(torch.equal(layer.lora_A, found[name]) for name, layer in lora_layers(model))
    assert torch.equal(logits(model), before)


def test_data_that_says_too_little_leaves_the_model_alone(
    build_llama: Build, tokens: Tensor, refuses: Callable[..., None]
) -> None:
    model = build_llama()
    refuses(
        model,
        lambda: inject(
            model, config("eva", r=16), seed=0, data=calibration_batches(model, tokens)[:1]
        ),
        ConfigError,
        "fewer than its rank",
    )
    refuses(
        model,
        lambda: inject(model, config("eva"), seed=0, data=[]),
        TargetError,
        "received no input",
    )


class Odd(nn.Module):
    """Two layers and an odd function: rows that come in pairs x, −x have a mean of zero at both."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.first, self.second = nn.Linear(24, 16, bias=False), nn.Linear(16, 8, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / 4

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("rank", [1, 3])
def test_eva_spans_what_peft_spans(rank: int) -> None:
    """PEFT takes the mean off first, so the rows have none; it approximates with random projections, ours is exact."""
    generator = torch.Generator().manual_seed(7)
    half = torch.randn(200, 24, generator=generator) * 0.6 ** torch.arange(24)
    x = torch.cat([half, -half])
    settings = PeftLoraConfig(
        r=rank,
        target_modules=["first", "second"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1, tau=0.999),
    )
    theirs = get_peft_model(Odd(), settings)
    plain: dict[str, Any] = {
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
        "show_progress_bar": False,
    }
    initialize_lora_eva_weights(theirs, [{"x": x}], **plain)
    ours = Odd()
    inject(
        ours,
        config("eva", r=rank, target_modules=("first", "second")),
        seed=0,
        data=[lambda: ours(x)],
    )
    for name, layer in lora_layers(ours):
        their_a = theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.detach()
        cosines = torch.linalg.svdvals(layer.lora_A.detach() @ F.normalize(their_a).T)
        # Four power iterations with neighbours 0.6 apart: what is left of the others is 0.6⁹ of them, an angle below 0.02.
        assert cosines.min() > 1 - 2e-4, name


# --- towards the unrounded weight ---


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_rounding_left_falls_as_the_tail_of_its_singular_values(
    quantized: Callable[[str], LlamaForCausalLM], llama_folder: Path, kind: str, use_rslora: bool
) -> None:
    """‖W − (Q + s·B·A)‖ is what the best approximation of that rank of W − Q loses (Eckart and Young)."""
    weights, left = originals(llama_folder), []
    for rank in (1, 8, 32):
        model = quantized(kind)
        inject(model, config("loftq", r=rank, use_rslora=use_rslora), seed=0, original=weights)
        for name, layer in lora_layers(model):
            rounded = layer.frozen.dense(torch.float32).double()
            values = torch.linalg.svdvals(weights[name].double() - rounded)
            remains = (weights[name].double() - rounded - layer.delta().double()).norm()
            # The factors are rounded to float32: 6e-8 of a product that is as large as the error it makes up for.
            assert remains.item() == pytest.approx(values[rank:].norm().item(), rel=1e-5)
            left.append((remains / values.norm()).item())
    assert left[::2] == sorted(left[::2], reverse=True) and left[-2] < 0.6 < 0.9 < left[0] < 1


@pytest.mark.parametrize(
    ("kind", "fields", "left"),
    [
        ("nf4", {"r": 16}, 0.7),
        ("nf4", {"r": 16, "use_dora": True}, 0.7),
        ("fp4", {"r": 16}, 0.7),
        ("int8", {"r": 32}, 0.9),
    ],
)
def test_a_model_that_starts_towards_the_unrounded_one_answers_more_like_it(
    quantized: Callable[[str], LlamaForCausalLM],
    llama_folder: Path,
    logits: Logits,
    kind: str,
    fields: dict[str, Any],
    left: float,
) -> None:
    """At int8 the inputs are rounded as well, and no adapter makes up for that: measured 0.55, 0.55 and 0.8."""
    whole, model = (
        AutoModelForCausalLM.from_pretrained(llama_folder).eval(),
        quantized(kind).train(kind != "int8"),
    )
    far = (logits(model) - logits(whole)).norm()
    every = config("loftq", target_modules="all-linear", **fields)
    inject(model, every, seed=0, original=originals(llama_folder).__getitem__)
    near = (logits(model) - logits(whole)).norm()
    assert near < left * far
    assert len(list(lora_layers(model))) == 14


def test_the_originals_are_asked_for_one_at_a_time(
    quantized: Callable[[str], LlamaForCausalLM], llama_folder: Path
) -> None:
    weights, asked = originals(llama_folder), []

    def read(name: str) -> Tensor:
        asked.append(name)
        return weights[name]

    inject(quantized("nf4"), config("loftq"), seed=0, original=read)
    assert asked == list(NAMES)


def test_a_layer_that_is_not_rounded_starts_plainly_beside_others(
    build_nf4_llama: Build, llama_folder: Path
) -> None:
    model, plain = build_nf4_llama(), build_nf4_llama()
    targets = ("lm_head", "q_proj")
    inject(model, config("loftq", target_modules=targets), seed=1, original=originals(llama_folder))
    inject(plain, config(target_modules=targets), seed=1)
    (head, other), rounded = (
        (dict(lora_layers(one))["lm_head"] for one in (model, plain)),
        dict(lora_layers(model))[Q],
    )
    assert torch.equal(head.lora_A, other.lora_A) and not head.lora_B.any()
    assert rounded.lora_B.any()


def test_nothing_rounded_is_nothing_to_make_up_for(
    build_llama: Build, llama_folder: Path, refuses: Callable[..., None]
) -> None:
    model, weights = build_llama(), originals(llama_folder)
    refuses(
        model,
        lambda: inject(model, config("loftq"), seed=0, original=weights),
        TargetError,
        "'loftq' has no effect: no target is quant",
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda weight: None, TargetError, f"no original weight is given for {DOWN}"),
        (
            lambda weight: weight.T,
            ConfigError,
            rf"the original of {DOWN} is \(128, 64\) and its layer \(64, 128\)",
        ),
        (lambda weight: weight * torch.nan, ConfigError, "must be a matrix of finite values"),
    ],
    ids=["missing", "turned", "not finite"],
)
def test_originals_that_do_not_fit_are_refused_whole(
    build_nf4_llama: Build,
    llama_folder: Path,
    refuses: Callable[..., None],
    change: Callable[[Tensor], Tensor | None],
    error: type[Exception],
    message: str,
) -> None:
    model, weights = build_nf4_llama(), originals(llama_folder)
    changed = change(weights.pop(DOWN))
    given = weights if changed is None else {**weights, DOWN: changed}
    refuses(model, lambda: inject(model, config("loftq"), seed=0, original=given), error, message)


# --- files ---


@pytest.fixture
def started(
    build_nf4_llama: Build, llama_folder: Path, tokens: Tensor
) -> Callable[[str], LlamaForCausalLM]:
    """Return a maker of 4-bit models with an adapter of a given start."""

    def make(init: str) -> LlamaForCausalLM:
        model = build_nf4_llama()
        given = (
            {"data": calibration_batches(model, tokens)}
            if init == "eva"
            else {"original": originals(llama_folder)}
        )
        inject(model, config(init), seed=1, **given)
        return model

    return make


@pytest.mark.parametrize("init", ["eva", "loftq"])
def test_what_started_so_is_a_plain_adapter_of_the_4_bit_base(
    started: Callable[[str], LlamaForCausalLM],
    build_nf4_llama: Build,
    logits: Logits,
    tmp_path: Path,
    init: str,
) -> None:
    """PEFT would ask for settings of its own under either word; the file says `true`, and PEFT's logits are the same."""
    model = started(init)
    for _, layer in lora_layers(model):
        layer.lora_B.data += 0.05
    save_adapter(model, tmp_path / "ours", config(init), Identity())
    written = read_json(tmp_path / "ours" / "adapter_config.json")
    assert (written["init_lora_weights"], written["r"]) == (True, 4)
    again = build_nf4_llama()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    theirs = PeftModel.from_pretrained(
        build_nf4_llama(), tmp_path / "ours"
    ).train()  # in evaluation bitsandbytes rounds anew
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    assert (logits(model) - logits(build_nf4_llama())).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")
def test_a_drawn_start_beside_a_bias_of_b_is_read_by_peft(
    build_llama: Build, logits: Logits, randomise: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """It refuses the word `gaussian` beside lora_bias, and needs no word for weights that it reads."""
    model, both = build_llama(), config("gaussian", lora_bias=True)
    inject(model, both, seed=1)
    randomise(model)
    save_adapter(model, tmp_path, both, Identity())
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_an_eva_adapter_of_peft_is_read(
    build_llama: Build, tokens: Tensor, logits: Logits, tmp_path: Path, rho: float
) -> None:
    """With ranks that PEFT gave to the layers by their inputs, and layers it left out for that."""
    settings = PeftLoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=0.9),
    )
    theirs = get_peft_model(build_llama(), settings)
    initialize_lora_eva_weights(theirs, [{"input_ids": tokens}], show_progress_bar=False)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    theirs.eval().save_pretrained(tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["init_lora_weights"] == "eva"
    model = build_llama()
    targets = load_adapter(model, tmp_path)
    assert (len({target.rank for target in targets}) > 1) == (rho > 1)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)


def test_a_loftq_adapter_of_peft_belongs_to_another_base(
    build_llama: Build, adapter_folder: Path
) -> None:
    path = adapter_folder / "adapter_config.json"
    path.write_text(
        path.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "loftq"')
    )
    with pytest.raises(AdapterError, match="init_lora_weights='loftq', which changes the base"):
        load_adapter(build_llama(), adapter_folder)


def test_a_lazy_order_of_batches_is_followed(build_llama: Build, tokens: Tensor) -> None:
    """Batches may be made as they are pushed: one at a time is in memory."""
    model, made = build_llama(), []

    def stream() -> Iterator[Callable[[], object]]:
        for push in calibration_batches(model, tokens):
            made.append(push)
            yield push

    inject(model, config("eva"), seed=1, data=stream())
    assert len(made) == len(tokens)
