"""Which experiments and stages a recipe has, and how evaluations are distributed over processes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from summary_parts import verified

from pipelines.config.data_section import DataSection
from pipelines.config.experiments import (
    EvaluatedModel,
    Experiment,
    control_experiments,
    learning_rate_experiments,
    rank_experiments,
)
from pipelines.config.recipe import parse_recipe
from pipelines.errors import RecipeError
from pipelines.runtime.interfaces.inputs import DataInputs, StagePaths
from pipelines.runtime.interfaces.kinds import DATA
from pipelines.runtime.interfaces.results import BaseResult, DataResult
from pipelines.runtime.interfaces.verified import Verified
from pipelines.runtime.stage import Stage
from pipelines.workflow.stages import (
    EvaluateStage,
    PreparedData,
    Stages,
    TrainStage,
    group_by_base,
    plain_label,
)

Values = dict[str, Any]
Maker = Callable[..., Values]
BASE_RESULT = BaseResult(
    folder="base",
    id="tiny",
    revision="1",
    digests={"dense": "d"},
    tokenizer_sha256="t",
    template_sha256="c",
    forward=Verified.model_validate(verified()),
    trust_remote_code=False,
    weights=1,
    context_tokens=None,
)
DATA_RESULT = DataResult(
    rows=9,
    left_out=0,
    cut=0,
    cut_held_out=0,
    train_examples=6,
    validation_examples=2,
    tuning_examples=1,
    train_tokens=60,
    template_sha256="c",
    supervised_tokens=30,
    digest="rows",
)
DATA_INPUTS = DataInputs(
    data=DataSection(source="rows.jsonl"), sources={}, tokenizer="t", template="c", seed=7
)
RECIPE = {
    "name": "tiny",
    "base_model": {"id": "tiny"},
    "data": {"source": "rows.jsonl"},
    "lora": {"ranks": [4]},
    "training": {"steps": 6},
    "registry": {"model": "tiny"},
}
PREPARED = PreparedData(Stage(DATA, "rows", DATA_INPUTS, Path("runs")), DATA_RESULT)


def labels(experiments: list[Experiment]) -> list[str]:
    return [experiment.label for experiment in experiments]


def test_a_single_rate_is_the_control_and_several_are_candidates(recipe_with: Maker) -> None:
    one = parse_recipe(recipe_with(control={"learning_rate": 1e-4}))
    several = parse_recipe(recipe_with(control={"learning_rate": [1e-4, 3e-4]}))
    assert labels(control_experiments(one)) == ["control"]
    assert labels(control_experiments(several)) == ["control lr 0.0001", "control lr 0.0003"]
    methods = [experiment.method for experiment in control_experiments(several)]
    assert methods == ["full", "full"]


def test_a_control_may_be_an_adapter_or_missing(recipe_with: Maker) -> None:
    adapter = parse_recipe(recipe_with(control={"method": "lora", "rank": 64}))
    [control] = control_experiments(adapter)
    assert (control.method, control.rank) == ("lora", 64)
    assert control_experiments(parse_recipe(recipe_with(control={"method": "none"}))) == []


def test_the_frontier_adds_snapshots_and_other_learning_rates(
    recipe_with: Maker,
) -> None:
    recipe = parse_recipe(recipe_with(frontier={"snapshots": [2, 4], "learning_rates": [0.02]}))
    compared = [*control_experiments(recipe), *rank_experiments(recipe)]
    assert [experiment.snapshots for experiment in compared] == [(2, 4)] * 3
    assert learning_rate_experiments(recipe) == [
        Experiment("rank-2 lr 0.02", "lora", 0.02, rank=2, snapshots=()),
        Experiment("rank-4 lr 0.02", "lora", 0.02, rank=4, snapshots=()),
    ]


def test_a_control_is_shared_by_all_recipes_that_need_it(recipe_with: Maker) -> None:
    """Its key depends on weights, data and budget, but not on the base's id or on adapters."""
    other = recipe_with(
        name="other",
        lora={"ranks": [8], "alpha": 16},
        frontier={"snapshots": [2]},
        training={
            "checkpoint_every": 3,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        },
        launch={"config": "cpu_zero2", "processes": 2},
        gate={"max_rank": 8},
    )
    keys = {
        train_stage(recipe_with()).key,
        train_stage(other).key,
        train_stage(recipe_with(), changed_base(id="copy", revision="2")).key,
    }
    assert len(keys) == 1
    assert train_stage(recipe_with(training={"steps": 7})).key not in keys
    assert train_stage(recipe_with(), changed_base(digests={"dense": "e"})).key not in keys


