"""Tasks of lm-eval: its library reads them, builds the prompts and computes the metrics; the likelihoods are ours.

Source: EleutherAI's Language Model Evaluation Harness, whose interface for models this implements.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from pipelines.errors import DataError, RecipeError
from pipelines.evaluation.documents import check_documents, gold_place, said, scored_by_choice
from pipelines.evaluation.items import Choice, Item
from pipelines.evaluation.questions import Record, general_values, head
from pipelines.models.checked import CheckedReader
from pipelines.paths import find, listed

MEASURED_IN_BITS = "bits_per_byte"
NEEDED = ("doc_to_text", "doc_to_target")
"""What every task file has."""


class Tasks:
    """The tasks that a recipe names, ready to be asked of one model after the other.

    Attributes:
        names: of the tasks, those of a group one by one.
    """

    def __init__(self, tasks: Mapping[str, Any], limit: int | None, seed: int) -> None:
        self._tasks, self._limit, self._seed = dict(tasks), limit, seed
        self._tokens: dict[tuple[str, bool], list[int]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def records(
        self, reader: CheckedReader, tokenizer: PreTrainedTokenizerBase, context: int | None
    ) -> Iterator[Record]:
        """Yield the record of each document of each task; see `load_tasks` for which kind."""
        from lm_eval.evaluator import evaluate

        from pipelines.evaluation.harness_model import PackedModel

        for task in self._tasks.values():
            task.set_fewshot_seed(
                self._seed
            )  # else the second model would be shown other examples than the first
        asked = PackedModel(reader, tokenizer, context, self._tokens)
        answered = evaluate(
            asked,
            {"tasks": self._tasks, "groups": {}, "group_map": {}},
            limit=self._limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        for name, task in self._tasks.items():
            samples = answered["samples"][name]
            for sample in samples:
                if sample["filter"] == samples[0]["filter"]:
                    document = name, sample["doc_id"]
                    record = _record(name, task, sample, asked.left_out.get(document))
                    yield (
                        record
                        if "left_out" in record or document not in asked.ended
                        else {**record, "ended": asked.ended[document]}
                    )


def load_tasks(settings: Mapping[str, Any], seed: int, places: Sequence[Path]) -> Tasks:
    """Load tasks by name, from lm-eval's own or from a folder of task files.

    A multiple choice becomes a record like those of our own benchmarks; of any other task each document has one value, by
    the first of its metrics that is averaged over documents.

    Args:
        settings: the recipe's section.
        seed: draws worked examples.
        places: where the folder is looked for; a path in a task file is relative to the first of them.

    Raises:
        RecipeError: lm-eval, the folder or a task is not there, a task cannot be read or asks for what is not done here.
        DataError: a task's data cannot be had, or a document that would be asked cannot be; see `documents`.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(
            "evaluation.lm_eval needs the lm-eval library, which is not installed; run: pip install 'lora-pipeline[lm-eval]'"
        )
    manager = _manager(settings["tasks"], settings["include_path"], places)
    _refuse_unknown(settings["tasks"], manager.all_tasks)
    tasks: dict[str, Any] = {}
    with chdir(places[0]):
        for name in settings["tasks"]:
            found = _loaded(manager, name)
            _refuse_twice(name, [task for task in found if task in tasks])
            tasks |= found
        for name, task in tasks.items():
            _check(name, task)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed)
            check_documents(name, task, settings["limit"])
    return Tasks(tasks, settings["limit"], seed)


def _loaded(manager: Any, name: str) -> dict[str, Any]:
    """Load what stands under one name: a task, or those of a group; lm-eval tries the first document of each."""
    try:
        return dict(manager.load([name])["tasks"])
    except (DatasetsError, OSError) as error:
        raise DataError(
            f"the data of the lm-eval task {name!r} cannot be loaded ({said(error)}); "
            "fetch it once while online, or describe a task over local files"
        ) from error
    except Exception as error:  # a task's file may have anything in it
        entry = manager.task_index[name]
        raise RecipeError(
            f"the lm-eval task {name!r} cannot be read from {entry.yaml_path} ({said(error)}{_lacking(entry, error)}); "
            "mend its file, or the first document of its data, or leave the task out"
        ) from error


def _lacking(entry: Any, error: Exception) -> str:
    """Return which field a task's file lacks where lm-eval found no field in its place, and says no more than that."""
    settings = entry.cfg or {}
    is_whole = (
        isinstance(error, TypeError)
        and not str(error)
        and "include" not in settings
        and entry.kind.name == "TASK"
    )
    return "".join(f"; it has no {field}" for field in NEEDED if is_whole and field not in settings)


def _refuse_twice(name: str, tasks: Sequence[str]) -> None:
    if tasks:
        raise RecipeError(
            f"evaluation.lm_eval.tasks names {tasks[0]!r} already where {name!r} brings it again; leave one of the two out"
        )


