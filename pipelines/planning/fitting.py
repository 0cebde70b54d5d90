"""Advice for a training that ran out of memory, from the plan's estimates. Imports no torch."""

from typing import Any

from pipelines.config.experiments import CONTROL

TERMS = {
    "weight_bytes": "weights",
    "quantization_bytes": "scales of 4-bit weights",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "activation_bytes": "activations",
    "buffer_bytes": "buffers",
    "process_bytes": "process itself",
}
"""Terms of the memory, as `lora_core.budget.budget` names them → as they are printed."""
NAMED_TERMS = 2
"""Number of the largest terms that are named."""


def what_would_fit(plan: dict[str, Any], label: str) -> str:
    """Return the memory that a run was expected to need, and which single recipe changes need less.

    Args:
        plan: the plan stage's result.
        label: of the experiment that did not fit, such as "rank-16", "rank-16 lr 0.001" or
            "control"; for a label that is not in the plan, its adapter of the highest rank is used.
    """
    name, run = _run_of(plan, label)
    memory = _format_bytes(run["memory_bytes"])
    needs = f"{name} was expected to need {memory} in each process ({_largest_terms(run)})"
    changes = []
    for change in run["less"]:
        value = _format_value(change["value"])
        less = _format_bytes(change["memory_bytes"])
        changes.append(f"{change['setting']}: {value} ({less})")
    if not changes:
        return (
            f"{needs}, and no single change of the recipe needs less; "
            "use processes with more memory, or a smaller model"
        )
    return f"{needs}; less memory is needed with {_join_with_or(changes)}"


def _run_of(plan: dict[str, Any], label: str) -> tuple[str, dict[str, Any]]:
    runs: dict[str, Any] = plan["runs"]
    name = label.partition(" ")[0]
    if name in runs:
        return name, runs[name]
    ranks = {}
    for key, run in runs.items():
        if key != CONTROL:
            ranks[key] = int(run["rank"])
    highest = max(ranks, key=lambda key: ranks[key])
    return highest, runs[highest]


def _largest_terms(run: dict[str, Any]) -> str:
    by_size = sorted(TERMS, key=lambda term: -int(run[term]))
    largest = []
    for term in by_size[:NAMED_TERMS]:
        largest.append(f"{TERMS[term]} {_format_bytes(run[term])}")
    return ", ".join(largest)


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _join_with_or(texts: list[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return f"{', '.join(texts[:-1])} or {texts[-1]}"


def _format_bytes(size: int) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB"
