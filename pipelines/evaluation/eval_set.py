"""Everything that is asked of the models of a comparison: read, checked and tokenised once, before any model is loaded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipelines.errors import DataError
from pipelines.evaluation.benchmarks import passages, sample
from pipelines.evaluation.chat import chat_items
from pipelines.evaluation.execution import command
from pipelines.evaluation.generation import ANSWERS, GenerationConfig
from pipelines.evaluation.items import Item
from pipelines.evaluation.metrics import load_metrics
from pipelines.evaluation.probes import read_probes
from pipelines.evaluation.questions import Question, tokenize
from pipelines.models.support import context_tokens
from pipelines.models.tokenizer import load_tokenizer
from pipelines.paths import folders


@dataclass(frozen=True)
class EvalSet:
    """What each model is to do."""

    tokenizer: PreTrainedTokenizerBase
    examples: list[dict[str, Any]]
    """Held-out examples of the task."""
    questions: list[Question]
    """General abilities and the user's own."""
    texts: list[Question]
    """Passages of plain text."""
    chats: list[Question]
    answered: int
    """How many of the examples are answered."""
    judging: GenerationConfig
    tasks: Any
    """Tasks of lm-eval (`harness.Tasks`); None where the recipe has none."""


def prepare(inputs: Mapping[str, Any], paths: Mapping[str, str]) -> EvalSet:
    """Read what a stage's evaluation section names.

    Raises:
        DataError: a question, a file or a setting cannot be honoured.
        RecipeError: a metric, a command or a task is not there.
    """
    settings, places = inputs["evaluation"], folders(paths)
    trusted = inputs.get("trust_remote_code", False)
    tokenizer = load_tokenizer(Path(paths["base"]), trust_remote_code=trusted)
    context = context_tokens(AutoConfig.from_pretrained(paths["base"], trust_remote_code=trusted))
    judging = GenerationConfig(
        settings["max_new_tokens"],
        load_metrics(settings["metrics"], places),
        command(settings["execute"], places) if settings["execute"] else [],
        settings["execute_seconds"],
        context,
    )
    sampled = {
        name: settings["items_per_benchmark"] if name in settings["general"] else 0
        for name in ("arc_easy", "lambada")
    }
    own = read_probes(settings["probes"], places)
    general = [
        item
        for name in settings["general"]
        for item in sample(name, settings["items_per_benchmark"], inputs["seed"])
    ]
    plain = (
        passages(settings["passages"], inputs["seed"], sampled["lambada"])
        if settings["passages"]
        else []
    )
    chats = chat_items(tokenizer, settings["chat_prompts"], inputs["seed"], sampled["arc_easy"])
    tasks = _tasks(settings["lm_eval"], inputs["seed"], places)
    _refuse_shared_names(general, own, tasks)
    return EvalSet(
        tokenizer,
        list(load_from_disk(str(Path(paths["data"]) / "validation"))),
        tokenize([*general, *own], tokenizer, context),
        tokenize(plain, tokenizer, context),
        tokenize(chats, tokenizer, context),
        settings["generations"],
        judging,
        tasks,
    )


def _tasks(settings: Mapping[str, Any] | None, seed: int, places: Sequence[Path]) -> Any:
    if settings is None:
        return None
    from pipelines.evaluation.harness import load_tasks

    return load_tasks(settings, seed, places)


def _refuse_shared_names(general: Sequence[Item], own: Sequence[Item], tasks: Any) -> None:
    """Refuse two sources of questions under one name; their figures would be one."""
    names = [
        *{item.benchmark for item in general},
        *{item.benchmark for item in own},
        *(tasks.names if tasks is not None else []),
    ]
    for name, count in Counter([*names, "passages", "chat", ANSWERS]).items():
        if count > 1:
            raise DataError(
                f"{name!r} names the questions of two sources in evaluation; rename the probe file or the task"
            )
