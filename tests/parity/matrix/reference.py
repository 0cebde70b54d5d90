"""A difference from PEFT: wrong here, announced by our save, or a contradiction within PEFT."""

from copy import deepcopy

from parity.features import parts_of_largest
from parity.matrix.outcome import Announced, ReferenceDiffers, ReferenceRefuses, Wrong, of_peft
from parity.matrix.trial import Trial
from peft import PeftModel
from torch import Tensor

PEFT_READS_OTHERWISE = ("PEFT applies", "PEFT takes", "target_modules='all-linear' adapts")
"""How our warnings start that announce a difference."""


def merged_by_peft(trial: Trial, model: PeftModel) -> Tensor:
    """Return the logits after PEFT's merge of a copy."""
    copy = deepcopy(model)
    with of_peft():
        return trial.logits(copy.merge_and_unload())


def compare_with_peft(trial: Trial, ours: Tensor, theirs: Tensor, model: PeftModel) -> None:
    """Compare logits with those of PEFT's `model`.

    Raises:
        Wrong: they differ.
        ReferenceDiffers: they differ, and PEFT's own merge computes what we compute.
        Announced: they differ, and our save warned that they would.
    """
    tolerance = trial.case.tolerance.logits
    if parts_of_largest(theirs, ours) <= tolerance:
        return
    try:
        after_merge = merged_by_peft(trial, model)
    except ReferenceRefuses:
        after_merge = theirs
    if parts_of_largest(after_merge, ours) <= tolerance:
        raise ReferenceDiffers("PEFT computes what we compute only after its own merge")
    difference = parts_of_largest(theirs, ours)
    raise_difference(trial, f"logits differ by {difference:.2g} of the largest")


def raise_difference(trial: Trial, message: str) -> None:
    """Raise Wrong, or Announced if our save warned that PEFT reads the file differently."""
    for warning in trial.announced:
        if warning.startswith(PEFT_READS_OTHERWISE):
            raise Announced(warning)
    raise Wrong(message)
