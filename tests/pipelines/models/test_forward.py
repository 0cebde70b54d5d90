"""A pack gives what each example gives alone; a longer example is verified when it comes."""

from collections.abc import Callable

import pytest
import torch
from families.measure import drawn
from transformers import PreTrainedModel

from lora_core.training import attention
from pipelines.evaluation.scoring import tree_pack
from pipelines.evaluation.trees import build_prefix_tree
from pipelines.models.checked import Architecture, CheckedReader, Generation, excerpt
from pipelines.models.forward import EAGER, SDPA, PackReader, attending_by
from pipelines.models.packs import Pack, join, pack
from pipelines.training.objective import Objective

Family = Callable[..., PreTrainedModel]


def tree_of(wholes: list[list[int]], prompt: int) -> Pack:
    tree = build_prefix_tree(wholes, [prompt] * len(wholes))
    assert tree is not None
    return tree_pack([tree], "cpu")


TREE = tree_of([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 4, 3], [5, 6, 9]], 2)


def test_the_paths_of_a_pack_are_its_examples(examples_pack: Pack) -> None:
    paths = examples_pack.paths()
    read = [examples_pack.input_ids[path.places].tolist() for path in paths]
    assert read == [example["input_ids"] for example in drawn()]
    for path in paths:
        ids = examples_pack.input_ids[path.places]
        assert ids[path.at + 1].tolist() == examples_pack.targets[path.rows].tolist()


def test_the_paths_of_a_tree_are_its_answers_up_to_the_last_token_that_predicts() -> None:
    read = [TREE.input_ids[path.places].tolist() for path in TREE.paths()]
    assert read == [[5, 6, 7], [5, 6], [5, 6, 7, 4], [5, 6]]
    targets = [TREE.targets[path.rows].tolist() for path in TREE.paths()]
    assert targets == [[7, 8], [9], [7, 4, 3], [9]]


def test_joined_pieces_equal_the_pack(examples_pack: Pack) -> None:
    joined = join([examples_pack, TREE])
    again = join(joined.pieces())
    for name in ("input_ids", "position_ids", "predicts", "targets"):
        assert torch.equal(getattr(joined, name), getattr(again, name))


def test_an_excerpt_keeps_the_longest_and_the_shortest(examples_pack: Pack) -> None:
    small = excerpt(examples_pack)
    assert [segment.length for segment in small.segments] == [40, 4]
    assert small.longest == examples_pack.longest == 40
    answers = excerpt(TREE)
    targets = [answers.targets[path.rows].tolist() for path in answers.paths()]
    assert targets == [[7, 8], [7, 4, 3]]  # the first and the longest


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # its other name is newer than 5.20
@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text", "bloom", "lfm2"])
def test_recomputed_activations_give_the_same_gradients(
    family: Family, examples_pack: Pack, name: str
) -> None:
    """A mask is made once, in the forward pass, and is kept until a block is recomputed."""
    model = family(name).train()
    objective = Objective(model)
    parameters = list(model.parameters())
    plain = torch.autograd.grad(objective(examples_pack), parameters, allow_unused=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(objective(examples_pack), parameters, allow_unused=True)
    for one, other in zip(plain, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


def test_a_longer_example_than_those_verified_is_verified(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If windows are ignored, short examples agree and long ones do not.

    From the first long example on, the slow path is used.
    """
    monkeypatch.setattr(attention, "_within", lambda segment, visible: segment.mask)
    reader = CheckedReader(family("mistral"))
    short, long = (pack([one], "cpu") for one in (drawn()[3], drawn()[1]))
    reader.log_likelihoods(short, 8)
    verified = reader.verified
    assert verified is not None and (verified.path, verified.longest) == ("packed", 4)
    found, _ = reader.log_likelihoods(long, 8)
    verified = reader.verified
    assert verified is not None and verified.path == "one by one"
    assert (verified.longest, verified.examples) == (40, 2)
    with torch.no_grad():
        own, _ = PackReader(reader.model, packed=False, head=None).log_likelihoods(long, 8)
    torch.testing.assert_close(found, own)
    reader.log_likelihoods(short, 8)
    assert reader.verified is not None and reader.verified.path == "one by one"


def test_trees_are_verified_separately_from_examples(family: Family, examples_pack: Pack) -> None:
    reader = CheckedReader(family("llama"))
    reader.log_likelihoods(examples_pack, 8)
    reader.log_likelihoods(TREE, 8)
    assert reader.verified is not None and reader.verified.examples == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", Generation(SDPA, batched=True)),
        ("gemma2", Generation(EAGER, batched=True)),  # PyTorch's kernels cannot cap scores
        ("gpt_oss", Generation(EAGER, batched=True)),
        ("bloom", Generation(EAGER, batched=False)),
        ("mamba2", Generation(EAGER, batched=False)),
    ],
)
def test_answers_are_generated_in_batches_if_that_changes_none(
    family: Family, name: str, expected: Generation
) -> None:
    reader = CheckedReader(family(name))
    assert reader.generation([[5, 6, 7], [9, 10, 11, 12, 13]]) == expected


def test_attention_is_restored_if_a_family_refuses_it(family: Family) -> None:
    model = family("gpt_oss")
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="scaled_dot_product_attention"), attending_by(model, SDPA):
        pass
    assert model.config._attn_implementation == before


def test_a_tree_of_one_token_is_scored(family: Family) -> None:
    """A single token has no future that it could read."""
    reader = CheckedReader(family("llama"))
    for tree in (tree_of([[3, 4]], 1), tree_of([[3, 4], [3, 5, 6, 7]], 1)):
        found, _ = reader.log_likelihoods(tree, 8)
        assert torch.isfinite(found).all() and len(found) == len(tree.targets)


def test_what_any_verification_rejected_is_avoided(family: Family, examples_pack: Pack) -> None:
    model = family("llama")
    closed = PackReader.default(model).head
    packed = PackReader(model, packed=True, head=None)
    alone = PackReader(model, packed=False, head=closed)
    architecture = Architecture()
    architecture.record(packed, examples_pack)
    architecture.record(alone, examples_pack)
    best = PackReader.default(model)
    assert architecture.limited(best) == PackReader(model, packed=False, head=None)


def test_a_second_model_is_verified_on_short_examples(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the length of the first; what the first one's long examples rejected is avoided."""
    monkeypatch.setattr(attention, "_within", lambda segment, visible: segment.mask)
    architecture = Architecture()
    short, long = (pack([one], "cpu") for one in (drawn()[3], drawn()[1]))
    first = CheckedReader(family("mistral"), architecture)
    first.log_likelihoods(long, 8)
    assert first.verified is not None
    assert (first.verified.path, first.verified.longest) == ("one by one", 40)
    second = CheckedReader(family("mistral"), architecture)
    second.log_likelihoods(join([long, short]), 8)
    assert second.verified is not None
    assert (second.verified.path, second.verified.longest) == ("one by one", 4)
    longer = pack([{"input_ids": [*range(1, 61)], "supervised": [False] + [True] * 59}], "cpu")
    second.log_likelihoods(longer, 8)
    assert second.verified.longest == 60


def test_an_out_of_memory_error_is_raised_and_not_taken_for_an_incompatibility(
    family: Family, examples_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(reader: PackReader, pack: Pack) -> torch.Tensor:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 8 bytes"
        )

    monkeypatch.setattr(PackReader, "rows", short)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        CheckedReader(family("llama")).log_likelihoods(examples_pack, 8)
