"""A start from data is the start that the decomposition of all inputs at once would give, and leaves no trace."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lora_core import ConfigError, LoraConfig, TargetError, inject
from lora_core.calibration.eva import eva_starts, input_spectra, redistributed

BLOCK = "model.layers.1"
QKV = tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")
Build = Callable[..., LlamaForCausalLM]
# float32 decompositions, each exact to about 1e-6 of the largest singular value.
CLOSE = {"rtol": 0, "atol": 1e-5}


class Pair(nn.Module):
    """Two layers that read one tensor, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.first(x) + self.second(x if other is None else other)


def falling(rows: int, width: int, *, spread: float = 0.7) -> Tensor:
    """Return rows whose directions are clearly apart in strength."""
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    return torch.randn(rows, width) * spread ** torch.arange(width) @ basis


def parts(rows: Tensor, *sizes: int) -> Iterator[Tensor]:
    yield from rows.split(list(sizes))


def projector(rows: Tensor) -> Tensor:
    """Return the projection onto a row space: equal for equal subspaces, whatever their signs."""
    return rows.T @ rows


def test_the_directions_are_those_of_all_inputs_at_once() -> None:
    """With k at the number of features nothing is cut, so the order of the batches and their sizes cannot matter."""
    model, rows = Pair(), falling(60, 12)
    found = input_spectra(
        model,
        ["first"],
        [lambda part=part: model(part) for part in parts(rows, 20, 3, 37)],
        rank=12,
    )["first"]
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(found.values, values, rtol=0, atol=1e-5 * values[0].item())
    for rank in (1, 4, 8):
        torch.testing.assert_close(
            projector(found.right[:rank]), projector(right[:rank]), rtol=0, atol=1e-4
        )  # 1e-6 over a gap of 0.02
    torch.testing.assert_close(found.right @ found.right.T, torch.eye(12), **CLOSE)
    torch.testing.assert_close(found.explained, values.square() / rows.square().sum(), **CLOSE)


def test_directions_few_enough_are_followed_without_loss() -> None:
    model, rows = Pair(), torch.randn(40, 4) @ torch.randn(4, 12)
    batches = [lambda part=part: model(part) for part in rows.split(5)]
    found = input_spectra(model, ["first"], batches, rank=4)["first"]
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(found.values, values[:4], rtol=1e-5, atol=0)
    torch.testing.assert_close(projector(found.right), projector(right[:4]), **CLOSE)
    assert found.explained.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_cut_follows_the_strongest_directions() -> None:
    """Rank 3 of 12 in ten batches: nearly what the whole decomposition keeps, and never more."""
    model, rows = Pair(), falling(200, 12, spread=0.5)
    found = input_spectra(
        model, ["first"], [lambda part=part: model(part) for part in rows.split(20)], rank=3
    )["first"]
    best = torch.linalg.svdvals(rows)[:3].square().sum() / rows.square().sum()
    kept = (rows @ found.right.T).square().sum() / rows.square().sum()
    assert 0.999 * best < kept <= best * (1 + 1e-6)
    assert found.explained.sum() <= kept * (1 + 1e-6)


def test_starts_are_orthonormal_rows_of_the_inputs_of_a_language_model(
    build_llama: Build, tokens: Tensor
) -> None:
    model, seen = build_llama(), {}
    targets = dict.fromkeys(QKV, 4) | {f"{BLOCK}.mlp.down_proj": 6}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
        for name in targets
    ]
    starts = eva_starts(model, targets, [lambda: model(input_ids=tokens, use_cache=False)])
    for hook in hooks:
        hook.remove()
    assert {name: len(start) for name, start in starts.items()} == targets
    for name, start in starts.items():
        rows = seen[name].flatten(0, -2)
        torch.testing.assert_close(start @ start.T, torch.eye(len(start)), **CLOSE)
        best = torch.linalg.svdvals(rows)[: len(start)].norm()
        assert (rows @ start.T).norm().item() == pytest.approx(best.item(), rel=1e-5)


def test_layers_of_one_input_share_one_decomposition(
    build_llama: Build, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, svd = build_llama(), [], torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg,
        "svd",
        lambda *args, **kwargs: calls.append(args[0].shape) or svd(*args, **kwargs),
    )
    targets = dict(zip((*QKV, f"{BLOCK}.self_attn.o_proj"), (2, 4, 3, 2), strict=True))
    starts = eva_starts(model, targets, 3 * [lambda: model(input_ids=tokens, use_cache=False)])
    assert len(calls) == 3 * 2  # batches × distinct inputs, not × targets
    assert (
        max(rows for _, rows in calls) == 4 + tokens.numel()
    )  # the directions kept and the rows of a batch
    assert torch.equal(starts[QKV[0]], starts[QKV[1]][:2])
    assert starts[QKV[0]].data_ptr() != starts[QKV[1]].data_ptr()


def test_a_tensor_written_to_between_two_layers_is_two_inputs() -> None:
    model, x = Pair(), torch.randn(5, 12)

    def halve(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].mul_(0.5)

    model.second.register_forward_pre_hook(halve)
    found = input_spectra(model, ["first", "second"], [lambda: model(x.clone())], rank=2)
    torch.testing.assert_close(found["second"].values, 0.5 * found["first"].values)


