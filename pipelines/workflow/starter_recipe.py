"""A recipe for new data: numbers that follow from the data, and the text with its comments. Pure.

Imports no torch.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import yaml

from pipelines.config.steps import steps_of_epochs
from pipelines.runtime.interfaces.results import DataResult

MOST_VALIDATION = 64
FEWEST_VALIDATION = 8
HELD_OUT_PART = 20
"""One of so many examples is scored, within these bounds."""
LENGTH_MULTIPLE = 32
"""The maximum length is a multiple of it."""
MOST_WARMUP = 100
BY_SIZE = ((1_000, 3, 8), (10_000, 2, 16))
"""(Training examples up to which, epochs, batch size)."""
LARGE = (1, 32)
"""Epochs and batch size of more examples."""


@dataclass(frozen=True)
class HostLaunch:
    """How training is started on this machine."""

    config: str
    """A file of infra/accelerate."""
    processes: int
    evaluations_at_once: int
    reason: str
    """What the machine has."""


@dataclass(frozen=True)
class StarterRecipe:
    """The settings of a recipe for new data."""

    name: str
    base: str
    source: str
    """As the recipe names it."""
    launch: HostLaunch
    max_tokens: int
    validation_examples: int = 2
    batch_size: int = MOST_VALIDATION
    epochs: int = 1
    warmup_steps: int = 0
    source_comment: str = ""
    columns_comment: str = ""
    length_comment: str = ""
    epochs_comment: str = ""

    def text(self) -> str:
        """Return the recipe as YAML with a comment on each setting."""
        sections = [
            self._heading(),
            _section("base_model", *self._base_model()),
            _section("data", *self._data()),
            _section("lora", *_lora()),
            _section("control", _entry("method", "full", "full fine-tuning; or lora with a rank")),
            _section("training", *self._training()),
            _section("launch", *self._launch()),
            _section(
                "registry", _entry("model", _slug(self.name), "name of the adapters in MLflow")
            ),
        ]
        return "\n\n".join(sections) + "\n"

    def _heading(self) -> str:
        lines = [
            "# `lora check` shows what is learned, `lora plan` the memory, `lora run` runs it.",
            _line("name", self.name, "folder of the run"),
            _line("seed", 7, "draws the split, the order and the initialization"),
        ]
        return "\n".join(lines)

    def _base_model(self) -> list[str]:
        return [
            _entry("id", self.base, "a hub id, a folder or a .gguf file"),
            _entry("quantization", "nf4", "adapters train over a 4-bit base; none for 16 bits"),
        ]

    def _data(self) -> list[str]:
        return [
            _entry("source", self.source, self.source_comment),
            f"  # {_one_line(self.columns_comment)}",
            _entry("max_tokens", self.max_tokens, self.length_comment),
            _entry("validation_examples", self.validation_examples, "held out and scored"),
        ]

    def _training(self) -> list[str]:
        return [
            _entry("epochs", self.epochs, self.epochs_comment),
            _entry("batch_size", self.batch_size, "examples per step over all processes"),
            _entry("warmup_steps", self.warmup_steps, "in which the learning rate rises"),
        ]

    def _launch(self) -> list[str]:
        launch = self.launch
        return [
            _entry("config", launch.config, f"a file of infra/accelerate: {launch.reason}"),
            _entry("processes", launch.processes, "that train together"),
            _entry("evaluations_at_once", launch.evaluations_at_once, "models that are scored"),
        ]


def fit_lengths(draft: StarterRecipe, sample: DataResult, context: int | None) -> StarterRecipe:
    """Return a recipe whose lengths and held-out examples fit the data.

    Args:
        draft: the recipe with which the sample was prepared.
        sample: of the source's rows.
        context: longest context of the base.
    """
    [source] = sample.sources[:1]
    lengths = sample.lengths
    max_tokens = LENGTH_MULTIPLE * math.ceil(lengths.percentile_99 / LENGTH_MULTIPLE)
    usable = _usable(sample) * source.rows // max(sample.rows, 1)
    validation = min(MOST_VALIDATION, max(FEWEST_VALIDATION, usable // HELD_OUT_PART))
    validation = max(2, min(validation, usable // 3))  # most examples are trained on
    columns = f"columns read: {', '.join(source.used_columns)}"
    if source.unused_columns:
        columns += f"; not read: {', '.join(source.unused_columns)}"
    return replace(
        draft,
        max_tokens=min(max_tokens, context or max_tokens),
        validation_examples=validation,
        source_comment=f"{source.rows:,} rows, read as {source.schema_name}",
        columns_comment=columns,
        length_comment=(
            f"median {lengths.median:,}, 99 % up to {lengths.percentile_99:,}, longest "
            f"{lengths.longest:,}"
        ),
    )


def fit_epochs(fitted: StarterRecipe, data: DataResult) -> StarterRecipe:
    """Return the recipe with a few epochs of the prepared training examples."""
    examples = data.train_examples
    epochs, batch_size = _epochs_and_batch(examples)
    processes = fitted.launch.processes
    batch_size = processes * math.ceil(min(batch_size, examples) / processes)
    steps = steps_of_epochs(epochs, examples, batch_size)
    return replace(
        fitted,
        epochs=epochs,
        batch_size=batch_size,
        warmup_steps=min(MOST_WARMUP, steps // 10),
        epochs_comment=f"of {examples:,} training examples: {steps:,} steps",
    )


def _epochs_and_batch(examples: int) -> tuple[int, int]:
    for most, epochs, batch_size in BY_SIZE:
        if examples <= most:
            return epochs, batch_size
    return LARGE


def _usable(data: DataResult) -> int:
    held_out = data.validation_examples + data.tuning_examples + data.unused_examples
    return data.train_examples + held_out


def _lora() -> list[str]:
    return [
        _entry("ranks", [4, 16], "one adapter is trained for each"),
        _entry("alpha", 32, "the update is scaled by alpha / rank"),
        _entry("learning_rate", 0.001, "peak; about ten times that of full fine-tuning"),
    ]


def _section(name: str, *lines: str) -> str:
    return "\n".join([f"{name}:", *lines])


def _entry(key: str, value: Any, comment: str) -> str:
    return f"  {_line(key, value, comment)}"


def _line(key: str, value: Any, comment: str) -> str:
    """Return a setting in one line, quoted if YAML needs it."""
    style = None if isinstance(value, list) else False
    setting = yaml.safe_dump({key: value}, default_flow_style=style, width=math.inf).strip()
    return f"{setting} # {_one_line(comment)}"


def _one_line(comment: str) -> str:
    """Return a comment without line breaks, which a column's name may contain."""
    return " ".join(comment.split())


def _slug(name: str) -> str:
    """Return a name for the registry."""
    return name.replace("_", "-").replace(".", "-")
