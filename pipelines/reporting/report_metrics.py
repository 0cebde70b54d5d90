"""The metrics of a comparison: what each one is, what it detects, and where a model's entry has it.

All changes are positive if the model became better. A metric that was not measured is None, for
example the chat loss of a base without a chat template.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipelines.comparison.comparison import BASE
from pipelines.comparison.document import Effect, ModelSummary
from pipelines.comparison.resampling import Interval
from pipelines.comparison.scores import BenchmarkScores, Scores
from pipelines.reporting.formats import number
from pipelines.reporting.model_parts import EffectName, effect_of

Models = Mapping[str, ModelSummary]


MIN_ANSWERS = 20
"""Intervals of fewer answers are not called clear: resamples of a few items barely differ."""


def _not_measured(measured: object) -> None:
    """Stand in for what a metric does not have."""


@dataclass(frozen=True)
class ReportMetric:
    """One metric, for all models."""

    name: str
    """Unique; of generated answers, prefixed with generation or corpus."""
    title: str
    unit: str
    detects: str
    read: Callable[[ModelSummary], float | None]
    """Returns the value of a model; None if it was not measured."""
    compare: Callable[[Effect], Interval | None] = _not_measured
    """Returns the change by an effect; None if it was not measured."""
    interval: Callable[[ModelSummary], Interval | None] = _not_measured
    """Returns the interval of the value; None if only the change has an interval."""

    def value(self, model: ModelSummary) -> float | None:
        """Return the value of the metric for a model."""
        value = self.read(model)
        return None if value is None else float(value)

    def change(self, model: ModelSummary, effect: EffectName = "change") -> Interval | None:
        """Return how training changed the metric; None if nothing was changed.

        Args:
            model: the model's entry.
            effect: `change`, or `total`: the change since the base in full precision.
        """
        found = effect_of(model, effect)
        return None if found is None else self.compare(found)

    @property
    def is_of_answers(self) -> bool:
        """Return whether it is computed from generated answers."""
        return self.name.startswith("generation.")

    def format(self, value: float) -> str:
        """Return a value as text."""
        digits = {"count": 0, "of 100": 1}.get(self.unit, 3)
        return number(value, digits)


def _divergence(model: ModelSummary) -> float | None:
    """Return how far a model's distributions moved: the value is itself a change."""
    return None if model.change is None else model.change.kl


def _divergence_interval(model: ModelSummary) -> Interval | None:
    return None if model.change is None else model.change.kl_interval


def general_change(model: ModelSummary, effect: EffectName = "change") -> Interval | None:
    """Return the change of general abilities.

    It is the change of choice probability, or of accuracy if no question has choices.

    Args:
        model: the model's entry in the summary.
        effect: by training, or in total.
    """
    found = effect_of(model, effect)
    return None if found is None else general_change_by(found)


def general_change_by(effect: Effect) -> Interval | None:
    """Return the change of general abilities by an effect."""
    if effect.choice_probability is None:
        return effect.accuracy
    return effect.choice_probability


def benchmark_score(scores: Scores | BenchmarkScores) -> float | None:
    """Return the score by which a benchmark, or all of them, are compared."""
    if scores.choice_probability is None:
        return scores.accuracy
    return scores.choice_probability


LEARNING = ReportMetric(
    "task_loss",
    "Task loss",
    "nats per token",
    "Learning, with the most sensitivity: every supervised token counts",
    lambda model: model.scores.task_loss,
    lambda effect: effect.task_gain,
)
GENERATION_METRICS = {
    "chrf": ("chrF", "Learning that is visible in answers: letters and words of the reference"),
    "rouge_l": ("ROUGE-L", "The same, by words in their order"),
    "bleu": ("BLEU", "The same, by n-grams of words; coarse for single answers"),
    "exact_match": ("Exact match", "Answers that are exactly the reference"),
    "execution": ("Execution", "Answers that pass an executable check"),
}
UNFINISHED = ReportMetric(
    "unfinished_answers",
    "Unfinished answers",
    "count",
    "A model that no longer knows when to stop",
    lambda model: model.scores.unfinished_answers,
)
FORGETTING = (
    ReportMetric(
        "choice_probability",
        "Choice probability",
        "fraction",
        "Forgetting, smoothly: how probable the right choice is; the gate uses it",
        lambda model: model.scores.choice_probability,
        lambda effect: effect.choice_probability,
    ),
    ReportMetric(
        "accuracy",
        "Accuracy",
        "fraction",
        "Forgetting, coarsely: it changes only if the order of two answers flips",
        lambda model: model.scores.accuracy,
        lambda effect: effect.accuracy,
    ),
    ReportMetric(
        "margin",
        "Margin",
        "nats per byte",
        "How near a flip is: the right answer minus the best wrong one",
        lambda model: model.scores.margin,
        lambda effect: effect.margin,
    ),
    ReportMetric(
        "text_loss",
        "Passages’ loss",
        "nats per byte",
        "Drift on plain text; training on any text can lower it, whatever the model forgets",
        lambda model: model.scores.text_loss,
        lambda effect: effect.text_loss,
    ),
    ReportMetric(
        "chat_loss",
        "Chat loss",
        "nats per token",
        "A model that has the knowledge but no longer answers in the chat format",
        lambda model: model.scores.chat_loss,
        lambda effect: effect.chat_loss,
    ),
    ReportMetric(
        "kl",
        "KL divergence",
        "nats per token",
        "Any change, for better or worse: the earliest sign, without a direction",
        _divergence,
        interval=_divergence_interval,
    ),
)


def report_metrics(models: Models) -> list[ReportMetric]:
    """Return every metric that at least one model has, learning first."""
    scores = models[BASE].scores
    candidates = [LEARNING]
    candidates += [_generation_metric(key) for key in scores.generation]
    candidates += [_corpus_metric(key) for key in scores.corpus]
    if scores.generation:
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
    return ReportMetric(
        f"generation.{key}",
        title,
        "of 100" if key in GENERATION_METRICS else "",
        detects,
        lambda model: model.scores.generation.get(key),
        lambda effect: effect.generation.get(key),
    )


def _corpus_metric(key: str) -> ReportMetric:
    title, _ = GENERATION_METRICS.get(key, (key, ""))
    return ReportMetric(
        f"corpus.{key}",
        f"{title}, all answers as one text",
        "of 100",
        "As papers report it; it has no interval",
        lambda model: model.scores.corpus.get(key),
    )
