"""Factories for the item records that only the comparison reads, and for its summary.

Those of held-out examples and multiple-choice questions are in the parent folder's conftest.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from synthetic_models import BASE, CONTROL, ITEMS, NF4, SyntheticModel, compared_model

from pipelines.comparison.comparison import ComparisonContext, compare
from pipelines.comparison.document import Comparison
from pipelines.config.recipe import Recipe, parse_recipe

Values = dict[str, Any]
Maker = Callable[..., list[Values]]
MakeModel = Callable[[SyntheticModel, int], list[Values]]
Summarize = Callable[..., Comparison]


@pytest.fixture(scope="session")
def generation_records() -> Maker:
    """Return a factory of generated answers, from the metrics of each."""

    def make(metrics: Sequence[dict[str, float]], *, ended: bool = True) -> list[Values]:
        return [
            {
                "kind": "generation",
                "id": number,
                "prompt": f"question {number}",
                "prompt_sha256": f"digest of {number}",
                "answer": "the cat sat on the mat",
                "reference": "the cat sat on the mat",
                "ended": ended,
                "metrics": dict(values),
                "errors": {},
            }
            for number, values in enumerate(metrics)
        ]

    return make


@pytest.fixture(scope="session")
def probe_records() -> Maker:
    """Return a factory of questions with one answer, from whether each answer was the likeliest."""

    def make(benchmark: str, greedy: Sequence[bool]) -> list[Values]:
        return [
            {
                "kind": "answer",
                "benchmark": benchmark,
                "nll": 3.0,
                "tokens": 2,
                "bytes": 7,
                "id": f"{benchmark}/{number}",
                "prompt_sha256": f"digest of {number}",
                "greedy": right,
            }
            for number, right in enumerate(greedy)
        ]

    return make


@pytest.fixture(scope="session")
def score_records() -> Maker:
    """Return a factory of documents of a task with its own score, from the score of each."""

    def make(
        benchmark: str, values: Sequence[float], *, higher_is_better: bool = True
    ) -> list[Values]:
        return [
            {
                "kind": "score",
                "benchmark": benchmark,
                "metric": "f1",
                "higher_is_better": higher_is_better,
                "id": f"{benchmark}/{number}",
                "value": float(value),
            }
            for number, value in enumerate(values)
        ]

    return make


@pytest.fixture(scope="session")
def loss_records() -> Maker:
    """Return a factory of passages or chats, from their summed losses; a chat has two positions."""

    def make(kind: str, losses: Sequence[float]) -> list[Values]:
        benchmark = {"text": "passages", "chat": "chat"}[kind]
        return [
            {
                "kind": kind,
                "benchmark": benchmark,
                "tokens": 5,
                "bytes": 20,
                "id": f"{benchmark}/{number}",
                "nll": float(loss),
                "rows": [2 * number, 2 * number + 2],
            }
            for number, loss in enumerate(losses)
        ]

    return make


@pytest.fixture(scope="session")
def without() -> Callable[[list[Values], str], list[Values]]:
    """Return a function that leaves one item out."""

    def left_out(record: Values) -> Values:
        kept = ("kind", "id", "benchmark", "prompt_sha256")
        values = {key: record[key] for key in kept if key in record}
        return values | {"left_out": "1,234 tokens exceed the context of 1,024"}

    def leave(records: list[Values], name: str) -> list[Values]:
        return [left_out(record) if record["id"] == name else record for record in records]

    return leave


@pytest.fixture
def recipe(recipe_with: Callable[..., Values]) -> Recipe:
    return parse_recipe(recipe_with())


@pytest.fixture
def model(task_records: Maker, general_records: Maker, generation_records: Maker) -> MakeModel:
    """Return a factory of one model's records; the seed determines its own deviations."""

    def make(synthetic: SyntheticModel, seed: int) -> list[Values]:
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
