"""What a recipe trains and scores, read from the recipe alone; and how evaluations are dealt to processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.experiments import (
    EvaluatedModel,
    Experiment,
    control_experiments,
    learning_rate_experiments,
    rank_experiments,
)
from pipelines.config.recipe import parse_recipe
from pipelines.errors import RecipeError
from pipelines.runtime.stage import Stage
from pipelines.workflow.stages import Stages, group_by_base, plain_label

Values = dict[str, Any]
Maker = Callable[..., Values]
BASE = {
    "folder": "base",
    "id": "tiny",
    "revision": "1",
    "digests": {"dense": "d"},
    "tokenizer_sha256": "t",
    "template_sha256": "c",
}


def labels(arms: list[Experiment]) -> list[str]:
    return [arm.label for arm in arms]


def test_one_rate_is_the_control_and_several_are_tried(recipe_with: Maker) -> None:
    one, several = (
        parse_recipe(recipe_with(control={"learning_rate": rate})) for rate in (1e-4, [1e-4, 3e-4])
    )
    assert labels(control_experiments(one)) == ["control"]
    assert labels(control_experiments(several)) == ["control lr 0.0001", "control lr 0.0003"]
    assert [arm.method for arm in control_experiments(several)] == ["full", "full"]


def test_a_control_may_be_an_adapter_or_missing(recipe_with: Maker) -> None:
    adapter = parse_recipe(recipe_with(control={"method": "lora", "rank": 64}))
    assert [(arm.method, arm.rank) for arm in control_experiments(adapter)] == [("lora", 64)]
    assert control_experiments(parse_recipe(recipe_with(control={"method": "none"}))) == []


def test_the_frontier_asks_for_snapshots_of_the_main_arms_and_for_other_rates(
    recipe_with: Maker,
) -> None:
    recipe = parse_recipe(recipe_with(frontier={"snapshots": [2, 4], "learning_rates": [0.02]}))
    assert [arm.snapshots for arm in [*control_experiments(recipe), *rank_experiments(recipe)]] == [
        (2, 4)
    ] * 3
    assert [
        (arm.label, arm.learning_rate, arm.snapshots) for arm in learning_rate_experiments(recipe)
    ] == [
        ("rank-2 lr 0.02", 0.02, ()),
        ("rank-4 lr 0.02", 0.02, ()),
    ]


def test_a_control_is_the_same_for_every_recipe_that_needs_it(recipe_with: Maker) -> None:
    """Its key depends on weights, data and budget: not on what the base is called, nor on adapters, snapshots or processes."""
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
        train_stage(recipe_with(), {**BASE, "id": "copy", "revision": "2"}).key,
    }
    assert len(keys) == 1
    assert train_stage(recipe_with(training={"steps": 7})).key not in keys
    assert train_stage(recipe_with(), {**BASE, "digests": {"dense": "e"}}).key not in keys


def test_what_an_evaluation_reads_is_part_of_its_key(recipe_with: Maker, tmp_path: Path) -> None:
    """A metric, a probe or a task that is written anew is another one; what only lies beside them is not."""
    files = {"own.py": "one", "probes.jsonl": "two", "check.py": "three", "tasks/a.yaml": "four"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    asked = {
        "metrics": ["own:rate"],
        "probes": ["probes.jsonl"],
        "execute": ["python3", "check.py"],
    }
    values = recipe_with(evaluation={**asked, "lm_eval": {"tasks": ["a"], "include_path": "tasks"}})
    before = evaluation_key(values, tmp_path)
    (tmp_path / "notes.txt").write_text("no part of it")
    assert evaluation_key(values, tmp_path) == before
    for name in files:
        (tmp_path / name).write_text("another")
        assert evaluation_key(values, tmp_path) != before, name
        (tmp_path / name).write_text(files[name])


def test_data_beside_the_recipe_is_found_from_anywhere(
    recipe_with: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.jsonl").write_text("{}\n")
    stages = Stages(
        parse_recipe(recipe_with(data={"source": "rows.jsonl"})), tmp_path, tmp_path / "there"
    )
    monkeypatch.chdir(tmp_path)
    stage = stages.data(BASE)
    assert stage.paths["source"] == str(tmp_path / "there" / "rows.jsonl")
    (tmp_path / "there" / "rows.jsonl").write_text("{} \n")
    assert stages.data(BASE).key != stage.key


def test_examples_longer_than_the_base_takes_are_refused(recipe_with: Maker) -> None:
    stages = Stages(parse_recipe(recipe_with(data={"max_tokens": 64})), Path("runs"))
    assert stages.data({**BASE, "context_tokens": 64}).kind == "data"
    with pytest.raises(
        RecipeError,
        match=r"data.max_tokens 64 is more than the 63 tokens that the base takes; use at most that",
    ):
        stages.data({**BASE, "context_tokens": 63})


def test_snapshots_are_expected_files(recipe_with: Maker) -> None:
    stage = train_stage(recipe_with(frontier={"snapshots": [2, 4]}))
    assert stage.expects == (
        "snapshots/step-00002/model/config.json",
        "snapshots/step-00004/model/config.json",
    )
    assert stage.options["snapshots"] == [2, 4]


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (1, [["base-nf4", "rank-2", "rank-4"], ["base"], ["control"]]),
        (4, [["base-nf4", "rank-4"], ["base"], ["rank-2"], ["control"]]),
    ],
)
def test_evaluations_over_one_base_share_a_process(at_once: int, expected: list[list[str]]) -> None:
    stages = [
        scored("base"),
        scored("base-nf4", "nf4"),
        scored("control", model="control"),
        scored("rank-2", "nf4"),
        scored("rank-4", "nf4"),
    ]
    assert [[stage.label for stage in part] for part in group_by_base(stages, at_once)] == expected


def test_a_label_is_part_of_a_folder_name() -> None:
    assert [plain_label(label) for label in ("rank-4@10", "rank-16→4", "control lr 0.0001")] == [
        "rank-4-step-10",
        "rank-16-to-4",
        "control-lr-0.0001",
    ]


def train_stage(values: Values, base: Values = BASE) -> Stage:
    recipe = parse_recipe(values)
    data = (Stage("data", "rows", {}, Path("runs")), {"digest": "rows"})
    return Stages(recipe, Path("runs")).train(base, data, control_experiments(recipe)[0])


def evaluation_key(values: Values, folder: Path) -> str:
    stages = Stages(parse_recipe(values), Path("runs"), folder)
    return stages.evaluate(
        BASE,
        (Stage("data", "rows", {}, Path("runs")), {"digest": "rows"}),
        EvaluatedModel("base", quantized=False),
    ).key


def scored(label: str, quantization: str = "none", **paths: str) -> Stage:
    return Stage(
        "evaluate", label, {"quantization": quantization}, Path("runs"), {"base": "base", **paths}
    )