def test_batches_may_run_in_inference_mode() -> None:
    model, x = Pair(), torch.randn(5, 12)
    starts = eva_starts(
        model, {"first": 2, "second": 2}, [torch.inference_mode()(lambda: model(x.clone()))]
    )
    assert not starts["first"].is_inference()
    torch.testing.assert_close(
        projector(starts["first"]), projector(torch.linalg.svd(x).Vh[:2]), **CLOSE
    )


def test_an_adapted_model_gives_the_starts_of_its_base(build_llama: Build, tokens: Tensor) -> None:
    base, adapted = build_llama(), build_llama()
    inject(adapted, LoraConfig(r=4, lora_alpha=8), seed=0)
    starts = [
        eva_starts(m, {QKV[0]: 3}, [lambda m=m: m(input_ids=tokens, use_cache=False)])
        for m in (base, adapted)
    ]
    assert torch.equal(starts[0][QKV[0]], starts[1][QKV[0]])


def test_a_wrapper_changes_no_path(
    build_llama: Build, tokens: Tensor, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    plain, wrapped = build_llama(), wrapper(build_llama())
    starts = [
        eva_starts(m, {QKV[0]: 3}, [lambda m=m: m(input_ids=tokens, use_cache=False)])
        for m in (plain, wrapped)
    ]
    torch.testing.assert_close(projector(starts[0][QKV[0]]), projector(starts[1][QKV[0]]), **CLOSE)


def test_a_compiled_block_changes_no_path(build_llama: Build, tokens: Tensor) -> None:
    plain, compiled = build_llama(), build_llama()
    compiled.model.layers[1] = torch.compile(compiled.model.layers[1], backend="eager")
    starts = [
        eva_starts(m, {QKV[0]: 3}, [lambda m=m: m(input_ids=tokens, use_cache=False)])
        for m in (plain, compiled)
    ]
    torch.testing.assert_close(projector(starts[0][QKV[0]]), projector(starts[1][QKV[0]]), **CLOSE)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(
    build_llama: Build, tokens: Tensor, state_of: Callable, assert_same_state: Callable, fails: bool
) -> None:
    model = build_llama().train()
    before = state_of(model)

    def push() -> None:
        model(input_ids=tokens, use_cache=False)
        if fails:
            raise KeyboardInterrupt

    try:
        eva_starts(model, {QKV[0]: 3}, [push])
    except KeyboardInterrupt:
        assert fails
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert_same_state(state_of(model), before)
    assert model.training
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({}, ConfigError, "no target"),
        ({"third": 2}, TargetError, "the model has no module 'third'"),
        ({"": 2}, TargetError, "is no linear layer"),
        ({"first": 0}, ConfigError, "rank 0 of first, which reads 12 features"),
        ({"first": 13}, ConfigError, "rank 13 of first, which reads 12 features"),
        ({"first": 6}, ConfigError, "first received 5 rows, fewer than its rank 6"),
    ],
)
def test_targets_that_cannot_start_are_refused(
    targets: dict[str, int], error: type[Exception], message: str
) -> None:
    model = Pair()
    with pytest.raises(error, match=message):
        eva_starts(model, targets, [lambda: model(torch.randn(5, 12))])


def test_a_rank_to_follow_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match="rank=0 must be at least 1"):
        input_spectra(Pair(), ["first"], [], rank=0)


def test_inputs_that_say_nothing_are_refused() -> None:
    model = Pair()
    for batches in ([], [lambda: model(torch.zeros(5, 12))]):
        with pytest.raises(TargetError, match="first received no input other than zero"):
            eva_starts(model, {"first": 2}, batches)
    with pytest.raises(ConfigError, match="an input of first is not finite"):
        eva_starts(model, {"first": 2}, [lambda: model(torch.full((5, 12), torch.nan))])


def test_layers_that_share_their_input_only_at_times_are_refused() -> None:
    """Either spectrum would hold rows of the other; apart, each is right."""
    model, x, other = Pair(), torch.randn(6, 12), torch.randn(6, 12)
    batches = [lambda: model(x), lambda: model(x + 1, other)]
    with pytest.raises(
        TargetError, match="shares its input with another target in some batches only"
    ):
        input_spectra(model, ["first", "second"], batches, rank=2)
    alone = input_spectra(model, ["second"], batches, rank=12)["second"]
    torch.testing.assert_close(
        alone.values, torch.linalg.svdvals(torch.cat([x, other])), rtol=0, atol=1e-5
    )


# --- ranks by what the inputs offer ---


def test_ranks_go_to_the_strongest_directions() -> None:
    explained = {
        "a": torch.tensor([0.9, 0.05, 0.01]),
        "b": torch.tensor([0.4, 0.3, 0.2]),
        "c": torch.tensor([0.04, 0.03, 0.02]),
    }
    assert redistributed(explained, 4) == {"a": 1, "b": 3, "c": 0}
    assert redistributed(explained, 6) == {"a": 2, "b": 3, "c": 1}
    assert redistributed(explained, 9) == {"a": 3, "b": 3, "c": 3}


def test_equal_shares_go_to_the_layer_named_first() -> None:
    shares = torch.tensor([0.5, 0.25])
    assert redistributed({"b": shares, "a": shares}, 3) == {"b": 2, "a": 1}


@pytest.mark.parametrize("budget", [0, -1, 5])
def test_a_budget_that_cannot_be_spent_is_refused(budget: int) -> None:
    with pytest.raises(ConfigError, match=f"budget={budget} must lie in 1 to 4"):
        redistributed({"a": torch.tensor([0.5, 0.2]), "b": torch.tensor([0.5, 0.2])}, budget)
