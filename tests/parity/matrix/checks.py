"""The checks of one case: each raises what `outcome.ended` translates, or returns if it holds."""

import shutil
from collections.abc import Callable
from copy import deepcopy

import torch
from parity.features import parts_of_largest, trained
from parity.matrix.comparison import Bits, bits_of, require_close, require_equal
from parity.matrix.derivative import gradients_by_key, only_ours_is_the_derivative
from parity.matrix.merge_checks import merged, merged_on_disk, unmerged
from parity.matrix.outcome import ReferenceDiffers, Wrong, of_peft
from parity.matrix.reference import compare_with_peft, raise_difference
from parity.matrix.trial import Trial
from peft import get_peft_model_state_dict

from lora_core import Bank, Identity, fingerprint
from lora_core.adapter.adapter_files import read_tensors
from lora_core.adapter.io import adapter_tensors
from lora_core.adapter.json_files import CONFIG, IDENTITY, WEIGHTS

SEEN = 10
"""An adapter changes the logits by this multiple of the tolerance, so a lost one is detected."""
LEARNING_RATE = 0.05
BASE_COPY = ".base_layer."
"""In the keys under which PEFT saves tensors of the base."""
FILES = (WEIGHTS, CONFIG, IDENTITY)


def step_0(trial: Trial) -> None:
    """A new adapter computes what the base computes, bit for bit where nothing is rounded."""
    config = trial.config
    found = trial.start.logits
    is_exact = config.init_lora_weights in ("kaiming", "gaussian") and not config.use_dora
    if is_exact and not torch.equal(found, trial.base_logits):
        difference = parts_of_largest(found, trial.base_logits)
        raise Wrong(f"logits differ by {difference:.2g} of the largest, and no bit may differ")
    require_close("logits", found, trial.base_logits, trial.case.tolerance.logits)


def effect(trial: Trial) -> None:
    """A changed adapter changes the logits."""
    found = parts_of_largest(trial.our_logits, trial.base_logits)
    if found < SEEN * trial.case.tolerance.logits:
        raise Wrong(f"the adapter changes the logits by {found:.2g} of the largest only")


def base_weights(trial: Trial) -> None:
    """The base below the adapter is the same, by its fingerprint."""
    if fingerprint(trial.ours) != fingerprint(trial.base.model):
        raise Wrong("the fingerprint of the base changed")


def trained_parameters(trial: Trial) -> None:
    """Both libraries train tensors of the same names and shapes."""
    found, expected = trial.start.shapes, trial.their_start.shapes
    missing = expected.keys() - found.keys()
    extra = sorted(found.keys() - expected.keys())
    if missing and not extra and missing <= _unused_in_peft(trial):
        raise ReferenceDiffers(f"PEFT trains {min(missing)}, which its model does not use")
    if missing or extra:
        raise_difference(
            trial, f"PEFT alone trains {sorted(missing)[:2]}, and we alone train {extra[:2]}"
        )
    for key, shape in expected.items():
        if found[key] != shape:
            raise Wrong(f"{key} has shape {found[key]}, in PEFT {shape}")


def our_file_in_peft(trial: Trial) -> None:
    """PEFT computes the same with our file."""
    _compare_in_peft(trial)


def our_tensors_in_peft(trial: Trial) -> None:
    """PEFT holds each tensor of our file, and saves the same again."""
    tensors = read_tensors(trial.our_file)
    held = {key: value.detach() for key, value in trained(trial.in_peft).items()}
    once = {key: tensors[key] for key in trained(trial.ours)}  # the file repeats tied tensors
    require_equal("tensors in PEFT", held, once)
    with of_peft():
        saved = get_peft_model_state_dict(trial.in_peft)
    require_equal("tensors that PEFT saves", _without_copies(saved, tensors), tensors)


def their_file_here(trial: Trial) -> None:
    """We compute the same with PEFT's file."""
    compare_with_peft(trial, trial.logits(trial.here), trial.their_logits, trial.theirs)


def their_tensors_here(trial: Trial) -> None:
    """We hold each tensor of PEFT's file."""
    found = adapter_tensors(trial.here)
    require_equal("tensors here", found, _without_copies(read_tensors(trial.their_file), found))


def round_trip(trial: Trial) -> None:
    """Our file, loaded here, computes the same bits."""
    again = trial.loaded(trial.our_file)
    require_equal("tensors", adapter_tensors(again), adapter_tensors(trial.ours))
    if trial.case.is_spectral:
        require_close("logits", trial.logits(again), trial.our_logits, trial.case.tolerance.logits)
    elif not torch.equal(trial.logits(again), trial.our_logits):
        raise Wrong("logits differ after a save and a load")


def saved_again(trial: Trial) -> None:
    """A loaded adapter is saved as the same bytes, with the same config."""
    bank = Bank(trial.fresh())
    bank.load("adapter", trial.our_file)
    bank.save("adapter", trial.folder / "again", Identity())
    _require_same_bytes(trial, "again")


def config_through_peft(trial: Trial) -> None:
    """Our config, read and written by PEFT, describes the same adapter."""
    folder = trial.folder / "config of PEFT"
    model = trial.in_peft
    with of_peft():
        model.peft_config["default"].save_pretrained(str(folder))
    shutil.copyfile(trial.our_file / WEIGHTS, folder / WEIGHTS)
    again = trial.loaded(folder)
    require_equal("tensors", adapter_tensors(again), adapter_tensors(trial.ours))
    require_close("logits", trial.logits(again), trial.our_logits, trial.case.tolerance.logits)


