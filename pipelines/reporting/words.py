"""What a comparison comes to, in sentences for readers who know no ranks."""

from collections.abc import Mapping
from typing import Any

from pipelines.comparison.comparison import CONTROL, QUANTIZED_BASE
from pipelines.comparison.frontier import percent

Summary = Mapping[str, Any]


def headline(summary: Summary) -> str:
    """Return the outcome as one sentence."""
    champion, candidate = summary["champion"], summary["candidate"]
    if champion is None:
        return "No adapter is put forward" + (
            f"; {candidate} was not rejected, {_missing(summary['models'][candidate])}."
            if candidate
            else "."
        )
    model = summary["models"][champion]
    trained = 100 * model["figures"]["trained_weights"] / summary["base"]["weights"]
    return (
        f"Use {champion}: by training {trained:.2g}\u00a0% as many weights {_learnt(summary, model)}, "
        f"and it forgot no more than the gate allows{_smaller(summary)}."
    )


def _missing(model: Summary) -> str:
    """Say what is missing for an adapter that was not rejected to pass: items, unless something else is."""
    open_rules = [rule for rule in model["verdict"]["rules"] if rule["status"] == "can't tell"]
    others = [rule["reason"].rstrip(".") for rule in open_rules if rule.get("beyond_items", False)]
    return (
        "but it cannot be told to pass: " + "; ".join(others)
        if others
        else "and scoring more items would tell"
    )


def _smaller(summary: Summary) -> str:
    found = summary["recommended"]
    if not found or found["label"] == summary["champion"]:
        return ""
    given_up = found.get("gives_up")  # summaries of before say only that it was not surely worse
    worse = (
        "not surely worse"
        if given_up is None
        else f"gives up at most {percent(given_up)}\u00a0% of the gain"
    )
    return f"; {found['label']} is smaller and {worse}"


def _learnt(summary: Summary, model: Summary) -> str:
    share = model["gain_share"]
    if share is None:
        return f"it gained {model['total']['task_gain']['mean']:.3f} nats per token on the task"
    whom = (
        "full fine-tuning"
        if summary["control"]["method"] == "full"
        else f"the control, an adapter of rank {_control_rank(summary)},"
    )
    return f"it learnt {100 * share['mean']:.0f}\u00a0% of what {whom} learnt"


def _control_rank(summary: Summary) -> int:
    return int(summary["recipe"]["control"]["rank"])


def recommended_text(summary: Summary) -> str:
    """Return the smallest rank that does, and why; nothing where no adapter passes."""
    found = summary["recommended"]
    if not found:
        return ""
    where_size_counts = " where size counts" if found["label"] != summary["champion"] else ""
    return f"Recommended{where_size_counts}: {found['reason']}."


def registered_text(summary: Summary) -> str:
    """Return which versions and aliases the registry holds; nothing where none was registered."""
    registered = summary.get("registered")
    if not registered:
        return ""
    versions = ", ".join(
        f"{label} as version {version}" for label, version in registered["versions"].items()
    )
    aliases = ", ".join(
        f"{alias} is version {version}" for alias, version in registered["aliases"].items()
    )
    return f"Registered in {registered['model']}: {versions}" + (
        f"; {aliases}." if aliases else "; no alias was moved."
    )


def verified_text(summary: Summary) -> str:
    """Return how far training and scoring are from the models' own forward, and what was read one example at a time."""
    found = [
        one
        for ways in summary.get("forward", {}).values()
        for one in ways.values()
        if one is not None
    ]
    if not found:
        return ""
    largest = max(one["loss_difference"] for one in found)
    slow = sorted(
        {
            label
            for label, ways in summary["forward"].items()
            for one in ways.values()
            if one and one["path"] != "packed"
        }
    )
    path = f"; read one example at a time: {', '.join(slow)}" if slow else ""
    return f"Training and scoring match the models' own forward within {largest:.0e} nats per token{path}."


def legend(summary: Summary) -> str:
    """Return what the columns of the tables mean."""
    of_base = (
        f"; of {QUANTIZED_BASE}: by quantisation" if QUANTIZED_BASE in summary["models"] else ""
    )
    return f"Task gain: nats per token over the base. General change: by training, with its 95 % interval{of_base}."


def control_name(summary: Summary) -> str:
    """Return the control as a legend names it; nothing where there is none."""
    if CONTROL not in summary["models"]:
        return ""
    return (
        "control: full fine-tuning"
        if summary["control"]["method"] == "full"
        else f"control: rank {_control_rank(summary)}"
    )


def learning_rate(summary: Summary, label: str) -> float | None:
    """Return the peak rate at which a model was trained; None for what was not trained."""
    if label == CONTROL:
        return float(summary["control"]["chosen"])
    return (
        float(summary["recipe"]["lora"]["learning_rate"])
        if "figures" in summary["models"][label]
        else None
    )
