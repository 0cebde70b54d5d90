"""A training on a CPU is in bfloat16 if the recipe says so, or if this host multiplies faster."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.config.recipe import parse_recipe
from pipelines.runtime.interfaces.inputs import ProcessorInputs
from pipelines.runtime.interfaces.results import ProcessorResult
from pipelines.workflow import stages as stages_module
from pipelines.workflow.stages import ProcessorStage, Stages
from pipelines.workflow.training_dtype import WORTH_IT, resolve_dtype


class Measured:
    """Runs the stage that measures a processor, with a given result."""

    def __init__(self, speedup: float) -> None:
        self.speedup = speedup
        self.stages: list[ProcessorStage] = []

    def __call__(self, stage: ProcessorStage) -> ProcessorResult:
        self.stages.append(stage)
        return ProcessorResult(float32_gflops=100.0, bfloat16_gflops=100.0 * self.speedup)


def resolved(
    tmp_path: Path,
    measured: Measured,
    *,
    config: str = "cpu_single",
    training: dict[str, Any] | None = None,
) -> str:
    """Return the dtype of the training after it is resolved."""
    recipe = parse_recipe(
        {
            "name": "dtype",
            "base_model": {"id": "model"},
            "data": {"source": "docstrings"},
            "lora": {"ranks": [4]},
            "training": {"steps": 4} | (training or {}),
            "launch": {"config": config},
            "registry": {"model": "dtype"},
        }
    )
    return resolve_dtype(recipe, Stages(recipe, tmp_path), measured).training.dtype


@pytest.fixture
def with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host have units for bfloat16."""
    units = ("avx512_bf16",)
    monkeypatch.setattr(
        stages_module, "identify_processor", lambda: ProcessorInputs(model="one", units=units)
    )


@pytest.mark.usefixtures("with_units")
@pytest.mark.parametrize(
    ("speedup", "dtype"), [(4.0, "bfloat16"), (WORTH_IT, "bfloat16"), (1.2, "float32")]
)
def test_auto_is_what_multiplies_faster(tmp_path: Path, speedup: float, dtype: str) -> None:
    measured = Measured(speedup)
    assert resolved(tmp_path, measured) == dtype
    assert [stage.label for stage in measured.stages] == ["avx512_bf16"]


@pytest.mark.usefixtures("with_units")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_recipe_decides(tmp_path: Path, dtype: str) -> None:
    measured = Measured(4.0)
    assert resolved(tmp_path, measured, training={"dtype": dtype}) == dtype
    assert measured.stages == []


@pytest.mark.usefixtures("with_units")
def test_a_gpu_is_asked_by_the_training(tmp_path: Path) -> None:
    measured = Measured(4.0)
    assert resolved(tmp_path, measured, config="gpu_ddp") == "auto"
    assert measured.stages == []


def test_without_units_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stages_module, "identify_processor", lambda: ProcessorInputs(model="one", units=())
    )
    measured = Measured(4.0)
    assert resolved(tmp_path, measured) == "float32"
    assert measured.stages == []
