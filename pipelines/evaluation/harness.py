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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipelines.errors import DataError, RecipeError
from pipelines.evaluation.items import Choice, Item
from pipelines.evaluation.questions import Record, general_values, head
from pipelines.lookup import find, listed

MEASURED_IN_BITS = "bits_per_byte"


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

    def records(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Iterator[Record]:
        """Yield the record of each document of each task; see `load_tasks` for which kind."""
        from lm_eval.evaluator import evaluate

        from pipelines.evaluation.harness_model import PackedModel

        for task in self._tasks.values():
            task.set_fewshot_seed(self._seed)  # else the second model would be shown other examples than the first
        asked = PackedModel(model, tokenizer, context, self._tokens)
        answered = evaluate(
            asked, {"tasks": self._tasks, "groups": {}, "group_map": {}}, limit=self._limit, bootstrap_iters=0, log_samples=True
        )
        for name, task in self._tasks.items():
            samples = answered["samples"][name]
            for sample in samples:
                if sample["filter"] == samples[0]["filter"]:
                    yield _record(name, task, sample, asked.left_out.get((name, sample["doc_id"])))


def load_tasks(settings: Mapping[str, Any], seed: int, places: Sequence[Path]) -> Tasks:
    """Load tasks by name, from lm-eval's own or from a folder of task files.

    A multiple choice becomes a record like those of our own benchmarks; of any other task each document has one value, by
    the first of its metrics that is averaged over documents.

    Args:
        settings: the recipe's section.
        seed: draws worked examples.
        places: where the folder is looked for; a path in a task file is relative to the first of them.

    Raises:
        RecipeError: lm-eval, the folder or a task is not there, or a task asks for what is not done here.
        DataError: a task's data cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError("evaluation.lm_eval needs the lm-eval library, which is not installed; run: pip install 'lora-pipeline[lm-eval]'")
    manager = _manager(settings["tasks"], settings["include_path"], places)
    _refuse_unknown(settings["tasks"], manager.all_tasks)
    try:
        with chdir(places[0]):
            tasks = manager.load(list(settings["tasks"]))["tasks"]
    except (DatasetsError, OSError) as error:
        raise DataError(
            f"the data of evaluation.lm_eval.tasks {', '.join(settings['tasks'])} cannot be loaded ({_first_line(error)}); "
            "fetch it once while online, or describe a task over local files"
        ) from error
    except ValueError as error:
        raise RecipeError(f"evaluation.lm_eval.tasks cannot be read: {_first_line(error)}; mend the task or leave it out") from error
    for name, task in tasks.items():
        _check(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return Tasks(tasks, settings["limit"], seed)


def _manager(names: Sequence[str], include_path: str | None, places: Sequence[Path]) -> Any:
    """Return lm-eval's index of tasks: the folder's alone where it has all of them, as reading its own takes seconds."""
    from lm_eval.tasks import TaskManager

    folder = find(include_path, places) if include_path is not None else None
    if include_path is not None and (folder is None or not folder.is_dir()):
        raise RecipeError(f"evaluation.lm_eval.include_path {include_path!r} is no folder in {listed(places)}; give one with task files")
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=str(folder) if folder is not None else None)


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists them, and include_path adds your own"
            raise RecipeError(f"evaluation.lm_eval.tasks has no {name!r}; {guess}")


def _check(name: str, task: Any) -> None:
    """Refuse a task that would draw at random, run code that a model wrote, or show pictures."""
    settings = task.get_config("generation_kwargs") or {}
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise RecipeError(f"the lm-eval task {name!r} draws answers at random, and the comparison is greedy; set do_sample to false in it")
    if getattr(task, "UNSAFE_CODE", False):
        raise RecipeError(f"the lm-eval task {name!r} runs code that a model wrote, unguarded; use evaluation.execute instead")
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"the lm-eval task {name!r} shows more than text; leave it out")


def _record(name: str, task: Any, sample: Mapping[str, Any], left_out: str | None) -> Record:
    """Turn what lm-eval keeps of a document into a record."""
    scored = task.OUTPUT_TYPE == "multiple_choice" and not callable(task.get_config("process_results"))
    gold = _gold(task, sample["doc"]) if scored else None
    item = _item(name, sample, gold)
    if left_out is not None:
        return {**head(item), "left_out": left_out}
    if gold is None:
        return _value(item, task, sample)
    answers = [responses[0] for responses in sample["resps"]][: len(item.choices)]
    return {
        **head(item),
        **general_values(gold, [likelihood for likelihood, _ in answers], [greedy for _, greedy in answers], item.choices),
    }


def _gold(task: Any, doc: Any) -> int | None:
    """Return the place of the right answer; None where several are right, or none is named."""
    gold = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(gold, str):
        return choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def _item(name: str, sample: Mapping[str, Any], gold: int | None) -> Item:
    """Return what a document asks; a mutual-information metric's answers without a context are no answers."""
    pairs = [tuple(map(str, arguments[:2])) for arguments in sample["arguments"]]
    with_context = [pair for pair in pairs if pair[0]] or pairs
    choices = tuple(Choice(pair[0], "".join(pair[1:])) for pair in with_context)
    return Item(name, f"{name}/{sample['doc_id']}", "", choices, gold or 0, "general" if gold is not None else "score")


def _value(item: Item, task: Any, sample: Mapping[str, Any]) -> Record:
    """Return the record of a document's value by one metric."""
    metric = _metric(task, sample["metrics"])
    aggregate = task.aggregation().get(metric)
    value = aggregate([sample[metric]]) if aggregate is not None else sample[metric]
    if not isinstance(value, int | float) or not math.isfinite(value):
        return {**head(item), "left_out": f"its {metric} is {value!r}, which is no finite number"}
    better = bool(task.higher_is_better().get(metric, True))
    return {**head(item), "metric": metric, "value": float(value), "higher_is_better": better}


def _metric(task: Any, metrics: Sequence[str]) -> str:
    """Choose the metric by which a document is valued: one that is averaged, else bits per byte, else the first."""
    averaged = [name for name in metrics if getattr(task.aggregation().get(name), "__name__", "") == "mean"]
    return next(iter([*averaged, *(name for name in metrics if name == MEASURED_IN_BITS), *metrics]))


def _first_line(error: BaseException) -> str:
    return (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
