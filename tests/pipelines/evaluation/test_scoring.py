"""Each choice of a question scores as if it were read alone, in any pack and any order.

The reference shares no code with the scorer: it loads the weights again with PyTorch's own
attention, joins the tokens of context and answer itself, and sums a log-softmax. 1e-4 nats is a
hundred times what float32 loses on such sums.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pipelines.evaluation.scoring
from pipelines.comparison.record_types import ChoiceRecord
from pipelines.errors import DataError
from pipelines.evaluation.evaluate import scored
from pipelines.evaluation.items import Choice, Item
from pipelines.evaluation.questions import tokenize
from pipelines.evaluation.scoring import score_examples
from pipelines.models.checked import CheckedReader
from pipelines.runtime.stage import digest

NATS = 1e-4


def item(
    context: str, *choices: str | tuple[str, str], gold: int = 0, benchmark: str = "piqa"
) -> Item:
    made = tuple(Choice("", one) if isinstance(one, str) else Choice(*one) for one in choices)
    return Item(benchmark, f"{benchmark}/{context}", context, made, gold)


ITEMS = {
    "four answers": item(
        "The quick brown fox",
        " jumps over the dog.",
        " sleeps.",
        " looks on.",
        " returns the number of items.",
    ),
    "two answers": item("Question: what?\nAnswer:", " a list", " the lazy dog"),
    "one token": item("Say", " a", " b", " c"),
    "one token and several": item("Say", " a", " abc def"),
    "shared first tokens": item(
        "def area(width, height):", " return width * height", " return width", " return height"
    ),
    "one is a prefix of the other": item("Look", " on", " on the fox", " on the fox jumps"),
    "equal answers": item("Look", " on", " on"),
    "the gap is a name": item(
        "Then", (" Anna", " was late."), (" Ben", " was late."), benchmark="winogrande"
    ),
    "names with a common prefix": item(
        "Then", (" Anna", " was late."), (" Annabel", " was late."), benchmark="winogrande"
    ),
    "the gap comes first": item("The", (" fox", "."), (" dog", "."), benchmark="winogrande"),
    "one name is a prefix of the other": item(
        "Then",
        (" the fox", " was late."),
        (" the fox that jumps", " was late."),
        benchmark="winogrande",
    ),
    "beyond ASCII": item("Größe:", " 0 µm", " ∞"),
}


@torch.inference_mode()
def plain_score(
    reference: PreTrainedModel, read: list[int], scored: list[int]
) -> tuple[float, bool]:
    """Return the log-likelihood of `scored` after `read`, and whether it is greedy."""
    output = reference(input_ids=torch.tensor([read + scored]), use_cache=False)
    logits: Tensor = output.logits[0, len(read) - 1 : -1]
    chosen = logits.double().log_softmax(dim=-1).gather(1, torch.tensor(scored)[:, None])
    return float(chosen.sum()), logits.argmax(dim=-1).tolist() == scored


def plain_scores(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, one: Item
) -> Iterator[tuple[float, bool]]:
    for choice in one.choices:
        read = tokenizer(one.context + choice.lead).input_ids
        yield plain_score(reference, read, tokenizer(choice.scored).input_ids)


def score_items(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
) -> list[ChoiceRecord]:
    records = list(scored(CheckedReader(model), tokenize(items, tokenizer, None)))
    assert all(isinstance(record, ChoiceRecord) for record in records)
    return records


def scored_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, one: Item
) -> ChoiceRecord:
    [record] = score_items(model, tokenizer, [one])
    return record


@pytest.mark.parametrize("name", ITEMS)
def test_each_choice_scores_as_if_read_alone(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> None:
    record = scored_alone(model, tokenizer, ITEMS[name])
    expected = list(plain_scores(reference, tokenizer, ITEMS[name]))
    assert record.log_likelihoods == pytest.approx([score for score, _ in expected], abs=NATS)
    assert record.greedy == tuple(greedy for _, greedy in expected)


def test_the_model_of_these_tests_depends_on_its_context(
    model: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    contexts = ("The quick brown fox", "The quick brown dog", "A quick brown fox")
    scores = []
    for context in contexts:
        [(score, _)] = plain_scores(reference, tokenizer, item(context, " jumps over."))
        scores.append(score)
    assert min(abs(a - b) for a, b in combinations(scores, 2)) > 1000 * NATS


@pytest.mark.parametrize(
    "pack_tokens", [1, 60, 10_000], ids=["each alone", "a few together", "all together"]
)
def test_packing_does_not_change_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    pack_tokens: int,
) -> None:
    items = list(ITEMS.values()) * 3
    alone = [scored_alone(model, tokenizer, one) for one in items]
    monkeypatch.setattr(pipelines.evaluation.scoring, "PACK_TOKENS", pack_tokens)
    together = score_items(model, tokenizer, items)
    assert [record.id for record in together] == [one.id for one in items]
    for one, other in zip(together, alone, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=NATS)
        assert one.greedy == other.greedy


def test_the_order_of_the_choices_does_not_change_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    one = ITEMS["four answers"]
    reversed_item = Item(one.benchmark, one.id, one.context, tuple(reversed(one.choices)), 3)
    scores = scored_alone(model, tokenizer, one).log_likelihoods
    found = scored_alone(model, tokenizer, reversed_item).log_likelihoods
    assert found == pytest.approx(scores[::-1], abs=NATS)


@pytest.mark.parametrize("count", [1, 3])
def test_the_likeliest_answer_is_greedy(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> None:
    context, answer = greedy_answer(reference, tokenizer, count)
    assert scored_alone(model, tokenizer, item(context, answer, answer + "#")).greedy[0] is True


def greedy_answer(
    reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
) -> tuple[str, str]:
    """Return a context and the text of its `count` likeliest next tokens.

    The text is tokenized as those tokens.
    """
    for start in range(32, 127):
        context = f"The fox {chr(start)}"
        ids = tokenizer(context).input_ids
        with torch.inference_mode():
            for _ in range(count):
                output = reference(input_ids=torch.tensor([ids]), use_cache=False)
                ids = [*ids, int(output.logits[0, -1].argmax())]
        text = tokenizer.decode(ids)
        if tokenizer(text).input_ids == ids and text.startswith(context):
            return context, text.removeprefix(context)
    raise AssertionError(
        "no answer to these contexts is tokenized as it was generated; use another seed"
    )


def test_a_record_identifies_its_question_and_has_the_length_of_the_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    record = scored_alone(model, tokenizer, item("Größe:", " 0 µm", " ∞", gold=1))
    assert record.bytes == (6, 4)
    assert (record.kind, record.benchmark) == ("general", "piqa")
    assert (record.id, record.gold) == ("piqa/Größe:", 1)


@pytest.mark.parametrize(
    "one",
    [item("Say", " a", ""), item("Say", (" a", ""), (" b", " c")), item("", " a", " b")],
    ids=["no answer", "only a lead", "no context"],
)
def test_an_empty_side_is_refused_by_name(tokenizer: PreTrainedTokenizerBase, one: Item) -> None:
    with pytest.raises(DataError, match=f"{one.id} has an empty context or answer; leave it out"):
        tokenize([one], tokenizer, None)


def test_no_items_give_no_records(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert score_items(model, tokenizer, []) == []
    assert list(score_examples(CheckedReader(model), [])) == []


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase) -> Sequence[dict[str, Any]]:
    """Nineteen examples, more than two packs, with one and with several supervised spans."""
    made = []
    for number in range(19):
        text = f"Say red {number * 37}. " + "red " * (number % 5) + "green blue."
        ids = tokenizer(text).input_ids
        period = 2 + number % 3
        supervised = [index > 4 and (index + number) % period != 0 for index in range(len(ids))]
        made.append({"input_ids": ids, "supervised": supervised})
    return made


def test_the_digest_of_an_example_covers_its_tokens_and_its_supervision(
    model: PreTrainedModel, examples: Sequence[dict[str, Any]]
) -> None:
    [first, second] = examples[:2]
    others = [
        {**first, "input_ids": first["input_ids"][::-1]},
        {**first, "supervised": [not one for one in first["supervised"]]},
    ]
    records = score_examples(CheckedReader(model), [first, second, *others, first])
    digests = [record.prompt_sha256 for record in records]
    assert digests[0] == digests[4] == digest([first["input_ids"], first["supervised"]])
    assert len(set(digests)) == 4


def test_an_example_scores_the_plain_loss(
    model: PreTrainedModel, reference: PreTrainedModel, examples: Sequence[dict[str, Any]]
) -> None:
    records = list(score_examples(CheckedReader(model), examples))
    assert [(record.kind, record.id) for record in records] == [
        ("task", number) for number in range(len(examples))
    ]
    for record, example in zip(records, examples, strict=True):
        ids = torch.tensor(example["input_ids"])
        with torch.inference_mode():
            logits = reference(input_ids=ids[None], use_cache=False).logits[0]
        labels = ids.where(torch.tensor(example["supervised"]), -100)
        loss = torch.nn.functional.cross_entropy(logits[:-1].double(), labels[1:], reduction="sum")
        assert record.nll == pytest.approx(float(loss), abs=NATS)
        assert record.tokens == sum(example["supervised"])
