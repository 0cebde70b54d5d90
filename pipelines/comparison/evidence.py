"""The measurements of one adapter that the gate needs, from the inputs of a comparison."""

from pipelines.comparison.comparison_inputs import (
    BASE,
    CONTROL,
    ComparedChampion,
    ComparedModel,
    ComparisonInputs,
)
from pipelines.comparison.differences import (
    drop_beyond_control,
    gain_share,
    general_change,
    general_metric,
    general_samples,
    open_samples,
    score_scales,
    task_gain,
)
from pipelines.comparison.gate import Evidence, OpenChange
from pipelines.comparison.record_types import GenerationRecord, TaskRecord
from pipelines.comparison.records import Records, of_type
from pipelines.comparison.resampling import Interval, mean_interval
from pipelines.comparison.scores import metric_errors


def measure(inputs: ComparisonInputs, model: ComparedModel) -> Evidence:
    """Return the measurements of one adapter by which the gate judges it.

    Args:
        inputs: of the comparison, with the records of every model.
        model: an adapter among them.
    """
    assert model.rank is not None, "an adapter has a rank"
    own = inputs.items[model.label]
    base = inputs.items[BASE]
    before = inputs.items[inputs.base_of(inputs.variant(model))]
    rival = _rival(inputs)
    general = general_samples(before, own)
    return Evidence(
        control=inputs.recipe.control.method,
        task_gain=task_gain(base, own),
        gain_share=_gain_share(inputs, own),
        general=general_change(before, own),
        general_metric=general_metric(base),
        beyond_control=_beyond_control(inputs, before, own),
        open_changes=_open_changes(before, own),
        file_bytes=model.result.saved.file_bytes,
        # an initialization from the weight doubles the rank in the file
        rank=model.result.saved.file_rank or model.rank,
        over_champion=_over_champion(inputs, model),
        champion_objection=None if rival is None else rival.objection,
        errors=metric_errors(own),
        examples=len(of_type(own, TaskRecord)),
        items=sum(len(values) for values in general.values()),
        answers=len(of_type(own, GenerationRecord)),
    )


def _control_model(inputs: ComparisonInputs) -> ComparedModel | None:
    for model in inputs.trained:
        if model.label == CONTROL:
            return model
    return None


def _gain_share(inputs: ComparisonInputs, own: Records) -> Interval | None:
    """Return an adapter's fraction of the control's gain; None without a control."""
    if _control_model(inputs) is None:
        return None
    return gain_share(inputs.items[BASE], inputs.items[CONTROL], own)


def _beyond_control(inputs: ComparisonInputs, before: Records, own: Records) -> Interval | None:
    """Return an adapter's general change minus the control's; None without a control."""
    control = _control_model(inputs)
    if control is None:
        return None
    control_base = inputs.items[inputs.base_of(inputs.variant(control))]
    return drop_beyond_control(
        inputs.items[CONTROL], own, control_base=control_base, adapter_base=before
    )


def _open_changes(before: Records, own: Records) -> tuple[OpenChange, ...]:
    """Return the change of each benchmark of open questions.

    A benchmark that alone makes up the general change is left out.
    """
    general = list(general_samples(before, own))
    scales = score_scales(before)
    changes = []
    for name, values in open_samples(before, own).items():
        if general != [name]:
            change = mean_interval(values)
            changes.append(OpenChange(name, change, scales.get(name), len(values)))
    return tuple(changes)


def _rival(inputs: ComparisonInputs) -> ComparedChampion | None:
    """Return the registered champion to beat; None if there is none, or it is one of the adapters.

    A repeated run finds the adapter that it promoted itself, and its verdicts must not change: the
    best of its own adapters is chosen among those that pass.
    """
    return inputs.context.champion if inputs.champion_here is None else None


def _over_champion(inputs: ComparisonInputs, model: ComparedModel) -> Interval | None:
    """Return the task gain over the registered champion; None if there is none to compare with."""
    rival = _rival(inputs)
    if rival is None or rival.objection is not None:
        return None
    return task_gain(inputs.items[rival.label], inputs.items[model.label])
