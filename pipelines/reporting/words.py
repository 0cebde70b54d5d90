"""The outcome of a comparison in sentences, for readers who are not familiar with LoRA."""

from pipelines.comparison.comparison import CONTROL, QUANTIZED_BASE
from pipelines.comparison.document import ModelSummary, Summary
from pipelines.comparison.frontier import percent
from pipelines.reporting.model_parts import judgment_of, total_of, training_of, verified_readers


def headline(summary: Summary) -> str:
    """Return the outcome as one sentence."""
    champion = summary.champion
    if champion is None:
        return _headline_without_champion(summary)
    model = summary.models[champion]
    trained = training_of(model).result.facts.trained_weights
    percentage = 100 * trained / summary.base.weights
    return (
        f"Use {champion}: by training {percentage:.2g}\u00a0% as many weights "
        f"{_learned(summary, model)}, and it forgot no more than the gate allows"
        f"{_smaller_alternative(summary)}."
    )


def _headline_without_champion(summary: Summary) -> str:
    candidate = summary.candidate
    if candidate is None:
        return "No adapter is put forward."
    missing = _missing(summary.models[candidate])
    return f"No adapter is put forward; {candidate} was not rejected, {missing}."


def _missing(model: ModelSummary) -> str:
    """Return what an adapter lacks to pass: more items, unless a rule needs something else."""
    others = []
    for rule in judgment_of(model).verdict.rules:
        if rule.status == "can't tell" and rule.beyond_items:
            others.append(rule.reason.rstrip("."))
    if others:
        return "but more items cannot decide whether it passes: " + "; ".join(others)
    return "and scoring more items would decide"


def _smaller_alternative(summary: Summary) -> str:
    recommended = summary.recommended
    if recommended is None or recommended.label == summary.champion:
        return ""
    difference = "not clearly worse"
    if recommended.gives_up is not None:
        difference = f"gives up at most {percent(recommended.gives_up)}\u00a0% of the gain"
    return f"; {recommended.label} is smaller and {difference}"


def _learned(summary: Summary, model: ModelSummary) -> str:
    fraction = judgment_of(model).gain_share
    if fraction is None:
        gain = total_of(model).task_gain.mean
        return f"it gained {gain:.3f} nats per token on the task"
    control = "full fine-tuning"
    if summary.control.method != "full":
        control = f"the control, an adapter of rank {_control_rank(summary)},"
    percentage = 100 * fraction.mean
    return f"it learned {percentage:.0f}\u00a0% of what {control} learned"


def _control_rank(summary: Summary) -> int:
    rank = summary.recipe.control.rank
    assert rank is not None, "a control that is an adapter has a rank"
    return rank


def recommended_text(summary: Summary) -> str:
    """Return the recommended rank and the reason; empty if no adapter passes."""
    recommended = summary.recommended
    if recommended is None:
        return ""
    is_champion = recommended.label == summary.champion
    where_size_counts = "" if is_champion else " where size counts"
    return f"Recommended{where_size_counts}: {recommended.reason}."


def registered_text(summary: Summary) -> str:
    """Return the registered versions and aliases; empty if nothing was registered."""
    registered = summary.registered
    if registered is None:
        return ""
    versions = []
    for label, version in registered.versions.items():
        versions.append(f"{label} as version {version}")
    aliases = []
    for alias, version in registered.aliases.items():
        aliases.append(f"{alias} is version {version}")
    listed = ", ".join(versions) or "no adapter"
    moved = ", ".join(aliases) or "no alias was moved"
    return f"Registered in {registered.model}: {listed}; {moved}."


def verified_text(summary: Summary) -> str:
    """Return how closely training and scoring match the models' own forward pass.

    It also names the models that are read one example at a time.
    """
    differences = []
    unpacked = set()
    for label, checks in summary.forward.items():
        for result in verified_readers(checks).values():
            differences.append(result.loss_difference)
            if not result.is_packed:
                unpacked.add(label)
    if not differences:
        return ""
    path = ""
    if unpacked:
        labels = ", ".join(sorted(unpacked))
        path = f"; read one example at a time: {labels}"
    largest = max(differences)
    return (
        f"Training and scoring match the models' own forward within {largest:.0e} "
        f"nats per token{path}."
    )


def legend(summary: Summary) -> str:
    """Return what the columns of the tables mean."""
    has_quantized_base = QUANTIZED_BASE in summary.models
    of_base = f"; of {QUANTIZED_BASE}: by quantization" if has_quantized_base else ""
    return (
        "Task gain: nats per token over the base. "
        f"General change: by training, with its 95 % interval{of_base}."
    )


def control_name(summary: Summary) -> str:
    """Return the control's name in a legend; empty without a control."""
    if CONTROL not in summary.models:
        return ""
    if summary.control.method == "full":
        return "control: full fine-tuning"
    return f"control: rank {_control_rank(summary)}"


def learning_rate(summary: Summary, label: str) -> float | None:
    """Return the peak learning rate of a model's training; None if the model was not trained.

    Args:
        summary: of the comparison.
        label: of any model in it.
    """
    if label == CONTROL:
        return summary.control.chosen
    training = summary.models[label].training
    if training is None:
        return None
    if training.adapter is not None:
        return training.adapter.learning_rate
    return summary.recipe.lora.learning_rate


def grid_text(summary: Summary) -> str:
    """Return in a sentence how the adapters were found; empty for a recipe without a grid."""
    grid = summary.grid
    if grid is None:
        return ""
    plural = "s" if len(grid.survivors) == 1 else ""
    diverged = ""
    if grid.diverged:
        diverged = f" {' and '.join(grid.diverged)} diverged after the last halving."
    return (
        f"Of {len(grid.experiments)} experiments, {' and '.join(grid.survivors)} remain{plural}: "
        "by successive halving, the experiments with the higher loss on the tuning examples were "
        f"stopped early, which took {grid.steps_taken:,} instead of {grid.exhaustive_steps:,} "
        f"steps.{diverged}"
    )
