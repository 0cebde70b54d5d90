"""One preparation of a file, by the pipeline or by TRL, in a separate process.

python -m dataset_checks.timed_preparation ours|trl TASK.json RESULT.json
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from pydantic import TypeAdapter

from lora_core.files import write_json
from pipelines.models.tokenizer import load_tokenizer

MAX_TOKENS = 512
TRAINING_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's template with the marks by which TRL finds answers."""


@dataclass(frozen=True)
class PreparationTask:
    """What is prepared."""

    file: str
    """JSON lines."""
    base: str
    """Folder of a tokenizer."""
    folder: str
    """Empty; for the result."""
    is_conversation: bool
    """Every answer of a conversation is learned, not only a completion."""
    processes: int | None = None
    """Of TRL; None for one."""


@dataclass(frozen=True)
class PreparationTime:
    """How long it took, and what came out."""

    seconds: float
    """From the file to the tokenized examples on disk."""
    cpu_seconds: float
    """Of all its processes."""
    examples: int
    tokens: int


class Stopwatch:
    """Measures from its creation."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> tuple[float, float]:
        """Return the seconds, and those of all cores of this process and its ended children."""
        seconds, cpu_seconds = self._now()
        return seconds - self._start[0], cpu_seconds - self._start[1]

    @staticmethod
    def _now() -> tuple[float, float]:
        times = os.times()
        return time.perf_counter(), sum(times[:4])


def prepare_ours(task: PreparationTask) -> PreparationTime:
    """Prepare as the pipeline does."""
    from dataset_checks.prepared_files import prepare_source

    settings = {"max_tokens": MAX_TOKENS, "validation_examples": 64}
    watch = Stopwatch()
    result = prepare_source(task.file, settings, Path(task.base), Path(task.folder))
    return PreparationTime(*watch.read(), result.train_examples, result.train_tokens)


def prepare_by_trl(task: PreparationTask) -> PreparationTime:
    """Prepare as SFTTrainer does."""
    from dataset_checks.trl_tokens import trl_config, trl_prepare

    config = trl_config(
        max_length=MAX_TOKENS,
        dataset_num_proc=task.processes,
        assistant_only_loss=task.is_conversation,
    )
    template = TRAINING_TEMPLATE if task.is_conversation else None
    watch = Stopwatch()
    tokenizer = load_tokenizer(Path(task.base))
    rows = load_dataset("json", data_files=task.file, cache_dir=task.folder, split="train")
    prepared = trl_prepare(rows, tokenizer, config, chat_template=template)
    times = watch.read()
    tokens = sum(len(ids) for ids in prepared["input_ids"])
    return PreparationTime(*times, len(prepared), tokens)


def run_task() -> None:
    """Prepare what the arguments name."""
    contestants: dict[str, Callable[[PreparationTask], PreparationTime]] = {
        "ours": prepare_ours,
        "trl": prepare_by_trl,
    }
    name, task_file, result_file = sys.argv[1:]
    disable_progress_bars()
    task = TypeAdapter(PreparationTask).validate_json(Path(task_file).read_text())
    # The first tokenizer imports much of transformers, which a run has imported before its stages.
    load_tokenizer(Path(task.base))
    write_json(Path(result_file), asdict(contestants[name](task)))


if __name__ == "__main__":
    run_task()