def same_bytes(trial: Trial) -> None:
    """A second save gives identical files."""
    trial.our_file  # noqa: B018 - the first save
    trial.saved(trial.ours, "twice")
    _require_same_bytes(trial, "twice")


def gradients(trial: Trial) -> None:
    """The same loss has the same gradients in both."""
    found, expected = map(gradients_by_key, trial.pair)
    if found.keys() != expected.keys():
        raise Wrong(f"gradients of other tensors: {sorted(found.keys() ^ expected.keys())[:2]}")
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        difference = parts_of_largest(found[key], gradient.view_as(found[key]), 1e-2 * largest)
        if not difference <= trial.case.tolerance.gradients:
            _raise_for(trial, key, f"the gradient of {key} differs by {difference:.2g}")


def one_step(trial: Trial) -> None:
    """One step of SGD gives the same tensors in both, and leaves the base as it is."""
    ours, theirs = trial.pair
    for model in (ours, theirs):
        parameters = [one for one in model.parameters() if one.requires_grad]
        torch.optim.SGD(parameters, lr=LEARNING_RATE).step()
    if fingerprint(ours) != fingerprint(trial.base.model):
        raise Wrong("a step changed the base")
    found, expected = trained(ours), trained(theirs)
    for key, value in expected.items():
        difference = parts_of_largest(found[key], value.view_as(found[key]))
        if not difference <= trial.case.tolerance.gradients:
            _raise_for(trial, key, f"{key} differs by {difference:.2g} after a step")


def switched_off(trial: Trial) -> None:
    """Without the adapter, the model is the base; with it again, it is what it was."""
    bank = Bank(trial.fresh())
    bank.load("adapter", trial.our_file)
    bank.use("adapter")
    with_adapter = trial.logits(bank.model)
    bank.use(None)
    require_equal("tensors without the adapter", bits_of(bank.model), trial.bits)
    if not torch.equal(trial.logits(bank.model), trial.base_logits):
        raise Wrong("logits without the adapter differ from the base's")
    require_close(
        "logits with the adapter", with_adapter, trial.our_logits, trial.case.tolerance.logits
    )


def row_by_row(trial: Trial) -> None:
    """In a batch, one row uses the adapter and one the base."""
    bank = Bank(trial.fresh())
    bank.load("adapter", trial.our_file)
    with bank.rows(["adapter", None]):
        found = trial.logits(bank.model)
    expected = torch.stack([trial.our_logits[0], trial.base_logits[1]])
    require_close("logits", found, expected, trial.case.tolerance.logits)


def modes(trial: Trial) -> None:
    """Training and evaluation mode leave all tensors as they are."""
    model = deepcopy(trial.ours)
    expected = bits_of(model)
    model.train()
    require_equal("tensors in training mode", bits_of(model), expected)
    model.eval()
    require_equal("tensors in evaluation mode", bits_of(model), expected)
    if not torch.equal(trial.logits(model), trial.our_logits):
        raise Wrong("logits differ after a change of the mode")


def _compare_in_peft(trial: Trial) -> None:
    compare_with_peft(trial, trial.our_logits, trial.logits_in_peft, trial.in_peft)


def _raise_for(trial: Trial, key: str, message: str) -> None:
    """Raise for a difference in the training of one tensor, which may be PEFT's contradiction."""
    _compare_in_peft(trial)
    if only_ours_is_the_derivative(trial, key):
        raise ReferenceDiffers("PEFT's gradient is not the derivative of PEFT's loss, ours is")
    raise_difference(trial, message)


def _unused_in_peft(trial: Trial) -> set[str]:
    """Return the keys of what PEFT trains without any gradient."""
    model = deepcopy(trial.theirs)
    with of_peft():
        trial.loss(model).backward()
    return {key for key, parameter in trained(model).items() if parameter.grad is None}


def _require_same_bytes(trial: Trial, name: str) -> None:
    for file in FILES:
        if (trial.our_file / file).read_bytes() != (trial.folder / name / file).read_bytes():
            raise Wrong(f"{file} differs")


def _without_copies(tensors: Bits, trained_here: Bits) -> Bits:
    """Remove what PEFT saves of the base with an adapted embedding or head."""
    return {
        key: value for key, value in tensors.items() if BASE_COPY not in key or key in trained_here
    }


Check = Callable[[Trial], None]
CHECKS: dict[str, Check] = {
    "step 0": step_0,
    "effect": effect,
    "base weights": base_weights,
    "trained parameters": trained_parameters,
    "our file in PEFT": our_file_in_peft,
    "our tensors in PEFT": our_tensors_in_peft,
    "PEFT's file here": their_file_here,
    "PEFT's tensors here": their_tensors_here,
    "round trip": round_trip,
    "saved again": saved_again,
    "config through PEFT": config_through_peft,
    "same bytes": same_bytes,
    "gradients": gradients,
    "one step": one_step,
    "merge": merged,
    "unmerge": unmerged,
    "merge on disk": merged_on_disk,
    "switched off": switched_off,
    "row by row": row_by_row,
    "modes": modes,
}
