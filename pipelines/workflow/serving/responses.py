"""Responses in OpenAI's format: models, answers, and the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.workflow.serving.answer_row import AnswerEnd
from pipelines.workflow.serving.served_models import ServedModel

DONE = b"data: [DONE]\n\n"
OWNER = "registry"


def model_list(models: Sequence[ServedModel], started: int) -> dict[str, Any]:
    """Return the response of /v1/models.

    Args:
        models: that are served.
        started: when the server started, in seconds since 1970.
    """
    entries = []
    for model in models:
        entry: dict[str, Any] = {"id": model.id, "object": "model", "created": started}
        entry["owned_by"] = OWNER
        if model.adapter is not None:
            entry["version"] = model.version
            entry["adapter_sha256"] = model.adapter_sha256
            entry["reload_error"] = model.reload_error or None
        entries.append(entry)
    return {"object": "list", "data": entries}


def event(values: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n".encode()


@dataclass(frozen=True)
class ResponseFormat:
    """How the answer to one request is written."""

    model: str
    is_chat: bool
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def complete(self, text: str, end: AnswerEnd) -> dict[str, Any]:
        """Return a complete answer."""
        content: dict[str, Any] = {"text": text}
        if self.is_chat:
            content = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": end.reason}
        name = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(name), "choices": [choice], "usage": self._usage(end)}

    def first_chunk(self) -> bytes:
        """Return the event that opens a stream; empty if the format has none."""
        if not self.is_chat:
            return b""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def text_chunk(self, text: str) -> bytes:
        """Return the event with the next characters of an answer."""
        content: dict[str, Any] = {"text": text}
        if self.is_chat:
            content = {"delta": {"content": text}}
        return self._chunk(content, None)

    def last_chunk(self, end: AnswerEnd) -> bytes:
        """Return the event with the reason for the end."""
        content: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        return self._chunk(content, end.reason)

    def usage_chunk(self, end: AnswerEnd) -> bytes:
        """Return the event with the numbers of tokens."""
        return event({**self._head(self._chunk_name), "choices": [], "usage": self._usage(end)})

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, content: dict[str, Any], reason: str | None) -> bytes:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return event({**self._head(self._chunk_name), "choices": [choice]})

    def _head(self, name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self, end: AnswerEnd) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": end.completion_tokens,
            "total_tokens": self.prompt_tokens + end.completion_tokens,
        }
