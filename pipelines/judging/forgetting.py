"""The forgetting check: what was learnt and what was forgotten, item by item, beside a full fine-tuning control.

Pure functions from item records to figures and verdicts. Three effects are told apart:

    quantisation    the 4-bit base against the base in full precision: lost before anything is trained
    training        an adapter against the base it was trained on; the control against the base in full precision
    total           an adapter against the base in full precision: what a user gains or loses by switching

General abilities are measured by choice probability, p(right) / Σ p(choice), beside accuracy. A likelihood by itself
rises under any training on plain text, whatever is forgotten; and accuracy moves only where an order flips, so that
some hundred items cannot show it (Schaeffer et al. 2024, arXiv 2406.04391, on which scores move smoothly).

Every difference is paired by item. Intervals are 95 % bootstrap percentiles, with fixed seeds; for general abilities
items are drawn within their benchmark and benchmarks weigh the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

Array = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]
RESAMPLES = 4999
LENGTH_NORMALISED = ("hellaswag", "piqa", "arc_easy", "openbookqa")
"""Benchmarks whose accuracy divides by the answer's bytes; the others compare answers of one or two tokens, or the same text."""
Status = Literal["pass", "reject", "can't tell"]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """One model's figures."""

    task_loss: float
    """Nats per supervised token of the held-out examples."""
    chrf: float | None
    """Mean chrF of the generated answers, of 100; None where the data has no prompts."""
    rouge_l: float | None
    """Mean ROUGE-L F1, of 100."""
    choice_probability: float
    """Mean p(right) / Σ p(choice); the mean of the benchmarks' means."""
    accuracy: float
    margin: float
    """Log-likelihood per byte of the right answer over the best wrong one."""
    benchmarks: dict[str, dict[str, float]]
    """Benchmark → choice_probability, accuracy, items."""


@dataclass(frozen=True)
class Change:
    """How one model differs from another on the same items; positive is better."""

    task_gain: Interval
    """Fall of the task loss, in nats per token."""
    choice_probability: Interval
    accuracy: Interval
    chrf: Interval | None
    benchmarks: dict[str, Interval]
    """Benchmark → change of choice probability."""


@dataclass(frozen=True)
class Rule:
    """One rule of the gate, held against an interval."""

    name: str
    status: Status
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on one adapter."""

    status: Status
    reason: str
    rules: tuple[Rule, ...]


def scores(records: Records) -> Scores:
    """Summarise one model's item records."""
    task = [r for r in records if r["kind"] == "task"]
    by_benchmark = {
        name: {"choice_probability": float(p.mean()), "accuracy": float(a.mean()), "items": float(len(p))}
        for name, p, a in ((name, _each(rows, choice_probability), _each(rows, is_right)) for name, rows in _general(records).items())
    }
    margins = [float(_each(rows, margin).mean()) for rows in _general(records).values()]
    return Scores(
        task_loss=sum(r["nll"] for r in task) / sum(r["tokens"] for r in task),
        chrf=_mean(records, "chrf"),
        rouge_l=_mean(records, "rouge_l"),
        choice_probability=float(np.mean([b["choice_probability"] for b in by_benchmark.values()])),
        accuracy=float(np.mean([b["accuracy"] for b in by_benchmark.values()])),
        margin=float(np.mean(margins)),
        benchmarks=by_benchmark,
    )


def change(before: Records, after: Records) -> Change:
    """Compare two models item by item.

    Raises:
        ValueError: the two were not scored on the same items in the same order.
    """
    _check_paired(before, after)
    probability, accuracy = _differences(before, after, choice_probability), _differences(before, after, is_right)
    generated = [b["chrf"] - a["chrf"] for a, b in zip(before, after, strict=True) if a["kind"] == "generation"]
    return Change(
        task_gain=task_gain(before, after),
        choice_probability=_interval(list(probability.values()), _mean_of_means),
        accuracy=_interval(list(accuracy.values()), _mean_of_means),
        chrf=_interval([np.array(generated)], _mean_of_means) if len(generated) > 1 else None,
        benchmarks={name: _interval([values], _mean_of_means) for name, values in probability.items()},
    )


def gain_share(base: Records, control: Records, adapter: Records) -> Interval | None:
    """Return the adapter's task gain over the full-precision base as a share of the control's.

    None where the control itself did not surely learn: a share of nothing, or of a loss, says nothing.
    """
    if task_gain(base, control).low <= 0:
        return None
    return _interval([task_differences(base, adapter), task_differences(base, control)], _ratio, paired=True)


def drop_beyond_control(bases: tuple[Records, Records], control: Records, adapter: Records) -> Interval:
    """Return the adapter's change of choice probability less the control's, each over the base it was trained on.

    Args:
        bases: what the control and what the adapter was trained on.
        control: full fine-tuning.
        adapter: LoRA or QLoRA.
    """
    of_control = _differences(bases[0], control, choice_probability)
    of_adapter = _differences(bases[1], adapter, choice_probability)
    return _interval([of_adapter[name] - of_control[name] for name in of_adapter], _mean_of_means)


