"""lm-eval tasks that do not exist, cannot be read or are not supported are refused by name."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from lm_eval_tasks import TASKS, Values, settings, without, write_task

from pipelines.errors import DataError, RecipeError
from pipelines.evaluation import harness
from pipelines.evaluation.harness import load_tasks

needs_library = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed; it is an extra"
)
UNKNOWN_METRIC = {"metric": "accu", "aggregation": "mean", "higher_is_better": True}
UNKNOWN_AGGREGATION = {"metric": "acc", "aggregation": "meen", "higher_is_better": True}


@needs_library
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (without("chosen", "doc_to_choice"), "has no doc_to_choice, which its output_type"),
        (without("chosen", "doc_to_text"), r"odd.yaml \(TypeError; it has no doc_to_text\)"),
        (
            {**TASKS["chosen"], "doc_to_text": "{{question"},
            "the lm-eval task 'odd' cannot be read from .*odd.yaml .*TemplateSyntaxError",
        ),
        (
            {**TASKS["chosen"], "doc_to_choice": "{{answrs}}"},
            "'odd' cannot be read from .* 'answrs' is undefined",
        ),
        ({**TASKS["chosen"], "test_split": "tset"}, "'odd' cannot be read from .* 'tset'"),
        ({**TASKS["chosen"], "doc_to_txt": "x"}, "'odd' cannot be read from .* 'doc_to_txt'"),
        ({**TASKS["chosen"], "metric_list": [UNKNOWN_METRIC]}, "no metric 'accu'"),
        (
            {**TASKS["chosen"], "metric_list": [{"metric": "accu"}]},
            "'odd' cannot be read from .*KeyError",
        ),
        (
            {**TASKS["chosen"], "metric_list": [UNKNOWN_AGGREGATION]},
            "no aggregation of the metric 'acc'",
        ),
        ({**TASKS["chosen"], "output_type": "guess"}, "cannot be read"),
    ],
)
def test_a_task_file_with_a_fault_is_named(tasks_folder: Path, task: Values, message: str) -> None:
    write_task(tasks_folder, "odd", task)
    with pytest.raises(RecipeError, match=message):
        load_tasks(settings("odd"), 7, [tasks_folder])


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"generation_kwargs": {"do_sample": True, "temperature": 0.8}},
            "draws answers at random",
        ),
        ({"unsafe_code": True}, "runs code that a model wrote"),
    ],
)
def test_an_unsupported_task_is_refused(tasks_folder: Path, change: Values, message: str) -> None:
    write_task(tasks_folder, "odd", {**TASKS["written"], **change})
    with pytest.raises(RecipeError, match=message):
        load_tasks(settings("odd"), 7, [tasks_folder])


@needs_library
def test_a_task_that_a_group_repeats_is_refused(tasks_folder: Path) -> None:
    group = {"group": "both", "task": ["chosen", "written"]}
    (tasks_folder / "both.yaml").write_text(yaml.safe_dump(group))
    assert load_tasks(settings("both"), 7, [tasks_folder]).names == ["chosen", "written"]
    with pytest.raises(RecipeError, match="has 'chosen' twice, the second time through 'both'"):
        load_tasks(settings("chosen", "both"), 7, [tasks_folder])


@needs_library
def test_missing_data_is_refused(tasks_folder: Path) -> None:
    kwargs = {"data_files": {"test": "no.jsonl"}}
    write_task(tasks_folder, "odd", {**TASKS["chosen"], "dataset_kwargs": kwargs})
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tasks(settings("odd"), 7, [tasks_folder])


@needs_library
def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="include_path 'tasks' is not a folder in"):
        load_tasks(settings("chosen").model_copy(update={"include_path": "tasks"}), 7, [tmp_path])


@needs_library
def test_a_misspelled_task_is_refused_with_a_suggestion(tasks_folder: Path) -> None:
    with pytest.raises(RecipeError, match="has no 'hellaswagg'; did you mean 'hellaswag'"):
        load_tasks(settings("hellaswagg"), 7, [tasks_folder])


def test_without_the_library_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    message = r"is not installed; run: pip install 'lora-pipeline\[lm-eval\]'"
    with pytest.raises(RecipeError, match=message):
        load_tasks(settings("chosen"), 7, [tmp_path])