def test_the_key_of_an_evaluation_contains_its_files(recipe_with: Maker, tmp_path: Path) -> None:
    """The key changes with a metric, a probe or a task, but not with other files in the folder."""
    files = {"own.py": "one", "probes.jsonl": "two", "check.py": "three", "tasks/a.yaml": "four"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    settings = {
        "metrics": ["own:rate"],
        "probes": ["probes.jsonl"],
        "execute": ["python3", "check.py"],
    }
    values = recipe_with(
        evaluation={**settings, "lm_eval": {"tasks": ["a"], "include_path": "tasks"}}
    )
    before = evaluation_key(values, tmp_path)
    (tmp_path / "notes.txt").write_text("not part of it")
    assert evaluation_key(values, tmp_path) == before
    for name in files:
        (tmp_path / name).write_text("another")
        assert evaluation_key(values, tmp_path) != before, name
        (tmp_path / name).write_text(files[name])


def test_data_in_the_recipe_folder_is_found_from_any_working_folder(
    recipe_with: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.jsonl").write_text("{}\n")
    recipe = parse_recipe(recipe_with(data={"source": "rows.jsonl"}))
    stages = Stages(recipe, tmp_path, tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    stage = stages.data(BASE_RESULT)
    assert stage.paths.sources == {"rows.jsonl": str(tmp_path / "there" / "rows.jsonl")}
    (tmp_path / "there" / "rows.jsonl").write_text("{} \n")
    assert stages.data(BASE_RESULT).key != stage.key


def test_examples_longer_than_the_context_are_rejected(recipe_with: Maker) -> None:
    stages = Stages(parse_recipe(recipe_with(data={"max_tokens": 64})), Path("runs"))
    assert stages.data(changed_base(context_tokens=64)).kind is DATA
    with pytest.raises(
        RecipeError,
        match=r"data.max_tokens 64 is more than the 63 tokens of the base's context; use at most",
    ):
        stages.data(changed_base(context_tokens=63))


def test_snapshots_are_expected_files(recipe_with: Maker) -> None:
    stage = train_stage(recipe_with(frontier={"snapshots": [2, 4]}))
    assert stage.expects == (
        "snapshots/step-00002/model/config.json",
        "snapshots/step-00004/model/config.json",
    )
    assert stage.options is not None
    assert stage.options.snapshots == (2, 4)


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (1, [["base-nf4", "rank-2", "rank-4"], ["base"], ["control"]]),
        (4, [["base-nf4", "rank-4"], ["base"], ["rank-2"], ["control"]]),
    ],
)
def test_evaluations_with_the_same_base_share_a_process(
    at_once: int, expected: list[list[str]]
) -> None:
    stages = [
        scored("base"),
        scored("base-nf4", "nf4"),
        scored("control", model="control"),
        scored("rank-2", "nf4"),
        scored("rank-4", "nf4"),
    ]
    groups = group_by_base(stages, at_once)
    assert [[stage.label for stage in group] for group in groups] == expected


def test_a_label_is_part_of_a_folder_name() -> None:
    assert plain_label("rank-4@10") == "rank-4-step-10"
    assert plain_label("rank-16→4") == "rank-16-to-4"
    assert plain_label("control lr 0.0001") == "control-lr-0.0001"


def changed_base(**changes: Any) -> BaseResult:
    return BASE_RESULT.model_copy(update=changes)


def train_stage(values: Values, base: BaseResult = BASE_RESULT) -> TrainStage:
    recipe = parse_recipe(values)
    return Stages(recipe, Path("runs")).train(base, PREPARED, control_experiments(recipe)[0])


def evaluation_key(values: Values, folder: Path) -> str:
    stages = Stages(parse_recipe(values), Path("runs"), folder)
    return stages.evaluate(BASE_RESULT, PREPARED, EvaluatedModel("base", quantized=False)).key


def scored(label: str, quantization: str = "none", **paths: str) -> EvaluateStage:
    stages = Stages(parse_recipe(RECIPE), Path("runs"))
    model = EvaluatedModel(label, quantized=quantization == "nf4")
    stage = stages.evaluate(BASE_RESULT, PREPARED, model)
    return replace(stage, paths=StagePaths(base="base", **paths))
