"""Factories for item records, and for the summary of a comparison."""

from collections.abc import Callable, Sequence
from math import log
from typing import Any, Literal

import numpy as np
import pytest
from synthetic_models import BASE, CONTROL, ITEMS, NF4, SyntheticModel, compared_model

from pipelines.comparison.comparison import ComparisonContext, compare
from pipelines.comparison.document import Comparison
from pipelines.comparison.record_types import (
    ChatRecord,
    ChoiceRecord,
    GenerationRecord,
    ItemRecord,
    LeftOutRecord,
    PassageRecord,
    ScoreRecord,
    SingleAnswerRecord,
    TaskRecord,
)
from pipelines.config.recipe import Recipe, parse_recipe

Values = dict[str, Any]
Records = list[ItemRecord]
Maker = Callable[..., Records]
MakeModel = Callable[[SyntheticModel, int], Records]
Summarize = Callable[..., Comparison]


@pytest.fixture(scope="session")
def task_records() -> Maker:
    """Return a factory of held-out examples, from loss per token and number of tokens."""

    def make(losses: Sequence[float], tokens: Sequence[int] | None = None) -> Records:
        counts = tokens or [10 + number % 3 for number in range(len(losses))]
        records: Records = []
        for number, (loss, count) in enumerate(zip(losses, counts, strict=True)):
            record = TaskRecord(
                id=number, prompt_sha256=f"digest of {number}", nll=loss * count, tokens=count
            )
            records.append(record)
        return records

    return make


@pytest.fixture(scope="session")
def general_records() -> Maker:
    """Return a factory of questions with two choices of four bytes.

    They are made from the probability of each right choice.
    """

    def make(benchmark: str, probabilities: Sequence[float]) -> Records:
        records: Records = []
        for number, probability in enumerate(probabilities):
            gold = number % 2
            choices = (log(probability), log(1 - probability))
            record = ChoiceRecord(
                id=f"{benchmark}/{number}",
                benchmark=benchmark,
                prompt_sha256=f"digest of {benchmark}/{number}",
                gold=gold,
                log_likelihoods=choices[::-1] if gold else choices,
                bytes=(4, 4),
                greedy=(False, False),
            )
            records.append(record)
        return records

    return make


@pytest.fixture(scope="session")
def generation_records() -> Maker:
    """Return a factory of generated answers, from the metrics of each."""

    def make(metrics: Sequence[dict[str, float]], *, ended: bool = True) -> Records:
        return [
            GenerationRecord(
                id=number,
                benchmark="answers",
                prompt_sha256=f"digest of {number}",
                prompt=f"question {number}",
                reference="the cat sat on the mat",
                answer="the cat sat on the mat",
                metrics=dict(values),
                errors={},
                ended=ended,
            )
            for number, values in enumerate(metrics)
        ]

    return make


@pytest.fixture(scope="session")
def probe_records() -> Maker:
    """Return a factory of questions with one answer, from whether each answer was the likeliest."""

    def make(benchmark: str, greedy: Sequence[bool]) -> Records:
        return [
            SingleAnswerRecord(
                id=f"{benchmark}/{number}",
                benchmark=benchmark,
                prompt_sha256=f"digest of {number}",
                nll=3.0,
                tokens=2,
                bytes=7,
                greedy=right,
            )
            for number, right in enumerate(greedy)
        ]

    return make


@pytest.fixture(scope="session")
def score_records() -> Maker:
    """Return a factory of documents of a task with its own score, from the score of each."""

    def make(benchmark: str, values: Sequence[float], *, higher_is_better: bool = True) -> Records:
        return [
            ScoreRecord(
                id=f"{benchmark}/{number}",
                benchmark=benchmark,
                prompt_sha256=f"digest of {number}",
                metric="f1",
                value=float(value),
                higher_is_better=higher_is_better,
            )
            for number, value in enumerate(values)
        ]

    return make


@pytest.fixture(scope="session")
def loss_records() -> Maker:
    """Return a factory of passages or chats, from their summed losses; a chat has two positions."""

    def make(kind: Literal["text", "chat"], losses: Sequence[float]) -> Records:
        one = {"text": passage, "chat": chat}[kind]
        return [one(number, float(loss)) for number, loss in enumerate(losses)]

    return make


def passage(number: int, loss: float) -> PassageRecord:
    return PassageRecord(
        id=f"passages/{number}",
        benchmark="passages",
        prompt_sha256=f"digest of {number}",
        nll=loss,
        tokens=5,
        bytes=20,
    )


def chat(number: int, loss: float) -> ChatRecord:
    return ChatRecord(
        id=f"chat/{number}",
        benchmark="chat",
        prompt_sha256=f"digest of {number}",
        nll=loss,
        tokens=5,
        rows=(2 * number, 2 * number + 2),
    )


@pytest.fixture(scope="session")
def without() -> Callable[[Records, int | str], Records]:
    """Return a function that leaves one item out."""

    def leave(records: Records, name: int | str) -> Records:
        return [left_out(record) if record.id == name else record for record in records]

    return leave


def left_out(record: ItemRecord) -> LeftOutRecord:
    assert not isinstance(record, TaskRecord)
    return LeftOutRecord(
        kind=record.kind,
        id=record.id,
        benchmark=record.benchmark,
        prompt_sha256=record.prompt_sha256,
        left_out="1,234 tokens exceed the context of 1,024",
    )


@pytest.fixture
def recipe(recipe_with: Callable[..., Values]) -> Recipe:
    return parse_recipe(recipe_with())


@pytest.fixture
def model(task_records: Maker, general_records: Maker, generation_records: Maker) -> MakeModel:
    """Return a factory of one model's records; the seed determines its own deviations."""

    def make(synthetic: SyntheticModel, seed: int) -> Records:
        difficulty = np.random.default_rng(0)
        rng = np.random.default_rng(seed)
        shared = difficulty.uniform(-1, 1, ITEMS)
        losses = synthetic.loss + shared + rng.normal(0, 0.02, ITEMS)
        records = task_records(list(losses))
        for benchmark in ("piqa", "winogrande"):
            shared = difficulty.uniform(-0.1, 0.1, ITEMS)
            own = rng.normal(0, synthetic.noise, ITEMS)
            probabilities = (synthetic.probability + shared + own).clip(0.01, 0.99)
            records += general_records(benchmark, list(probabilities))
        return records + generation_records([{"chrf": 10 * synthetic.loss}] * 2)

    return make


@pytest.fixture
def summarize(recipe: Recipe, model: MakeModel) -> Summarize:
    """Return a function from synthetic models to the summary.

    Adapters are keyword arguments such as rank_2. `also` has models by label, `under` is another
    recipe, and `control` is None for a comparison without a control.
    """

    def run(
        *,
        nf4: SyntheticModel | None = NF4,
        control: SyntheticModel | None = CONTROL,
        also: dict[str, SyntheticModel] | None = None,
        under: Recipe = recipe,
        context: ComparisonContext | None = None,
        **adapters: SyntheticModel,
    ) -> Comparison:
        models = {"base": BASE, "base-nf4": nf4, "control": control}
        trained = []
        if control is not None:
            trained.append(compared_model("control", None))
        for name, adapter in adapters.items():
            label = name.replace("_", "-")
            models[label] = adapter
            trained.append(compared_model(label, int(label.removeprefix("rank-"))))
        models |= also or {}
        items = {}
        for seed, (label, synthetic) in enumerate(models.items()):
            if synthetic is not None:
                items[label] = model(synthetic, seed)
        return compare(under, trained, items, context)

    return run
