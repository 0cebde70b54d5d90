"""The figures that a comparison measures: what each is, what it detects, and where a model's entry holds it.

All changes are positive where the model became better. A figure that was not measured is None, such as the chat's loss
for a base without a chat template.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.reporting.formats import number

Model = Mapping[str, Any]
Interval = Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """One figure, for all models."""

    key: str
    title: str
    unit: str
    detects: str
    section: str = ""
    """Part of the scores that holds it; the scores themselves when empty."""
    change_key: str = ""
    """Its name among the changes; the key when empty."""

    def level(self, model: Model) -> float | None:
        """Return the figure itself."""
        scores = model["scores"]
        value = (scores[self.section] if self.section else scores).get(self.key)
        return None if value is None else float(value)

    def change(self, model: Model, effect: str = "change") -> Interval | None:
        """Return how training changed it (`total`: since the base in full precision); None where nothing was changed."""
        change = model.get(effect)
        if change is None or self.section == "corpus":
            return None
        found: Interval | None = (change["generation"] if self.section else change).get(
            self.change_key or self.key
        )
        return found

    def spread(self, model: Model) -> Interval | None:
        """Return the interval of the figure itself; None where only its change has one."""
        return None

    def show(self, level: float) -> str:
        """Return the figure itself as it is written."""
        digits = {"count": 0, "of 100": 1}.get(self.unit, 3)
        return number(level, digits)

    @property
    def name(self) -> str:
        """Tells apart figures of the same key."""
        return f"{self.section}.{self.key}" if self.section else self.key


@dataclass(frozen=True)
class Divergence(Figure):
    """How far a model's distributions moved: a figure that is itself a change."""

    def level(self, model: Model) -> float | None:
        found: float | None = model.get("change", {}).get(self.key)
        return found

    def change(self, model: Model, effect: str = "change") -> Interval | None:
        return None

    def spread(self, model: Model) -> Interval | None:
        found: Interval | None = model.get("change", {}).get(f"{self.key}_interval")
        return found


def general_change(model: Model, effect: str = "change") -> Interval | None:
    """Return the change of general abilities: of choice probability, or of accuracy where no question has choices."""
    change = model.get(effect) or {}
    found: Interval | None = change.get("choice_probability") or change.get("accuracy")
    return found


def benchmark_figure(scores: Mapping[str, Any]) -> float | None:
    """Return the figure that a benchmark is compared by, from its scores or those of all: the same choice."""
    found: float | None = (
        scores["accuracy"] if scores["choice_probability"] is None else scores["choice_probability"]
    )
    return found


LEARNING = Figure(
    "task_loss",
    "Task loss",
    "nats per token",
    "Learning, most sharply: every supervised token counts",
    change_key="task_gain",
)
METRICS = {
    "chrf": ("chrF", "Learning that shows in answers: letters and words of the reference"),
    "rouge_l": ("ROUGE-L", "The same by words in their order"),
    "bleu": ("BLEU", "The same by runs of words; coarse for single answers"),
    "exact_match": ("Exact match", "Answers that are right to the letter"),
    "execution": ("Execution", "Answers that a program found to do what was asked"),
}
UNFINISHED = Figure(
    "unfinished_answers", "Unfinished answers", "count", "A model that no longer knows when to stop"
)
FORGETTING = (
    Figure(
        "choice_probability",
        "Choice probability",
        "share",
        "Forgetting, smoothly: whether the right answer stands out; the gate asks this",
    ),
    Figure(
        "accuracy",
        "Accuracy",
        "share",
        "Forgetting, coarsely: it moves only where the order of two answers flips",
    ),
    Figure(
        "margin",
        "Margin",
        "nats per byte",
        "How near a flip is: the right answer over the best wrong one",
    ),
    Figure(
        "text_loss",
        "Passages’ loss",
        "nats per byte",
        "Drift of plain language; training on any text can lower it, whatever is forgotten",
    ),
    Figure(
        "chat_loss",
        "Chat loss",
        "nats per token",
        "A model that still knows, but no longer answers in the chat’s form",
    ),
    Divergence(
        "kl",
        "KL divergence",
        "nats per token",
        "That anything changed, for better or worse: the earliest sign, without a direction",
    ),
)


def figures(models: Mapping[str, Model]) -> list[Figure]:
    """Return every figure that some model has, learning first."""
    scores = models["base"]["scores"]
    answers = [_metric(key) for key in scores["generation"]]
    corpus = [_metric(key, "corpus") for key in scores["corpus"]]
    found = [LEARNING, *answers, *corpus, *([UNFINISHED] if answers else []), *FORGETTING]
    return [
        figure
        for figure in found
        if any(figure.level(model) is not None for model in models.values())
    ]


def unmeasured(models: Mapping[str, Model]) -> list[str]:
    """Return the titles of what no model has: a recipe may ask for none, and a base without a template takes no chat."""
    return [figure.title for figure in FORGETTING if figure not in figures(models)]


def _metric(key: str, section: str = "generation") -> Figure:
    title, detects = METRICS.get(key, (key, "A metric of one's own"))
    if section == "corpus":
        return Figure(
            key,
            f"{title}, all answers as one text",
            "of 100",
            "As papers give it; it has no interval",
            section,
        )
    return Figure(key, title, "of 100" if key in METRICS else "", detects, section)
