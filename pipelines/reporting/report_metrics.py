"""The metrics of a comparison: what each one is, what it detects, and where a model's entry has it.

All changes are positive if the model became better. A metric that was not measured is None, for
example the chat loss of a base without a chat template.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.reporting.formats import number

Model = Mapping[str, Any]
Models = Mapping[str, Model]
Interval = Mapping[str, float]


@dataclass(frozen=True)
class ReportMetric:
    """One metric, for all models."""

    key: str
    title: str
    unit: str
    detects: str
    section: str = ""
    """Part of the scores that has the metric; empty for the scores themselves."""
    change_key: str = ""
    """Its key among the changes; empty if it is the same key."""

    def value(self, model: Model) -> float | None:
        """Return the value of the metric for a model."""
        scores = model["scores"]
        section = scores[self.section] if self.section else scores
        value = section.get(self.key)
        return None if value is None else float(value)

    def change(self, model: Model, effect: str = "change") -> Interval | None:
        """Return how training changed the metric; None if nothing was changed.

        Args:
            model: the model's entry.
            effect: `change`, or `total`: the change since the base in full precision.
        """
        change = model.get(effect)
        if change is None or self.section == "corpus":
            return None
        section = change["generation"] if self.section else change
        interval: Interval | None = section.get(self.change_key or self.key)
        return interval

    def interval(self, model: Model) -> Interval | None:
        """Return the interval of the value; None if only the change has an interval."""
        return None

    def format(self, value: float) -> str:
        """Return a value as text."""
        digits = {"count": 0, "of 100": 1}.get(self.unit, 3)
        return number(value, digits)

    @property
    def name(self) -> str:
        """A unique name: the key, prefixed with its section."""
        return f"{self.section}.{self.key}" if self.section else self.key


@dataclass(frozen=True)
class DivergenceMetric(ReportMetric):
    """How far a model's distributions moved: its value is itself a change."""

    def value(self, model: Model) -> float | None:
        change = model.get("change", {})
        divergence: float | None = change.get(self.key)
        return divergence

    def change(self, model: Model, effect: str = "change") -> Interval | None:
        return None

    def interval(self, model: Model) -> Interval | None:
        change = model.get("change", {})
        interval: Interval | None = change.get(f"{self.key}_interval")
        return interval


def general_change(model: Model, effect: str = "change") -> Interval | None:
    """Return the change of general abilities.

    It is the change of choice probability, or of accuracy if no question has choices.
    """
    change = model.get(effect) or {}
    interval: Interval | None = change.get("choice_probability") or change.get("accuracy")
    return interval


def benchmark_score(scores: Mapping[str, Any]) -> float | None:
    """Return the score by which a benchmark, or all of them, are compared."""
    choice_probability: float | None = scores["choice_probability"]
    accuracy: float | None = scores["accuracy"]
    return accuracy if choice_probability is None else choice_probability


LEARNING = ReportMetric(
    "task_loss",
    "Task loss",
    "nats per token",
    "Learning, with the most sensitivity: every supervised token counts",
    change_key="task_gain",
)
GENERATION_METRICS = {
    "chrf": ("chrF", "Learning that is visible in answers: letters and words of the reference"),
    "rouge_l": ("ROUGE-L", "The same, by words in their order"),
    "bleu": ("BLEU", "The same, by n-grams of words; coarse for single answers"),
    "exact_match": ("Exact match", "Answers that are exactly the reference"),
    "execution": ("Execution", "Answers that pass an executable check"),
}
UNFINISHED = ReportMetric(
    "unfinished_answers", "Unfinished answers", "count", "A model that no longer knows when to stop"
)
FORGETTING = (
    ReportMetric(
        "choice_probability",
        "Choice probability",
        "fraction",
        "Forgetting, smoothly: how probable the right choice is; the gate uses it",
    ),
    ReportMetric(
        "accuracy",
        "Accuracy",
        "fraction",
        "Forgetting, coarsely: it changes only if the order of two answers flips",
    ),
    ReportMetric(
        "margin",
        "Margin",
        "nats per byte",
        "How near a flip is: the right answer minus the best wrong one",
    ),
    ReportMetric(
        "text_loss",
        "Passages’ loss",
        "nats per byte",
        "Drift on plain text; training on any text can lower it, whatever the model forgets",
    ),
    ReportMetric(
        "chat_loss",
        "Chat loss",
        "nats per token",
        "A model that has the knowledge but no longer answers in the chat format",
    ),
    DivergenceMetric(
        "kl",
        "KL divergence",
        "nats per token",
        "Any change, for better or worse: the earliest sign, without a direction",
    ),
)


def report_metrics(models: Models) -> list[ReportMetric]:
    """Return every metric that at least one model has, learning first."""
    scores = models["base"]["scores"]
    candidates = [LEARNING]
    candidates += [_generation_metric(key) for key in scores["generation"]]
    candidates += [_corpus_metric(key) for key in scores["corpus"]]
    if scores["generation"]:
        candidates.append(UNFINISHED)
    candidates += FORGETTING
    return [metric for metric in candidates if _is_measured(metric, models)]


def unmeasured(models: Models) -> list[str]:
    """Return the titles of the metrics that no model has.

    A recipe may turn them off, and a base without a template has no chat loss.
    """
    return [metric.title for metric in FORGETTING if not _is_measured(metric, models)]


def _is_measured(metric: ReportMetric, models: Models) -> bool:
    return any(metric.value(model) is not None for model in models.values())


def _generation_metric(key: str) -> ReportMetric:
    title, detects = GENERATION_METRICS.get(key, (key, "A user-defined metric"))
    unit = "of 100" if key in GENERATION_METRICS else ""
    return ReportMetric(key, title, unit, detects, "generation")


def _corpus_metric(key: str) -> ReportMetric:
    title, _ = GENERATION_METRICS.get(key, (key, ""))
    title = f"{title}, all answers as one text"
    return ReportMetric(key, title, "of 100", "As papers report it; it has no interval", "corpus")
