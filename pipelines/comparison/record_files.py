"""Item records in files: one JSON object a line, with the fields of the record's type.

An optional field without a value is absent. A record with `left_out` is that of an item that was
not scored; the type of any other record follows from its `kind`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError

from lora_core.files import write_text
from pipelines.comparison.record_types import (
    ChatRecord,
    ChoiceRecord,
    GenerationRecord,
    ItemRecord,
    LeftOutRecord,
    PassageRecord,
    ScoreRecord,
    SingleAnswerRecord,
    TaskRecord,
)
from pipelines.config.error_messages import problems_of
from pipelines.errors import PipelineError

VALUE_CHARACTERS = 200
"""Characters of a wrong value in a message."""
KINDS = ("task", "generation", "general", "answer", "score", "text", "chat")


def _tag(values: Any) -> str | None:
    """Return the tag of the type of a record in JSON; None if it has none."""
    if not isinstance(values, dict):
        return None
    return "left_out" if "left_out" in values else values.get("kind")


TaggedRecord = Annotated[
    Annotated[TaskRecord, Tag("task")]
    | Annotated[GenerationRecord, Tag("generation")]
    | Annotated[ChoiceRecord, Tag("general")]
    | Annotated[SingleAnswerRecord, Tag("answer")]
    | Annotated[ScoreRecord, Tag("score")]
    | Annotated[PassageRecord, Tag("text")]
    | Annotated[ChatRecord, Tag("chat")]
    | Annotated[LeftOutRecord, Tag("left_out")],
    Discriminator(
        _tag,
        custom_error_type="record_kind",
        custom_error_message="The kind should be one of " + ", ".join(KINDS),
    ),
]
RECORD = TypeAdapter[ItemRecord](TaggedRecord, config=ConfigDict(extra="forbid", strict=True))


def read_items(path: Path) -> list[ItemRecord]:
    """Read the item records of one model.

    Raises:
        PipelineError: a line is not a record; the message names file, line and field.
    """
    records = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            records.append(parse_record(line, f"line {number} of {path}"))
    return records


def write_items(path: Path, records: Iterable[ItemRecord]) -> None:
    """Write the item records of one model.

    Args:
        path: of the file; replaced once it is complete.
        records: in the order of evaluation, which is the same for every model.
    """
    write_text(path, "".join(json_line(record) for record in records))


def parse_record(line: str, where: str) -> ItemRecord:
    """Return the record in a line of JSON.

    Args:
        line: one JSON object.
        where: file and line, for the error message.

    Raises:
        PipelineError: its kind is unknown, or a field is missing, unknown or of another type.
    """
    try:
        return RECORD.validate_json(line)
    except ValidationError as error:
        raise PipelineError(
            f"{where} is not an item record ({_first_problem(error)}); "
            "delete the folder of the file and run its recipe again, which evaluates the model"
        ) from error


def json_line(record: ItemRecord) -> str:
    """Return a record as a line of JSON."""
    values = {name: value for name, value in vars(record).items() if value is not None}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _first_problem(error: ValidationError) -> str:
    """Return the field, the rule and the value of the first problem of a record."""
    problem = problems_of(error)[0]
    value = repr(problem.value)[:VALUE_CHARACTERS]
    return f"{problem.key or 'record'}: {problem.message}, not {value}"
