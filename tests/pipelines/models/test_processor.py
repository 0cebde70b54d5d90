"""The processor's units are read from the kernel, and its speed is measured."""

import json
import os
from pathlib import Path

import pytest

from pipelines.models import processor
from pipelines.models.processor import identify_processor, measure
from pipelines.runtime.interfaces.inputs import ProcessorInputs, StagePaths

ZEN = "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\n"
SAPPHIRE = "model name : Intel Xeon\nflags : avx2 avx512_bf16 amx_tile amx_bf16\n"
GRAVITON = "processor : 0\nFeatures : fp asimd bf16 i8mm\n"
OLDER = "model name : Intel Core\nflags : fpu avx2 fma\nbugs : bf16\n"


@pytest.fixture(autouse=True)
def without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processor.LIMITS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "model", "units"),
    [
        (2 * ZEN, "AMD EPYC 9R14", ("avx512_bf16",)),
        (SAPPHIRE, "Intel Xeon", ("amx_bf16", "avx512_bf16")),
        (GRAVITON, os.uname().machine, ("bf16",)),
        (OLDER, "Intel Core", ()),
        ("", os.uname().machine, ()),
    ],
)
def test_units_for_bfloat16_are_identified(
    tmp_path: Path, text: str, model: str, units: tuple[str, ...]
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert identify_processor(file) == ProcessorInputs(model=model, units=units)


def test_without_a_description_no_units_are_known(tmp_path: Path) -> None:
    assert identify_processor(tmp_path / "missing").units == ()


def test_limits_of_the_user_are_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(ZEN)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert identify_processor(file).limits == {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def test_the_measurement_takes_half_a_second(tmp_path: Path) -> None:
    result, files = measure(tmp_path, identify_processor(), StagePaths())
    assert files == []
    assert result.float32_gflops > 1
    assert result.speedup == result.bfloat16_gflops / result.float32_gflops
    assert json.loads(result.model_dump_json())["bfloat16_gflops"] > 0
