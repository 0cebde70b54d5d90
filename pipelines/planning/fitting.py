"""Advice for a training that ran out of memory, from the plan's estimates. Imports no torch."""

from pipelines.reporting.formats import short_size
from pipelines.runtime.interfaces.plan_result import PlanResult, RunCost

NAMED_TERMS = 2
"""Number of the largest terms that are named."""


def memory_terms(run: RunCost) -> dict[str, int]:
    """Return the terms of a run's memory in bytes, by the name that is printed."""
    return {
        "weights": run.weight_bytes,
        "scales of 4-bit weights": run.quantization_bytes,
        "gradients": run.gradient_bytes,
        "optimizer": run.optimizer_bytes,
        "activations": run.activation_bytes,
        "buffers": run.buffer_bytes,
        "process itself": run.process_bytes,
    }


def what_would_fit(plan: PlanResult, label: str) -> str:
    """Return the memory that a run was expected to need, and which single recipe changes need less.

    Args:
        plan: the plan stage's result.
        label: of the experiment that did not fit, such as "rank-16", "rank-16 lr 0.001" or
            "control"; for a label that is not in the plan, its adapter of the highest rank is used.
    """
    name, run = _run_of(plan, label)
    memory = short_size(run.memory_bytes)
    needs = f"{name} was expected to need {memory} in each process ({_largest_terms(run)})"
    changes = []
    for change in run.less:
        value = _format_value(change.value)
        less = short_size(change.memory_bytes)
        changes.append(f"{change.setting}: {value} ({less})")
    if not changes:
        return (
            f"{needs}, and no single change of the recipe needs less; "
            "use processes with more memory, or a smaller model"
        )
    return f"{needs}; less memory is needed with {_join_with_or(changes)}"


def _run_of(plan: PlanResult, label: str) -> tuple[str, RunCost]:
    name = label.partition(" ")[0]
    if name in plan.runs:
        return name, plan.runs[name]
    ranks = {}
    for key, run in plan.runs.items():
        if run.adapter is not None:
            ranks[key] = run.adapter.rank
    highest = max(ranks, key=lambda key: ranks[key])
    return highest, plan.runs[highest]


def _largest_terms(run: RunCost) -> str:
    by_size = sorted(memory_terms(run).items(), key=lambda term: -term[1])
    largest = []
    for name, size in by_size[:NAMED_TERMS]:
        largest.append(f"{name} {short_size(size)}")
    return ", ".join(largest)


def _format_value(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _join_with_or(texts: list[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return f"{', '.join(texts[:-1])} or {texts[-1]}"
