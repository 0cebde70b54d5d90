"""What to say of a training that ran out of memory: the plan's own figures, and what would need less. Pure, and imports no torch."""

from typing import Any

from pipelines.config.experiments import CONTROL

TERMS = {
    "weight_bytes": "weights",
    "quantization_bytes": "scales of 4-bit weights",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimiser",
    "activation_bytes": "activations",
    "buffer_bytes": "buffers",
    "process_bytes": "process itself",
}
"""Parts of the memory, as `lora_core.budget.budget` names them and as they are printed."""
NAMED_TERMS = 2
"""How many of the largest are named."""


def what_would_fit(plan: dict[str, Any], label: str) -> str:
    """Return what a run was expected to need, and which single changes of the recipe need less, by the plan's figures.

    Args:
        plan: the plan stage's figures.
        label: of the arm that did not fit, such as "rank-16", "rank-16 lr 0.001" or "control"; one that the plan does not hold is
            taken for its adapter of the highest rank.
    """
    name, run = _run_of(plan, label)
    needs = f"{name} was expected to need {_gb(run['memory_bytes'])} in each process ({_largest_terms(run)})"
    less = [
        f"{way['setting']}: {_value(way['value'])} ({_gb(way['memory_bytes'])})"
        for way in run["less"]
    ]
    if not less:
        return f"{needs}, and no single change of the recipe needs less; use processes with more memory, or a smaller model"
    return f"{needs}; instead of {_gb(run['memory_bytes'])}, less would do with {_either(less)}"


def _run_of(plan: dict[str, Any], label: str) -> tuple[str, dict[str, Any]]:
    runs: dict[str, dict[str, Any]] = plan["runs"]
    name = label.partition(" ")[0]
    if name in runs:
        return name, runs[name]
    return max(
        ((key, run) for key, run in runs.items() if key != CONTROL),
        key=lambda pair: int(pair[1]["rank"]),
    )


def _largest_terms(run: dict[str, Any]) -> str:
    largest = sorted(TERMS, key=lambda term: -int(run[term]))[:NAMED_TERMS]
    return ", ".join(f"{TERMS[term]} {_gb(run[term])}" for term in largest)


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _either(ways: list[str]) -> str:
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])} or {ways[-1]}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
