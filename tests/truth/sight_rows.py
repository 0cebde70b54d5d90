"""Which metric detects forgetting: its change for models that forgot more and less.

The over-trained control has certainly forgotten at its end. It is compared with the QLoRA adapter
of the nearest task loss, at any step or learning rate: of two models that do the task equally well,
one has forgotten. A metric that detects forgetting decreases there, with an interval below zero; a
metric that increases while abilities decrease is misleading.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.comparison.differences import Change, change
from pipelines.comparison.divergence import KLDivergence, divergences
from pipelines.comparison.record_files import read_items
from pipelines.comparison.records import Records
from pipelines.comparison.scores import scores

Row = dict[str, Any]
Values = dict[str, Any]
FIGURES = {
    "accuracy": "share",
    "choice_probability": "share",
    "margin": "nats a byte",
    "text_loss": "nats a byte",
    "chat_loss": "nats a token",
}
"""Metric of a change → its unit; positive is better for all of them."""


@dataclass(frozen=True)
class ScoredModel:
    """One model of a run, and what it was trained on."""

    name: str
    summary: Values
    label: str
    base: str

    @property
    def path(self) -> Path:
        return Path(self.summary["items"][self.label])

    @property
    def records(self) -> Records:
        return read_items(self.path)

    @property
    def task_loss(self) -> float:
        return scores(self.records).task_loss

    def change(self) -> Change:
        """Return what training changed."""
        return change(read_items(Path(self.summary["items"][self.base])), self.records)

    def kl(self) -> KLDivergence | None:
        """Return the KL divergence from the base over chat questions; None if there are none."""
        pair = (self.base, self.label)
        files = {
            label: Path(self.summary["items"][label]).with_name("distributions.safetensors")
            for label in pair
        }
        return (
            divergences(self.records, files, [pair]).get(pair)
            if all(file.is_file() for file in files.values())
            else None
        )


def sight_rows(tuned: Values, pushed: Values) -> Iterator[Row]:
    """Yield each metric's change for the highest rank, the tuned and the over-trained control."""
    models = tuned["models"]
    judged = [label for label, model in models.items() if model["judgment"] is not None]
    rank = max(judged, key=lambda label: int(models[label]["training"]["rank"]))
    steps = pushed["recipe"]["training"]["steps"]
    hard = ScoredModel(f"pushed control, {steps} steps", pushed, "control", "base")
    subjects = [
        ScoredModel(rank, tuned, rank, "base-nf4"),
        ScoredModel("tuned control", tuned, "control", "base"),
        nearest((tuned, pushed), hard),
        hard,
    ]
    changes = {subject.name: subject.change() for subject in subjects}
    for subject in subjects:
        yield row(f"{subject.name}: task loss", subject.task_loss, "nats a token")
    for figure, unit in FIGURES.items():
        for name, found in changes.items():
            yield from seen(figure, unit, name, getattr(found, figure))
    for name, found in changes.items():
        yield from seen(
            "choice probability on LAMBADA", "share", name, found.benchmarks.get("lambada")
        )
    for subject in subjects:
        moved = subject.kl()
        if moved is not None:
            yield row(
                f"{subject.name}: KL from its base on chat-formatted questions",
                moved.mean,
                "nats a token",
            )
    end = changes[subjects[-1].name].choice_probability
    assert end is not None, "the benchmarks were scored"
    yield row(
        "the pushed control forgot, by choice probability",
        end.high,
        "upper end",
        "< 0",
        holds=end.high < 0,
    )


def nearest(summaries: Sequence[Values], hard: ScoredModel) -> ScoredModel:
    """Return the scored adapter whose task loss is nearest to that of `hard`."""
    pairs = [
        (summary, label)
        for summary in summaries
        for label in summary["items"]
        if label.startswith("rank-")
    ]
    adapters = [
        ScoredModel(f"{label}, the nearest in task loss", summary, label, "base-nf4")
        for summary, label in pairs
    ]
    return min(adapters, key=lambda one: abs(one.task_loss - hard.task_loss))


def seen(figure: str, unit: str, who: str, change: Any) -> Iterator[Row]:
    """Yield a metric's change, and the conclusion from its interval."""
    if change is None:
        return
    if change.high < 0:
        conclusion = "worse"
    elif change.low > 0:
        conclusion = "better"
    else:
        conclusion = "cannot tell"
    interval = f"({change.low:+.3f} to {change.high:+.3f})"
    yield row(f"{who}: {figure} {interval}: {conclusion}", change.mean, unit)


def row(
    what: str, value: float, unit: str, goal: str | None = None, *, holds: bool | None = None
) -> Row:
    """Return one result."""
    return {"what": what, "value": value, "unit": unit, "goal": goal, "holds": holds}
