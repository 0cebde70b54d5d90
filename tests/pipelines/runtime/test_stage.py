"""A stage is named by its inputs, and done as long as its result and files are intact."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from synthetic_stages import (
    OTHER,
    SYNTHETIC,
    SyntheticInputs,
    SyntheticLora,
    SyntheticResult,
)

import pipelines.runtime.stage
from lora_core.files import write_json
from pipelines.errors import StageError, record_error, recorded_error
from pipelines.runtime.interfaces.inputs import StagePaths, TrainOptions
from pipelines.runtime.interfaces.kinds import BASE, KINDS
from pipelines.runtime.stage import (
    Stage,
    digest,
    read_inputs,
    read_result,
    write_result,
)

Values = dict[str, Any]
SyntheticStage = Stage[SyntheticInputs, SyntheticResult]
INPUTS = SyntheticInputs()
PATHS = StagePaths(base="models/tiny")
RESULT = SyntheticResult(loss=1.5)


@pytest.fixture
def stage(tmp_path: Path) -> SyntheticStage:
    return Stage(SYNTHETIC, "rank-4", INPUTS, tmp_path / "runs", PATHS)


@pytest.fixture
def finished(stage: SyntheticStage) -> SyntheticStage:
    """A stage with a result that names two files."""
    folder = stage.begin()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(b"\x00\x01")
    (folder / "items.jsonl").write_text("{}\n")
    write_result(folder, RESULT, ["items.jsonl", "adapter/weights"])
    return stage


@pytest.fixture
def key_of(tmp_path: Path) -> Callable[..., str]:
    """Return a function that computes the key of a stage with changed fields."""

    def key(**changes: Any) -> str:
        fields = {
            "kind": SYNTHETIC,
            "label": "rank-4",
            "inputs": INPUTS,
            "root": tmp_path,
            "paths": PATHS,
        }
        return Stage(**{**fields, **changes}).key

    return key


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_module_that_can_be_run(kind: str) -> None:
    spec = find_spec(KINDS[kind].module)
    assert spec is not None
    assert spec.origin is not None
    assert '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": OTHER},
        {"kind": replace(SYNTHETIC, format=2)},
        {"inputs": SyntheticInputs(rank=8)},
        {"inputs": SyntheticInputs(lora=SyntheticLora(init="gaussian"))},
        {"inputs": SyntheticInputs(names=("b", "a"))},
        {"inputs": SyntheticInputs(rank="4")},
    ],
    ids=["kind", "format", "a value", "a nested value", "an order", "a type"],
)
def test_the_key_changes_with_what_determines_the_outcome(
    key_of: Callable[..., str], changes: Values
) -> None:
    assert key_of(**changes) != key_of()


@pytest.mark.parametrize(
    "changes",
    [
        {"paths": StagePaths(base="elsewhere")},
        {"paths": StagePaths()},
        {"options": TrainOptions(processes=2, device="cpu", timeout_seconds=60)},
        {"expects": ("adapter/weights",)},
        {"root": Path("elsewhere")},
        {"label": "other"},
        {"inputs": SyntheticInputs(names=("a", "b"), rank=4)},
    ],
    ids=[
        "a path",
        "no paths",
        "an option",
        "an expected file",
        "the root",
        "the label",
        "the order of the names",
    ],
)
def test_the_key_does_not_depend_on_anything_else(
    key_of: Callable[..., str], changes: Values
) -> None:
    assert key_of(**changes) == key_of()


def test_the_key_changes_with_a_library(
    key_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key_of()
    newer = pipelines.runtime.stage.library_versions() | {"torch": "0"}
    monkeypatch.setattr(pipelines.runtime.stage, "library_versions", lambda: newer)
    assert key_of() != before


def test_the_folder_is_named_after_kind_label_and_key(stage: SyntheticStage) -> None:
    assert stage.folder == stage.root / "train" / f"rank-4-{stage.key[:12]}"


def test_begin_writes_inputs_and_paths(stage: SyntheticStage) -> None:
    folder = stage.begin()
    written = json.loads((folder / "inputs.json").read_text())
    assert (written["kind"], written["label"], written["key"]) == ("train", "rank-4", stage.key)
    assert read_inputs(folder, SYNTHETIC) == (INPUTS, PATHS)


def test_begin_deletes_an_earlier_error(stage: SyntheticStage) -> None:
    record_error(stage.begin(), StageError("it broke"))
    assert str(recorded_error(stage.folder)) == "it broke"
    assert recorded_error(stage.begin()) is None


def test_begin_keeps_the_files_of_a_stopped_run(stage: SyntheticStage) -> None:
    (stage.begin() / "checkpoints").mkdir()
    assert (stage.begin() / "checkpoints").is_dir()


def test_a_stage_without_a_folder_has_no_result(stage: SyntheticStage) -> None:
    assert stage.result() is None


def test_an_unfinished_stage_has_no_result(stage: SyntheticStage) -> None:
    stage.begin()
    assert stage.result() is None


def test_a_finished_stage_returns_its_result(finished: SyntheticStage) -> None:
    assert finished.result() == RESULT


def test_an_equal_stage_has_the_same_result(finished: SyntheticStage) -> None:
    for label in ("rank-4", "another-label"):
        assert Stage(SYNTHETIC, label, INPUTS, finished.root).result() == RESULT


def test_a_stage_without_files_is_done_once_it_has_a_result(stage: SyntheticStage) -> None:
    write_result(stage.begin(), RESULT, [])
    assert stage.result() == RESULT


@pytest.mark.parametrize("name", ["items.jsonl", "adapter/weights"])
def test_a_missing_file_invalidates_the_result(finished: SyntheticStage, name: str) -> None:
    (finished.folder / name).unlink()
    assert finished.result() is None


@pytest.mark.parametrize("name", ["items.jsonl", "adapter/weights"])
def test_a_changed_file_invalidates_the_result(finished: SyntheticStage, name: str) -> None:
    path = finished.folder / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert finished.result() is None


def test_other_files_may_change(finished: SyntheticStage) -> None:
    (finished.folder / "log.txt").write_text("more\n")
    assert finished.result() == RESULT


def test_a_result_is_not_written_without_its_files(stage: SyntheticStage) -> None:
    folder = stage.begin()
    with pytest.raises(FileNotFoundError):
        write_result(folder, RESULT, ["items.jsonl"])
    assert stage.result() is None
    assert {path.name for path in folder.iterdir()} == {"inputs.json"}


def test_a_result_of_another_version_is_no_result(stage: SyntheticStage) -> None:
    folder = stage.begin()
    write_json(folder / "result.json", {"result": {"error_rate": 0.1}, "files": {}})
    assert read_result(folder, SYNTHETIC) is None
    write_json(folder / "result.json", {"figures": {"loss": 1.5}, "files": {}})
    assert read_result(folder, SYNTHETIC) is None


def test_inputs_of_another_kind_are_refused(stage: SyntheticStage) -> None:
    folder = stage.begin()
    with pytest.raises(StageError, match="does not contain the inputs of a stage base"):
        read_inputs(folder, BASE)


def test_a_path_that_a_stage_lacks_is_named(stage: SyntheticStage) -> None:
    with pytest.raises(StageError, match="without the path 'data'"):
        stage.paths.required("data")


def test_equal_values_have_equal_digests() -> None:
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert len(digest("")) == 64


def test_a_result_without_an_expected_file_is_incomplete(finished: SyntheticStage) -> None:
    assert replace(finished, expects=("adapter/weights",)).result() == RESULT
    assert replace(finished, expects=("snapshots/step-00002/adapter/weights",)).result() is None
