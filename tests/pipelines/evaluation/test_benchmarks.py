"""Every benchmark gives complete questions with one right answer, reproducible by seed."""

from importlib.util import find_spec

import pytest

from pipelines.errors import DataError
from pipelines.evaluation import benchmarks
from pipelines.evaluation.benchmarks import READERS, chats, passages, sample
from pipelines.evaluation.items import Item

COUNT = 25
CHOICES = {
    "hellaswag": {4},
    "piqa": {2},
    "arc_easy": {3, 4, 5},
    "openbookqa": {4},
    "winogrande": {2},
    "lambada": {2, 3, 4},
}
needs_wheel = pytest.mark.skipif(
    find_spec(benchmarks.PACKAGE) is None, reason="the wheel with the benchmarks is not installed"
)


@pytest.fixture(scope="module", params=READERS)
def items(request: pytest.FixtureRequest) -> list[Item]:
    """A sample of one benchmark."""
    return sample(request.param, COUNT, 7)


@needs_wheel
def test_a_sample_has_the_requested_number_of_items(items: list[Item]) -> None:
    assert len(items) == COUNT
    assert len({item.id for item in items}) == COUNT
    assert {item.benchmark for item in items} == {items[0].id.partition("/")[0]}


@needs_wheel
def test_the_right_answer_is_among_the_choices(items: list[Item]) -> None:
    for item in items:
        assert 0 <= item.gold < len(item.choices)
        assert len(item.choices) in CHOICES[item.benchmark]


@needs_wheel
def test_no_context_and_no_answer_is_empty(items: list[Item]) -> None:
    for item in items:
        assert item.context.strip()
        assert all(choice.scored.strip() for choice in item.choices)


@needs_wheel
def test_the_choices_of_an_item_differ(items: list[Item]) -> None:
    for item in items:
        assert len({choice.lead + choice.scored for choice in item.choices}) == len(item.choices)


@needs_wheel
def test_context_and_choice_join_with_one_blank(items: list[Item]) -> None:
    for item in items:
        assert not item.context.endswith(" ")
        for choice in item.choices:
            joined = choice.lead + choice.scored
            assert not joined.startswith("  ")
            assert joined.startswith(" ") or item.benchmark == "winogrande"


@needs_wheel
def test_the_same_seed_draws_the_same_items(items: list[Item]) -> None:
    assert sample(items[0].benchmark, COUNT, 7) == items


@needs_wheel
def test_another_seed_draws_other_items(items: list[Item]) -> None:
    assert [item.id for item in sample(items[0].benchmark, COUNT, 8)] != [item.id for item in items]


@needs_wheel
def test_too_many_items_are_refused_with_both_numbers() -> None:
    message = "items_per_benchmark=501 exceeds the 500 items of openbookqa; lower it"
    with pytest.raises(DataError, match=message):
        sample("openbookqa", 501, 7)


@needs_wheel
def test_all_items_of_a_benchmark_can_be_drawn() -> None:
    assert len({item.id for item in sample("openbookqa", 500, 7)}) == 500


@needs_wheel
def test_the_index_of_the_right_answer_varies(items: list[Item]) -> None:
    indices = {item.gold for item in items}
    if items[0].benchmark == "lambada":
        assert indices == {0}
    else:
        assert len(indices) > 1


@needs_wheel
def test_winogrande_scores_the_same_words_after_either_name() -> None:
    for item in sample("winogrande", 200, 7):
        first, second = item.choices
        assert first.scored == second.scored
        assert first.lead.strip() != second.lead.strip()


@needs_wheel
def test_lambada_compares_the_right_word_with_others() -> None:
    for item in sample("lambada", 200, 7):
        words = [choice.scored.strip().lower() for choice in item.choices]
        assert words[0] not in words[1:]
        assert len(words) > 1


@needs_wheel
def test_lambada_takes_its_wrong_words_from_the_passage() -> None:
    for item in sample("lambada", 200, 7):
        assert all(choice.scored.strip() in item.context for choice in item.choices[1:])


@needs_wheel
def test_hellaswag_shows_no_markup_of_its_source() -> None:
    for item in sample("hellaswag", 200, 7):
        text = item.context + "".join(choice.scored for choice in item.choices)
        assert "[" not in text
        assert "  " not in text


def test_a_missing_wheel_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmarks, "PACKAGE", "no_package_of_this_name")
    with pytest.raises(DataError, match="is not installed; run: pip install"):
        sample("piqa", 1, 7)


@needs_wheel
@pytest.mark.parametrize("sampled", [0, 300])
def test_chats_and_passages_are_not_among_the_items(sampled: int) -> None:
    items = sample("arc_easy", sampled, 7) + sample("lambada", sampled, 7)
    others = {name for name, _, _ in chats(200, 7, sampled)}
    others |= {item.id for item in passages(200, 7, sampled)}
    assert len(others) == 400
    assert not others & {item.id for item in items}


@needs_wheel
def test_a_chat_is_a_question_with_its_right_answer() -> None:
    known = {item.id: item for item in sample("arc_easy", 570, 7)}
    for name, question, answer in chats(50, 8, 0):
        item = known.get(name)
        if item is not None:
            assert item.context == f"Question: {question}\nAnswer:"
            assert item.choices[item.gold].scored.strip() == answer.strip()
    assert len({name for name, _, _ in chats(50, 8, 0)} & set(known)) > 10


@needs_wheel
def test_a_passage_is_complete() -> None:
    for item in passages(20, 7, 10):
        [choice] = item.choices
        assert (item.kind, item.context) == ("text", "")
        assert len(choice.scored.split()) > 30


@needs_wheel
def test_too_many_chats_are_refused_with_both_numbers() -> None:
    message = "chat_prompts=571 exceeds the 560 items of arc_easy that are not among the 10 sampled"
    with pytest.raises(DataError, match=f"{message}; lower it"):
        chats(571, 7, 10)
