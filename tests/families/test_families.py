"""`make families --quick` passes, and its checks can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model

from families.__main__ import measured_apart, rows_of
from families.goals import QUICK
from families.measure import Measured
from families.precision import CLOSE, RATES, trained
from pipelines.errors import PipelineError
from pipelines.models.hardware import FUSED, Optimizer
from pipelines.training.optimizers import build

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quick_form_passes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "families",
        "--quick",
        "--result",
        str(tmp_path / "families.json"),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    ended = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "families.json").read_text())
    assert {row["what"].partition(" (")[0] for row in rows} == set(QUICK)
    assert all(
        set(row) == {"what", "value", "unit", "goal", "holds"} and row["holds"] for row in rows
    )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama", Measured("packed", loss=1e-3)),
        ("llama", Measured("packed", gradient=float("inf"))),
        ("llama", Measured("packed", tree=0.01)),
        ("llama", Measured("packed", answers=1)),
        ("llama", Measured("one by one")),
        ("bloom", Measured("refused")),
        ("any other", Measured("crashed")),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else f"{value.path} {value.loss} {value.gradient} {value.tree} {value.answers}"
    ),
)
def test_missed_goal_is_detected(name: str, found: Measured) -> None:
    assert not all(row["holds"] for row in rows_of(name, found))


def test_family_that_cannot_be_built_is_reported() -> None:
    assert measured_apart("no such family").path == "unbuilt"


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_control_changes_as_many_weights_as_in_float32(
    tmp_path: Path, dtype: torch.dtype, rate: float
) -> None:
    base = save_tiny_model(tmp_path / "model")
    exact, found = (
        trained(base, rate, one, masters=True, steps=8) for one in (torch.float32, dtype)
    )
    assert exact.moved > 0.99
    assert (
        abs(found.moved - exact.moved) < CLOSE
        and abs(found.norms_moved - exact.norms_moved) < CLOSE
    )
    assert found.first - found.last == pytest.approx(exact.first - exact.last, rel=0.2)


def test_adamw_on_sixteen_bit_weights_loses_updates_and_is_refused(tmp_path: Path) -> None:
    lost = trained(
        save_tiny_model(tmp_path / "model"), RATES[0], torch.bfloat16, masters=False, steps=8
    )
    assert lost.moved < 0.5 and lost.norms_moved == 0
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], "lr": 0.1}]
    with pytest.raises(
        PipelineError, match=r"AdamW would train weights of bfloat16, .* float32 .*masters=True"
    ):
        build(Optimizer(FUSED, ""), groups)
    build(Optimizer(FUSED, ""), groups, has_masters=True)
