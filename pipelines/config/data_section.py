"""The data section of a recipe: where rows come from, how they are read, and what is learned.

Loading it imports no torch.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from pipelines.config.fields import Count, SampleSize, Section

ColumnName = Literal[
    "text", "prompt", "completion", "messages", "system", "history", "tools", "input"
]
"""What a column can be."""
RoleName = Literal["system", "user", "assistant", "tool"]
DOCSTRINGS = "docstrings"
"""The source that the interpreter's standard library provides."""
DOCSTRINGS_GROUP = "group"
"""Its column with the module; examples of one module resemble each other."""
MAX_SOURCE_CHARACTERS = 700
CHATML = "chatml"
NO_TEMPLATE = "none"
"""Values of `chat_template` that are not files."""


class SourceSettings(Section):
    """Rows from one place, and how they are read."""

    config: str | None = None
    """Configuration of a data set, if it has several."""
    revision: str | None = None
    """Commit or tag of a hub data set."""
    split: str | None = None
    """Split of a hub data set or of a saved data set, such as `train` (the default) or
    `train[:1000]`."""
    columns: dict[ColumnName, str] = Field(default_factory=dict)
    """What a column is → its name in the source, such as `prompt: question`; by default, usual
    names are recognized."""
    roles: dict[str, RoleName] = Field(default_factory=dict)
    """Role in the source → its usual name, such as `bot: assistant`; usual names are recognized."""
    encoding: str | None = None
    """Encoding of a text file; detected by default."""
    delimiter: str | None = None
    """Delimiter of a .csv file; detected by default."""
    max_rows: Count | None = None
    """Number of rows to use, drawn by the seed; all by default."""


class WeightedSource(SourceSettings):
    """One of several sources."""

    source: str
    """As `data.source`."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1
    """How often each training example of this source occurs in an epoch: 2 for twice, 0.5 for half
    of them, drawn by the seed."""


class DataSection(SourceSettings):
    """The training data."""

    source: str | None = None
    """`docstrings` (the interpreter's standard library); a file, a folder or a pattern of files
    (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .txt; compressed as .gz, .zst, .bz2 or
    .xz); a folder that `save_to_disk` wrote; an s3:// or https:// address; or a hub data set
    id."""
    sources: tuple[WeightedSource, ...] = ()
    """Several sources instead of one."""
    validation_source: str | None = None
    """Rows to hold out, as `source`; by default they are drawn from the source. A folder with a
    file or split named validation, test, dev or eval provides them too."""
    validation_split: str | None = None
    """Split of the source to hold out instead."""
    group_column: str | None = None
    """Rows with the same value are on the same side of the split. By default, rows whose
    conversations start with the same question are, and rows with the same text."""
    validation_examples: SampleSize = 64
    """Held-out examples that are scored, from groups that are not trained on."""
    supervise: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are learned: those of every answer, of the last one, or of prompts as well. A
    message with `weight: 0` or `train: false` is never learned."""
    supervise_empty_thinking: bool = False
    """Learn the empty thinking block that some chat templates write before an answer."""
    chat_template: str | None = None
    """Chat template for a base without one: `chatml`, or a Jinja file; or `none` for rows that have
    already been rendered. The tokenizer's by default."""
    eos_token: str | None = None
    """Token that ends an answer, if it differs from the tokenizer's."""
    template_arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the chat template, such as `enable_thinking: false`."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Maximum length of an example."""
    long_examples: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a longer one: truncation on the right (an example without any supervised
    token left is dropped), removal, or an error. Each is counted."""
    bad_rows: Literal["error", "drop"] = "error"
    """What happens to rows that cannot be learned as written: an error that lists them, or removal
    with a count."""
    max_source_characters: Count = MAX_SOURCE_CHARACTERS
    """Longest function that `docstrings` includes; no other source uses it."""

    @property
    def all_sources(self) -> tuple[WeightedSource, ...]:
        """Return the sources, of which there is at least one."""
        if self.source is None:
            return self.sources
        settings = {name: getattr(self, name) for name in SourceSettings.model_fields}
        return (WeightedSource(source=self.source, **settings),)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sources."""
        return tuple(source.source for source in self.all_sources)

    def group_column_of(self, source: WeightedSource) -> str | None:
        """Return the column that groups the rows of a source; None to group by the question."""
        if self.group_column is None and source.source == DOCSTRINGS:
            return DOCSTRINGS_GROUP
        return self.group_column

    @property
    def title(self) -> str:
        """Return the names of the sources as one text."""
        return " + ".join(self.names)

    @property
    def label(self) -> str:
        """Return a short name, for a folder."""
        name = Path(self.names[0]).stem
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "rows"
        return plain if len(self.names) == 1 else f"{plain}-and-{len(self.names) - 1}-more"

    @property
    def _changed(self) -> set[str]:
        """Return the settings that differ from their defaults; a saved recipe names all."""
        fields = type(self).model_fields
        found = set()
        for name, field in fields.items():
            if getattr(self, name) != field.get_default(call_default_factory=True):
                found.add(name)
        return found

    @model_validator(mode="after")
    def _check_sources(self) -> "DataSection":
        if (self.source is None) == (not self.sources):
            raise ValueError(
                f"has source {self.source!r} and {len(self.sources)} sources: name one source, or "
                "list several under sources"
            )
        if self.sources:
            unused = self._changed & set(SourceSettings.model_fields)
            if unused:
                names = ", ".join(sorted(unused))
                raise ValueError(
                    f"sets {names} next to sources, where they have no effect; set them for each "
                    "of the sources"
                )
        return self

    @model_validator(mode="after")
    def _check_settings_have_effect(self) -> "DataSection":
        if self.validation_source is not None and self.validation_split is not None:
            raise ValueError(
                f"names validation_source {self.validation_source!r} and validation_split "
                f"{self.validation_split!r}; name one of them"
            )
        is_docstrings = DOCSTRINGS in self.names
        if "max_source_characters" in self._changed and not is_docstrings:
            raise ValueError(
                f"has max_source_characters {self.max_source_characters}, which only the source "
                "'docstrings' uses; remove it (max_tokens limits the length of an example)"
            )
        for name, value in self.template_arguments.items():
            if isinstance(value, str) and value.lower() in ("true", "false"):
                raise ValueError(
                    f"has the text {value!r} as template_arguments.{name}, which a template does "
                    "not read as true or false; remove the quotes"
                )
        if self.chat_template == NO_TEMPLATE and self.template_arguments:
            raise ValueError(
                "has template_arguments, which have no effect with chat_template 'none'; remove "
                "one of them"
            )
        return self
