"""Packs are read as each example alone; longer examples than those verified are verified when they come."""

from collections.abc import Callable

import pytest
import torch
from families.measure import drawn
from transformers import PreTrainedModel

from lora_core.training import attention
from pipelines.evaluation.scoring import tree_pack
from pipelines.evaluation.trees import build_prefix_tree
from pipelines.models.checked import CheckedReader, Generation, _slower_of, excerpt
from pipelines.models.forward import EAGER, SDPA, PackReader, attending_by
from pipelines.models.packs import Pack, join, pack
from pipelines.training.objective import Objective

Family = Callable[..., PreTrainedModel]


def tree_of(wholes: list[list[int]], prompt: int) -> Pack:
    tree = build_prefix_tree(wholes, [prompt] * len(wholes))
    assert tree is not None
    return tree_pack([tree], "cpu")


TREE = tree_of([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 4, 3], [5, 6, 9]], 2)


def test_the_paths_of_examples_are_the_examples(examples_pack: Pack) -> None:
    paths = examples_pack.paths()
    assert [examples_pack.input_ids[path.places].tolist() for path in paths] == [
        one["input_ids"] for one in drawn()
    ]
    for path in paths:
        ids = examples_pack.input_ids[path.places]
        assert ids[path.at + 1].tolist() == examples_pack.targets[path.rows].tolist()


def test_the_paths_of_a_tree_are_its_answers_up_to_the_last_token_that_predicts() -> None:
    read = [TREE.input_ids[path.places].tolist() for path in TREE.paths()]
    assert read == [[5, 6, 7], [5, 6], [5, 6, 7, 4], [5, 6]]
    assert [TREE.targets[path.rows].tolist() for path in TREE.paths()] == [
        [7, 8],
        [9],
        [7, 4, 3],
        [9],
    ]


def test_pieces_join_to_the_whole(examples_pack: Pack) -> None:
    whole = join([examples_pack, TREE])
    again = join(whole.pieces())
    for name in ("input_ids", "position_ids", "predicts", "targets"):
        assert torch.equal(getattr(whole, name), getattr(again, name))


def test_an_excerpt_keeps_the_longest_and_the_shortest(examples_pack: Pack) -> None:
    small = excerpt(examples_pack)
    assert [segment.length for segment in small.segments] == [40, 4]
    assert small.longest == examples_pack.longest == 40
    answers = excerpt(TREE)
    assert [answers.targets[path.rows].tolist() for path in answers.paths()] == [
        [7, 8],
        [7, 4, 3],
    ]  # the first and the longest


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # its other name is newer than 5.20
@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text", "bloom", "lfm2"])
def test_recomputed_activations_give_the_same_gradients(
    family: Family, examples_pack: Pack, name: str
) -> None:
    """A mask is made once, in the forward pass, and is there when a block is computed again."""
    model = family(name).train()
    objective, parameters = Objective(model), list(model.parameters())
    plain = torch.autograd.grad(objective(examples_pack), parameters, allow_unused=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(objective(examples_pack), parameters, allow_unused=True)
    for one, other in zip(plain, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


def test_an_example_longer_than_those_verified_is_verified_when_it_comes(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows dropped, short examples agree and long ones do not: from the first long one on, the slow path is taken."""
    monkeypatch.setattr(attention, "_within", lambda segment, visible: segment.mask)
    reader = CheckedReader(family("mistral"))
    short, long = (pack([one], "cpu") for one in (drawn()[3], drawn()[1]))
    reader.log_likelihoods(short, 8)
    assert reader.verified is not None and (reader.verified.path, reader.verified.longest) == (
        "packed",
        4,
    )
    found, _ = reader.log_likelihoods(long, 8)
    assert (reader.verified.path, reader.verified.longest, reader.verified.examples) == (
        "one by one",
        40,
        2,
    )
    with torch.no_grad():
        own, _ = PackReader(reader.model, packed=False, head=None).log_likelihoods(long, 8)
    torch.testing.assert_close(found, own)
    reader.log_likelihoods(short, 8)
    assert reader.verified.path == "one by one"  # it stays so


def test_trees_are_verified_apart_from_examples(family: Family, examples_pack: Pack) -> None:
    reader = CheckedReader(family("llama"))
    reader.log_likelihoods(examples_pack, 8)
    reader.log_likelihoods(TREE, 8)
    assert reader.verified is not None and reader.verified.examples == 4


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("llama", Generation(SDPA, batched=True)),
        (
            "gemma2",
            Generation(EAGER, batched=True),
        ),  # its capped scores are more than PyTorch's kernels compute
        ("gpt_oss", Generation(EAGER, batched=True)),
        ("bloom", Generation(EAGER, batched=False)),
        ("mamba2", Generation(EAGER, batched=False)),
    ],
)
def test_answers_are_written_in_batches_where_that_changes_none(
    family: Family, name: str, way: Generation
) -> None:
    reader = CheckedReader(family(name))
    assert reader.generation([[5, 6, 7], [9, 10, 11, 12, 13]]) == way


def test_attention_is_set_back_also_where_a_family_refuses_it(family: Family) -> None:
    model = family("gpt_oss")
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="scaled_dot_product_attention"), attending_by(model, SDPA):
        pass
    assert model.config._attn_implementation == before


def test_a_tree_of_one_token_is_scored(family: Family) -> None:
    """Nothing follows a single token, so nothing of it can look ahead."""
    reader = CheckedReader(family("llama"))
    for tree in (tree_of([[3, 4]], 1), tree_of([[3, 4], [3, 5, 6, 7]], 1)):
        found, _ = reader.log_likelihoods(tree, 8)
        assert torch.isfinite(found).all() and len(found) == len(tree.targets)


def test_what_either_verification_rejected_is_avoided(family: Family) -> None:
    model = family("llama")
    closed = PackReader.default(model).head
    packed, alone = (
        PackReader(model, packed=True, head=None),
        PackReader(model, packed=False, head=closed),
    )
    assert _slower_of(packed, alone) == PackReader(model, packed=False, head=None)


def test_want_of_memory_is_not_taken_for_another_family(
    family: Family, examples_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(reader: PackReader, pack: Pack) -> torch.Tensor:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        )

    monkeypatch.setattr(PackReader, "rows", short)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        CheckedReader(family("llama")).log_likelihoods(examples_pack, 8)
