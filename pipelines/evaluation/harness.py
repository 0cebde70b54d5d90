"""Tasks of lm-eval: its library reads them, builds the prompts and computes the metrics.

The likelihoods come from our scorer.

Source: EleutherAI's Language Model Evaluation Harness, whose interface for models this implements.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from pipelines.comparison.record_types import ItemRecord, ScoreRecord
from pipelines.config.sections import LmEvalSection
from pipelines.errors import DataError, RecipeError, one_line
from pipelines.evaluation.documents import check_documents, document_text
from pipelines.evaluation.harness_records import document_record
from pipelines.models.checked import CheckedReader
from pipelines.paths import find, listed

NEEDED = ("doc_to_text", "doc_to_target")
"""Fields that every task file must have."""


class Tasks:
    """The tasks that a recipe names, for the evaluation of one model after the other.

    Attributes:
        names: of the tasks, those of a group one by one.
    """

    def __init__(self, tasks: Mapping[str, Any], limit: int | None, seed: int) -> None:
        self._tasks = dict(tasks)
        self._limit = limit
        self._seed = seed
        self._tokens: dict[tuple[str, bool], list[int]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield the task and the text of each document: its question and its right answer."""
        for name, task in self._tasks.items():
            for _, document in task.doc_iterator(limit=self._limit):
                yield name, document_text(task, document)

    def records(
        self, reader: CheckedReader, tokenizer: PreTrainedTokenizerBase, context: int | None
    ) -> Iterator[ItemRecord]:
        """Yield the record of each document of each task; see `load_tasks` for its kind.

        Args:
            reader: of the model.
            tokenizer: the base's.
            context: the model's context length in tokens; None if unknown.
        """
        from lm_eval.evaluator import evaluate

        from pipelines.evaluation.harness_model import PackedModel

        for task in self._tasks.values():
            # without it, the second model would see other few-shot examples than the first
            task.set_fewshot_seed(self._seed)
        model = PackedModel(reader, tokenizer, context, self._tokens)
        found = evaluate(
            model,
            {"tasks": self._tasks, "groups": {}, "group_map": {}},
            limit=self._limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        for name, task in self._tasks.items():
            samples = found["samples"][name]
            for sample in samples:
                if sample["filter"] != samples[0]["filter"]:
                    continue
                document = (name, sample["doc_id"])
                reason = model.left_out.get(document)
                record = document_record(name, task, sample, reason)
                if isinstance(record, ScoreRecord) and document in model.ended:
                    record = replace(record, ended=model.ended[document])
                yield record


def load_tasks(settings: LmEvalSection, seed: int, search_folders: Sequence[Path]) -> Tasks:
    """Load tasks by name, from lm-eval or from a folder of task files.

    A multiple choice becomes a record like those of the built-in benchmarks. Of any other task each
    document has one value, by the first of its metrics that is averaged over documents.

    Args:
        settings: the recipe's section.
        seed: draws few-shot examples.
        search_folders: searched for the folder; a path in a task file is relative to the first.

    Raises:
        RecipeError: lm-eval, the folder or a task does not exist, a task cannot be read or needs
            something that is not supported.
        DataError: a task's data cannot be loaded, or a document cannot be evaluated; see
            `documents`.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(
            "evaluation.lm_eval needs the lm-eval library, which is not installed; "
            "run: pip install 'lora-pipeline[lm-eval]'"
        )
    manager = _manager(settings.tasks, settings.include_path, search_folders)
    _check_known(settings.tasks, manager.all_tasks)
    tasks: dict[str, Any] = {}
    with chdir(search_folders[0]):
        for name in settings.tasks:
            found = _loaded(manager, name)
            _check_new(name, [task for task in found if task in tasks])
            tasks |= found
        for name, task in tasks.items():
            _check(name, task)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed)
            check_documents(name, task, settings.limit)
    return Tasks(tasks, settings.limit, seed)


def _loaded(manager: Any, name: str) -> dict[str, Any]:
    """Load a task, or those of a group, by name; lm-eval tries the first document of each."""
    try:
        return dict(manager.load([name])["tasks"])
    except (DatasetsError, OSError) as error:
        raise DataError(
            f"the data of the lm-eval task {name!r} cannot be loaded "
            f"({one_line(error.__cause__ or error)}); "
            "fetch it once while online, or describe a task over local files"
        ) from error
    except Exception as error:  # a task's file may have anything in it
        entry = manager.task_index[name]
        reason = one_line(error.__cause__ or error) + _missing_fields(entry, error)
        raise RecipeError(
            f"the lm-eval task {name!r} cannot be read from {entry.yaml_path} ({reason}); "
            "fix its file, or the first document of its data, or leave the task out"
        ) from error


def _missing_fields(entry: Any, error: Exception) -> str:
    """Return the fields that a task's file lacks.

    lm-eval reports a missing field as a TypeError without a message.
    """
    settings = entry.cfg or {}
    is_complete_file = "include" not in settings and entry.kind.name == "TASK"
    if not is_complete_file or not isinstance(error, TypeError) or str(error):
        return ""
    return "".join(f"; it has no {field}" for field in NEEDED if field not in settings)


def _check_new(name: str, known: Sequence[str]) -> None:
    if known:
        raise RecipeError(
            f"evaluation.lm_eval.tasks has {known[0]!r} twice, the second time through {name!r}; "
            "leave one of the two out"
        )


def _manager(names: Sequence[str], include_path: str | None, search_folders: Sequence[Path]) -> Any:
    """Return lm-eval's index of tasks.

    It is that of the folder alone if it has all tasks, as reading lm-eval's takes seconds.
    """
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager(include_path=None)
    folder = find(include_path, search_folders)
    if folder is None or not folder.is_dir():
        raise RecipeError(
            f"evaluation.lm_eval.include_path {include_path!r} is not a folder in "
            f"{listed(search_folders)}; give one with task files"
        )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=str(folder))


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = "`lm-eval ls tasks` lists them, and include_path adds custom ones"
            if near:
                hint = f"did you mean {near[0]!r}?"
            raise RecipeError(f"evaluation.lm_eval.tasks has no {name!r}; {hint}")


def _check(name: str, task: Any) -> None:
    """Refuse a task that is random, runs generated code, has images, or lacks a metric."""
    settings = task.get_config("generation_kwargs") or {}
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise RecipeError(
            f"the lm-eval task {name!r} draws answers at random, and the comparison is greedy; "
            "set do_sample to false in it"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise RecipeError(
            f"the lm-eval task {name!r} runs code that a model wrote, without protection; "
            "use evaluation.execute instead"
        )
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"the lm-eval task {name!r} shows more than text; leave it out")
    _check_metrics(name, task)


def _check_metrics(name: str, task: Any) -> None:
    """Refuse a metric or an aggregation that lm-eval lacks; it accepts one without a warning."""
    metrics: Mapping[str, Any] = {}
    if not callable(task.get_config("process_results")):
        metrics = getattr(task, "_metric_fn_list", {})
    required = {"metric": metrics, "aggregation of the metric": task.aggregation()}
    for kind, functions in required.items():
        for metric, function in functions.items():
            if function is None:
                raise RecipeError(
                    f"the lm-eval task {name!r} has no {kind} {metric!r}; "
                    "fix metric_list in its file, or leave the task out"
                )
