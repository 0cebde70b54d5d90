"""Checks of merges: in memory and back, and on disk for models that transformers saves."""

from copy import deepcopy

import torch
from parity.features import parts_of_largest
from parity.matrix.comparison import bits_of, require_close, require_equal
from parity.matrix.outcome import ReferenceDiffers, Wrong
from parity.matrix.reference import merged_by_peft
from parity.matrix.trial import Trial

from lora_core import merge, merge_checkpoint, unmerge
from lora_core.modules import adapter_parts
from pipelines.models.renames import weight_renames


def merged(trial: Trial) -> None:
    """A merge computes what the adapter computed, and what PEFT's merge computes."""
    model = deepcopy(trial.ours)
    merge(model)
    if next(adapter_parts(model), None) is not None:
        raise Wrong("the merge left parts of the adapter in the model")
    tolerance = trial.case.tolerance.logits
    found = trial.logits(model)
    require_close("logits", found, trial.our_logits, tolerance)
    after = merged_by_peft(trial, trial.in_peft)
    if not parts_of_largest(after, trial.logits_in_peft) <= tolerance:
        raise ReferenceDiffers("PEFT's merge changes what its own adapter computes")
    require_close("logits after PEFT's merge", found, after, tolerance)


def unmerged(trial: Trial) -> None:
    """Undoing a merge restores every bit of the base and of the adapter."""
    model = deepcopy(trial.ours)
    expected = bits_of(model)
    unmerge(model, merge(model))
    require_equal("tensors", bits_of(model), expected)
    if not torch.equal(trial.logits(model), trial.our_logits):
        raise Wrong("logits differ after a merge and its reversal")


def merged_on_disk(trial: Trial) -> None:
    """The merge on disk gives the model that the merge in memory gives."""
    checkpoint = trial.base.checkpoint
    destination = trial.folder / "merged"
    renames = weight_renames(trial.base.model)
    merge_checkpoint(checkpoint, trial.our_file, destination, renames=renames)
    found = type(trial.base.model).from_pretrained(destination).eval()
    logits = trial.logits(found)
    require_close("logits", logits, trial.our_logits, trial.case.tolerance.logits)
    in_memory = deepcopy(trial.ours)
    merge(in_memory)
    require_equal("tensors", bits_of(found), bits_of(in_memory))
    if not torch.equal(logits, trial.logits(in_memory)):
        raise Wrong("logits differ from those of the merge in memory")
