"""Time to render and tokenize one conversation with tools, by its number of messages.

The template is called for each answer, because only the rendering of its history shows how the
model is prompted for it, so the time grows with the square of the number of messages.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from parity.rows import Row, figure

from pipelines.config.data_section import DataSection
from pipelines.data.encoding_rows import RowEncoder
from pipelines.data.rendering.templates import prepared_tokenizer
from pipelines.data.schemas.schema import detect_schema
from pipelines.models.base_model import identify
from pipelines.models.base_tokenizer import base_tokenizer
from pipelines.models.tokenizer import load_tokenizer

BASE = "embedded:SmolLM2-135M-Instruct"
CALLS = (2, 20, 80)
"""Numbers of calls in a conversation, each with a result."""
REPEATS = 5
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a key up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}


def tool_speed_rows(calls: Sequence[int] = CALLS) -> list[Row]:
    """Time one conversation of each length."""
    rows: list[Row] = []
    with base_tokenizer(identify(BASE, None)) as base, TemporaryDirectory() as scratch:
        file = Path(scratch) / "tools.jinja"
        file.write_text(TEMPLATE)
        settings = DataSection.model_validate(
            {"source": "tools.jsonl", "chat_template": str(file), "max_tokens": 1 << 17}
        )
        tokenizer = prepared_tokenizer(load_tokenizer(Path(base.folder)), settings)
        for count in calls:
            row = {"messages": _messages(count), "tools": [TOOL]}
            schema = detect_schema(
                list(row), [row], settings.all_sources[0], supervise="assistant", group_column=None
            )
            seconds = _seconds(RowEncoder(schema, tokenizer, settings), row)
            name = f"one conversation of {len(row['messages'])} messages with tools"
            rows.append(figure(name, 1000 * seconds, "ms"))
    return rows


def _messages(calls: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Find it."}]
    for number in range(calls):
        function = {"name": "look_up", "arguments": {"key": f"key {number}"}}
        call = {"type": "function", "id": f"c{number}", "function": function}
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{number}", "name": "look_up", "content": "a value"},
        ]
    return [*messages, {"role": "assistant", "content": "Done."}]


def _seconds(encoder: RowEncoder, row: dict[str, Any]) -> float:
    """Return the time of one row, after the first."""
    [outcome] = encoder.encode([row])
    assert isinstance(outcome, tuple), outcome
    started = time.perf_counter()
    encoder.encode([row] * REPEATS)
    return (time.perf_counter() - started) / REPEATS
