"""Requests in OpenAI's format: what is honored, and what is refused because it would do nothing.

A parameter with its neutral value, such as `n: 1` or null, is accepted, because clients send it.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.config.data_section import RoleName
from pipelines.data.conversation import Message
from pipelines.errors import PipelineError
from pipelines.workflow.serving.sampling import SamplingOptions

COMPLETION_TOKENS = 16
"""OpenAI's default length of a completion; a chat's is what the context leaves."""
Body = TypeVar("Body", bound="CompletionBody")
Zero = Literal[0]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
StopTexts = Annotated[list[StopText], Field(max_length=16)]


class ApiError(PipelineError):
    """A request that is not answered."""

    def __init__(self, message: str, *, status: int = 400, param: str = "", code: str = "") -> None:
        """Store what OpenAI's error format has.

        Args:
            message: the value, the rule and the fix.
            status: of HTTP.
            param: the parameter; empty if it is none of them.
            code: for programs; empty for none.
        """
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": str(self),
            "type": kind,
            "param": self.param or None,
            "code": self.code or None,
        }
        return {"error": error}


class StreamOptions(BaseModel):
    """What a stream contains in addition."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = False


class CompletionBody(BaseModel):
    """The parameters of both kinds of requests."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: StopText | StopTexts = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0

    @property
    def requested_tokens(self) -> int | None:
        """Maximum length of the answer; None for the default."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextBody(CompletionBody):
    """A request of /v1/completions."""

    prompt: str
    best_of: Literal[1] = 1
    echo: Literal[False] = False


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: RoleName
    content: str | list[TextPart]

    def message(self) -> Message:
        """Return the message as the chat template gets it."""
        if isinstance(self.content, str):
            return Message(self.role, self.content)
        return Message(self.role, "".join(part.text for part in self.content))


class ChatBody(CompletionBody):
    """A request of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] = False

    @property
    def requested_tokens(self) -> int | None:
        """Maximum length of the answer; None for the default."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse_body(raw: bytes, kind: type[Body]) -> Body:
    """Return the parameters of a request.

    Raises:
        ApiError: a parameter is missing, has another type or value, or would have no effect.
    """
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON ({error}); send one JSON object") from error
    if not isinstance(values, dict):
        raise ApiError("the body is not a JSON object; send one with model and a prompt")
    given = {name: value for name, value in values.items() if value is not None}
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from error
    _check_effects(body, given)
    return body


def sampling_options(body: CompletionBody, prompt_tokens: int, context: int) -> SamplingOptions:
    """Return how a request is answered.

    Args:
        body: the request.
        prompt_tokens: of its prompt.
        context: most tokens of prompt and answer.

    Raises:
        ApiError: prompt and answer do not fit the context.
    """
    room = context - prompt_tokens
    default = COMPLETION_TOKENS if isinstance(body, TextBody) else room
    requested = body.requested_tokens
    wanted = min(default, room) if requested is None else requested
    if not 1 <= wanted <= room:
        raise ApiError(
            f"the prompt has {prompt_tokens} tokens and the answer may have {max(wanted, 1)}; "
            f"together they exceed the {context} tokens of this server's context; shorten the "
            "prompt or lower max_tokens",
            code="context_length_exceeded",
        )
    return SamplingOptions(wanted, body.temperature, body.top_p, body.stops, body.seed)


def _refusal(error: ValidationError) -> ApiError:
    """Return the first problem of a request as an error."""
    problem = error.errors(include_url=False)[0]
    path = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return ApiError(
            f"the parameter {path} has no effect on this server; remove it",
            param=path,
            code="unsupported_parameter",
        )
    if problem["type"] == "missing":
        return ApiError(f"the parameter {path} is missing; add it", param=path)
    shown = repr(problem.get("input"))[:80]
    return ApiError(f"{path} is {shown}, which is not valid: {problem['msg']}", param=path)


def _check_effects(body: CompletionBody, given: Mapping[str, Any]) -> None:
    """Refuse parameters that have no effect together with the others.

    Raises:
        ApiError: see above.
    """
    if body.stream_options is not None and not body.stream:
        raise _without_effect("stream_options", "without stream: true")
    if {"max_tokens", "max_completion_tokens"} <= given.keys():
        raise _without_effect("max_tokens", "with max_completion_tokens")


def _without_effect(name: str, reason: str) -> ApiError:
    return ApiError(
        f"the parameter {name} has no effect {reason}; remove it",
        param=name,
        code="unsupported_parameter",
    )
