"""Everything that the models of a comparison are evaluated on.

It is read, checked and tokenized once, before any model is loaded.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipelines.config.sections import EvaluationSection, LmEvalSection
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
from pipelines.models.tokenizer import load_tokenizer, tokenizer_folder
from pipelines.paths import folders
from pipelines.runtime.interfaces.inputs import EvaluateInputs, StagePaths


@dataclass(frozen=True)
class EvalSet:
    """What each model is evaluated on."""

    tokenizer: PreTrainedTokenizerBase
    examples: list[dict[str, Any]]
    """Held-out examples of the task."""
    questions: list[Question]
    """General abilities and custom questions."""
    texts: list[Question]
    """Passages of plain text."""
    chats: list[Question]
    answered: int
    """Number of examples whose prompts are answered."""
    generation: GenerationConfig
    tasks: Any
    """Tasks of lm-eval (`harness.Tasks`); None if the recipe has none."""


def prepare(inputs: EvaluateInputs, paths: StagePaths) -> EvalSet:
    """Read what a stage's evaluation section names.

    Args:
        inputs: the evaluation section, the seed and the number of answers.
        paths: of the base, the prepared data, the recipe and the working directory.

    Raises:
        DataError: a question, a file or a setting is not valid.
        RecipeError: a metric, a command or a task does not exist.
    """
    settings = inputs.evaluation
    seed = inputs.seed
    search_folders = folders(paths.recipe, paths.here)
    is_trusted = inputs.trust_remote_code
    base = paths.required("base")
    data = paths.required("data")
    tokenizer = load_tokenizer(tokenizer_folder(base, data), trust_remote_code=is_trusted)
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=is_trusted)
    context = context_tokens(config)
    generation = _generation_config(settings, search_folders, context)
    generation = replace(generation, end_tokens=inputs.end_tokens)
    custom = read_probes(settings.probes, search_folders)
    general = _general_items(settings, seed)
    texts = _passages(settings, seed)
    chats = chat_items(tokenizer, settings.chat_prompts, seed, _sampled_items(settings, "arc_easy"))
    tasks = _tasks(settings.lm_eval, seed, search_folders)
    _check_names_differ(general, custom, tasks)
    return EvalSet(
        tokenizer=tokenizer,
        examples=list(load_from_disk(str(data / "validation"))),
        questions=tokenize([*general, *custom], tokenizer, context),
        texts=tokenize(texts, tokenizer, context),
        chats=tokenize(chats, tokenizer, context),
        answered=inputs.generations,
        generation=generation,
        tasks=tasks,
    )


def _generation_config(
    settings: EvaluationSection, search_folders: Sequence[Path], context: int | None
) -> GenerationConfig:
    words = settings.execute
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        metrics=load_metrics(settings.metrics, search_folders),
        argv=command(words, search_folders) if words else [],
        seconds=settings.execute_seconds,
        context=context,
    )


def _general_items(settings: EvaluationSection, seed: int) -> list[Item]:
    items = []
    for benchmark in settings.general:
        items += sample(benchmark, settings.items_per_benchmark, seed)
    return items


def _passages(settings: EvaluationSection, seed: int) -> list[Item]:
    if not settings.passages:
        return []
    return passages(settings.passages, seed, _sampled_items(settings, "lambada"))


def _sampled_items(settings: EvaluationSection, benchmark: str) -> int:
    """Return the number of sampled items of a benchmark; chats and passages differ from them."""
    return settings.items_per_benchmark if benchmark in settings.general else 0


def _tasks(settings: LmEvalSection | None, seed: int, search_folders: Sequence[Path]) -> Any:
    if settings is None:
        return None
    from pipelines.evaluation.harness import load_tasks

    return load_tasks(settings, seed, search_folders)


def _check_names_differ(general: Sequence[Item], custom: Sequence[Item], tasks: Any) -> None:
    """Refuse two sources of questions with one name; their results would be mixed."""
    names = ["passages", "chat", ANSWERS]
    names += {item.benchmark for item in general}
    names += {item.benchmark for item in custom}
    if tasks is not None:
        names += tasks.names
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(
                f"{name!r} names the questions of two sources in evaluation; "
                "rename the probe file or the task"
            )
