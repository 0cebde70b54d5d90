"""What the matrix of models and configurations of `make parity` covers, and what it detects."""

from pathlib import Path

import pytest
import torch
from parity.features import trained
from parity.matrix.catalog import SUBJECTS
from parity.matrix.checks import CHECKS, gradients, our_file_in_peft, round_trip, step_0
from parity.matrix.configurations import CONFIGURATIONS
from parity.matrix.outcome import Ending, Outcome, Wrong, ended
from parity.matrix.pairs import pairs_of
from parity.matrix.rows import rows_of
from parity.matrix.trial import Base, Trial, trial_of
from torch import nn

from lora_core import inject

PASSED = Outcome("perceptron, default", "plain modules", "step 0", Ending.PASSED)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """A plain LoRA on two linear layers."""
    subject = next(one for one in SUBJECTS if one.name == "perceptron")
    return trial_of(subject, CONFIGURATIONS[0], Base(subject.build(), tmp_path), tmp_path / "files")


def test_quick_part_has_every_model_and_every_configuration() -> None:
    pairs = pairs_of(quick=True)
    assert {subject.name for subject, _ in pairs} == {subject.name for subject in SUBJECTS}
    assert {one.name for _, one in pairs} == {one.name for one in CONFIGURATIONS}


def test_matrix_has_at_least_150_cases_without_duplicates() -> None:
    names = [f"{subject.name}, {one.name}" for subject, one in pairs_of(quick=False)]
    assert len(names) == len(set(names)) >= 150


def test_all_checks_of_plain_lora_pass(trial: Trial) -> None:
    endings = {name: ended(lambda check=check: check(trial))[0] for name, check in CHECKS.items()}
    assert endings.pop("merge on disk") is Ending.ABSENT
    assert set(endings.values()) == {Ending.PASSED}


@torch.no_grad()
def test_changed_tensor_after_save_is_wrong(trial: Trial) -> None:
    trial.our_file  # noqa: B018 - saved before the change
    next(iter(trained(trial.ours).values())).mul_(1.01)
    for check in (our_file_in_peft, round_trip):
        with pytest.raises(Wrong):
            check(trial)


def test_gradient_of_another_scale_is_wrong(trial: Trial) -> None:
    ours = trial.pair[0]
    next(iter(trained(ours).values())).grad.mul_(2)
    with pytest.raises(Wrong, match="gradient of"):
        gradients(trial)


def test_start_that_is_not_the_base_is_wrong(trial: Trial) -> None:
    trial.base_logits.add_(1e-6)
    with pytest.raises(Wrong, match="no bit may differ"):
        step_0(trial)


def test_refusal_after_a_change_is_wrong(trial: Trial) -> None:
    model = trial.fresh()
    inject(model, trial.config, seed=1)
    with pytest.raises(Wrong, match="parts of an adapter"), trial.unchanged_if_refused(model):
        inject(model, trial.config, seed=1)


@pytest.mark.parametrize("ending", [Ending.WRONG, Ending.CRASHED])
def test_failure_misses_its_goal(ending: Ending) -> None:
    failed = Outcome("perceptron, default", "plain modules", "merge", ending, "logits differ")
    missed = [row["what"] for row in rows_of([PASSED, failed]) if row["holds"] is False]
    assert len(missed) == 3  # of its kind, of all, and the case
    assert "logits differ" in missed[-1]


def test_only_refusal_without_declared_reason_misses_its_goal() -> None:
    rank = Outcome(
        "perceptron, default", "plain modules", "merge", Ending.REFUSED, "rank 9 exceeds"
    )
    other = Outcome("perceptron, default", "plain modules", "modes", Ending.REFUSED, "too late")
    assert all(row["holds"] is not False for row in rows_of([PASSED, rank]))
    missed = [row["what"] for row in rows_of([PASSED, rank, other]) if row["holds"] is False]
    assert len(missed) == 1
    assert "too late" in missed[0]


def test_crash_is_distinguished_from_refusal() -> None:
    def crash() -> None:
        nn.Linear(2, 2)(torch.zeros(3))

    assert ended(crash)[0] is Ending.CRASHED