def _manager(names: Sequence[str], include_path: str | None, places: Sequence[Path]) -> Any:
    """Return lm-eval's index of tasks: the folder's alone where it has all of them, as reading its own takes seconds."""
    from lm_eval.tasks import TaskManager

    folder = find(include_path, places) if include_path is not None else None
    if include_path is not None and (folder is None or not folder.is_dir()):
        raise RecipeError(
            f"evaluation.lm_eval.include_path {include_path!r} is no folder in {listed(places)}; give one with task files"
        )
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=str(folder) if folder is not None else None)


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = (
                f"did you mean {near[0]!r}?"
                if near
                else "`lm-eval ls tasks` lists them, and include_path adds your own"
            )
            raise RecipeError(f"evaluation.lm_eval.tasks has no {name!r}; {guess}")


def _check(name: str, task: Any) -> None:
    """Refuse a task that would draw at random, run code that a model wrote, show pictures, or has a metric that is not there."""
    settings = task.get_config("generation_kwargs") or {}
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise RecipeError(
            f"the lm-eval task {name!r} draws answers at random, and the comparison is greedy; set do_sample to false in it"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise RecipeError(
            f"the lm-eval task {name!r} runs code that a model wrote, unguarded; use evaluation.execute instead"
        )
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"the lm-eval task {name!r} shows more than text; leave it out")
    _check_metrics(name, task)


def _check_metrics(name: str, task: Any) -> None:
    """Refuse a metric or an aggregation that lm-eval has not, which it takes without a word."""
    metrics = (
        {} if callable(task.get_config("process_results")) else getattr(task, "_metric_fn_list", {})
    )
    for kind, functions in (("metric", metrics), ("aggregation of the metric", task.aggregation())):
        for metric in (metric for metric, function in functions.items() if function is None):
            raise RecipeError(
                f"the lm-eval task {name!r} has no {kind} {metric!r}; mend metric_list in its file, or leave the task out"
            )


def _record(name: str, task: Any, sample: Mapping[str, Any], left_out: str | None) -> Record:
    """Turn what lm-eval keeps of a document into a record."""
    gold = gold_place(task, sample["doc"]) if scored_by_choice(task) else None
    item = _item(name, sample, gold)
    if left_out is not None:
        return {**head(item), "left_out": left_out}
    if gold is None:
        return _value(item, task, sample)
    answers = [responses[0] for responses in sample["resps"]][: len(item.choices)]
    return {
        **head(item),
        **general_values(
            gold,
            [likelihood for likelihood, _ in answers],
            [greedy for _, greedy in answers],
            item.choices,
        ),
    }


def _item(name: str, sample: Mapping[str, Any], gold: int | None) -> Item:
    """Return what a document asks; a mutual-information metric's answers without a context are no answers."""
    pairs = [tuple(map(str, arguments[:2])) for arguments in sample["arguments"]]
    with_context = [pair for pair in pairs if pair[0]] or pairs
    choices = tuple(Choice(pair[0], "".join(pair[1:])) for pair in with_context)
    return Item(
        name,
        f"{name}/{sample['doc_id']}",
        "",
        choices,
        gold or 0,
        "general" if gold is not None else "score",
    )


def _value(item: Item, task: Any, sample: Mapping[str, Any]) -> Record:
    """Return the record of a document's value by one metric, with the likelihoods that it comes from, where it does."""
    metric = _metric(item, task, sample["metrics"])
    aggregate = task.aggregation().get(metric)
    value = aggregate([sample[metric]]) if aggregate is not None else sample[metric]
    if not isinstance(value, int | float) or not math.isfinite(value):
        return {**head(item), "left_out": f"its {metric} is {value!r}, which is no finite number"}
    better = bool(task.higher_is_better().get(metric, True))
    return {
        **head(item),
        "metric": metric,
        "value": float(value),
        "higher_is_better": better,
        **_likelihoods(item, sample),
    }


def _likelihoods(item: Item, sample: Mapping[str, Any]) -> Record:
    """Return each answer's log-likelihood and whether it is greedy; of a whole text the first alone; of a written answer nothing."""
    answers = [responses[0] for responses in sample["resps"]][: len(item.choices)]
    if all(isinstance(answer, float) for answer in answers):
        return {"log_likelihoods": [round(answer, 6) for answer in answers]}
    if all(isinstance(answer, tuple) for answer in answers):
        return {
            "log_likelihoods": [round(value, 6) for value, _ in answers],
            "greedy": [greedy for _, greedy in answers],
        }
    return {}


def _metric(item: Item, task: Any, metrics: Sequence[str]) -> str:
    """Choose the metric by which a document is valued: one that is averaged, else bits per byte, else the first."""
    if not metrics:
        raise RecipeError(
            f"the lm-eval task {item.benchmark!r} computes none of its metrics for {item.id}; mend its metric_list"
        )
    averaged = [
        name for name in metrics if getattr(task.aggregation().get(name), "__name__", "") == "mean"
    ]
    return next(
        iter([*averaged, *(name for name in metrics if name == MEASURED_IN_BITS), *metrics])
    )