def decide(share: Interval | None, general: Interval, beyond_control: Interval, gate: Mapping[str, float]) -> Verdict:
    """Hold an adapter against the gate's rules; one failure rejects, and what cannot be told does not pass.

    Args:
        share: task gain as a share of the control's; None where the control did not learn.
        general: change of choice probability by training.
        beyond_control: that change less the control's.
        gate: the recipe's gate section.
    """
    rules = (
        _learnt(share, gate["min_gain_share"]),
        _rule("forgot little", general, -gate["max_general_drop"], "general change {value:+.3f}", "no less than {bound:+.3f}"),
        _rule(
            "forgot no more than the control",
            beyond_control,
            -gate["max_drop_beyond_control"],
            "{value:+.3f} against the control",
            "no less than {bound:+.3f}",
        ),
    )
    status: Status = "pass"
    if any(rule.status == "reject" for rule in rules):
        status = "reject"
    elif any(rule.status == "can't tell" for rule in rules):
        status = "can't tell"
    decisive = [rule.reason for rule in rules if rule.status == status]
    return Verdict(status, "; ".join(decisive), rules)


def choice_probability(record: Mapping[str, Any]) -> float:
    """Return p(right) / Σ p(choice)."""
    values = np.array(record["log_likelihoods"])
    weights = np.exp(values - values.max())
    return float(weights[record["gold"]] / weights.sum())


def is_right(record: Mapping[str, Any]) -> float:
    """Return 1 where the right answer is the likeliest: per byte, as is, or (LAMBADA) among all words."""
    if record["benchmark"] == "lambada":
        return float(record["greedy"][record["gold"]])
    values = _per_byte(record) if record["benchmark"] in LENGTH_NORMALISED else np.array(record["log_likelihoods"])
    return float(values.argmax() == record["gold"])


def margin(record: Mapping[str, Any]) -> float:
    """Return by how much the right answer's log-likelihood per byte exceeds the best wrong one's."""
    values = _per_byte(record)
    return float(values[record["gold"]] - np.delete(values, record["gold"]).max())


def task_gain(before: Records, after: Records) -> Interval:
    """Return the fall of the task loss, in nats per supervised token."""
    return _interval([task_differences(before, after), _task(before, "tokens")], _ratio, paired=True)


def task_differences(before: Records, after: Records) -> Array:
    """Return, for each held-out example, how much its summed negative log-likelihood fell."""
    return _task(before, "nll") - _task(after, "nll")


def plain(value: Any) -> dict[str, Any]:
    """Return a figure as plain values for JSON."""
    return asdict(value)


def _learnt(share: Interval | None, bound: float) -> Rule:
    name = "learnt enough"
    if share is None:
        return Rule(name, "can't tell", "the control did not surely learn, so no share of it can be asked: give it more steps")
    return _rule(name, share, bound, "{value:.0%} of the control's gain", "at least {bound:.0%}")


def _rule(name: str, interval: Interval, bound: float, found: str, wanted: str) -> Rule:
    status: Status = "can't tell"
    if interval.low >= bound:
        status = "pass"
    elif interval.high < bound:
        status = "reject"
    value = found.format(value=interval.mean)
    ends = f"{interval.low:.3f} to {interval.high:.3f}"
    needed = wanted.format(bound=bound)
    texts = {
        "pass": f"{value} ({ends}; {needed})",
        "reject": f"{value} ({ends}), but the rule is {needed}",
        "can't tell": f"{value} ({ends}) spans the bound ({needed}): score more items to tell",
    }
    return Rule(name, status, texts[status])


def _general(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["kind"] == "general":
            groups.setdefault(record["benchmark"], []).append(record)
    return groups


def _differences(before: Records, after: Records, figure: Callable[[Mapping[str, Any]], float]) -> dict[str, Array]:
    first, second = _general(before), _general(after)
    return {name: _each(second[name], figure) - _each(first[name], figure) for name in first}


def _each(records: Records, figure: Callable[[Mapping[str, Any]], float]) -> Array:
    return np.array([figure(record) for record in records])


def _task(records: Records, name: str) -> Array:
    return np.array([float(record[name]) for record in records if record["kind"] == "task"])


def _mean(records: Records, name: str) -> float | None:
    values = [record[name] for record in records if record["kind"] == "generation"]
    return float(np.mean(values)) if values else None


def _per_byte(record: Mapping[str, Any]) -> Array:
    per_byte: Array = np.array(record["log_likelihoods"]) / np.array(record["bytes"])
    return per_byte


def _check_paired(before: Records, after: Records) -> None:
    if [(r["kind"], r["id"]) for r in before] != [(r["kind"], r["id"]) for r in after]:
        raise ValueError("the two models were scored on different items; score both with the same seed and settings")


def _interval(samples: list[Array], statistic: Callable[..., Any], *, paired: bool = False) -> Interval:
    value = float(statistic(*samples, axis=-1))
    ends = bootstrap(
        tuple(samples),
        statistic,
        paired=paired,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(round(value, 6), round(float(ends.low), 6), round(float(ends.high), 6))


def _ratio(numerator: Array, denominator: Array, axis: int = -1) -> Any:
    return numerator.sum(axis=axis) / denominator.sum(axis=axis)


def _mean_of_means(*samples: Array, axis: int = -1) -> Any:
    return sum(sample.mean(axis=axis) for sample in samples) / len(samples)
