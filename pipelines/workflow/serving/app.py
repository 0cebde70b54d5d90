"""The web application: /health, /v1/models, /v1/completions and /v1/chat/completions."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pipelines.errors import DataError
from pipelines.workflow.serving.access import LOCAL_NAMES, is_authorized
from pipelines.workflow.serving.answer_row import (
    AnswerEnd,
    AnswerEvent,
    AnswerFailure,
    AnswerRow,
    TextPiece,
)
from pipelines.workflow.serving.batch_engine import EngineEndedError, GenerationJob, QueueFullError
from pipelines.workflow.serving.prompts import chat_tokens, text_tokens
from pipelines.workflow.serving.protocol import (
    ApiError,
    ChatBody,
    CompletionBody,
    TextBody,
    parse_body,
    sampling_options,
)
from pipelines.workflow.serving.responses import DONE, ResponseFormat, event, model_list
from pipelines.workflow.serving.served_models import Catalog, ServedModel

SECONDS_TO_SEND = 30
"""A client has this long to send its request."""
SECONDS_BETWEEN_CHECKS = 1.0
"""How often a request that waits checks whether its client has left."""
RETRY_SECONDS = "1"
JSON = "application/json"


@dataclass(frozen=True)
class PendingAnswer:
    """A request that was submitted."""

    row: AnswerRow
    events: "asyncio.Queue[AnswerEvent]"
    format: ResponseFormat


@dataclass(frozen=True)
class Api:
    """Answers requests with the models of a catalog."""

    catalog: Catalog
    key: str | None
    """None if no key is needed."""
    host: str
    """Address on which the server listens."""
    max_body_bytes: int
    started: int = field(default_factory=lambda: int(time.time()))

    def application(self) -> Starlette:
        """Return the web application."""
        middleware = []
        if self.key is None:
            hosts = [*LOCAL_NAMES, self.host]
            local = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
            middleware.append(local)
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", self.complete_text, methods=["POST"]),
                Route("/v1/chat/completions", self.complete_chat, methods=["POST"]),
            ],
            middleware=middleware,
            exception_handlers={ApiError: _api_error, HTTPException: _http_error},
        )

    async def health(self, request: Request) -> Response:
        """Return whether requests are answered; status 503 if not."""
        status = self.catalog.engine.status
        values = {
            "status": "ok" if status.is_alive else "failed",
            "waiting": status.waiting,
            "answering": status.answering,
            "largest_batch": status.largest_batch,
            "largest_mix": status.largest_mix,
        }
        return JSONResponse(values, status_code=200 if status.is_alive else 503)

    async def models(self, request: Request) -> Response:
        """List the models."""
        self._check_key(request)
        return JSONResponse(model_list(list(self.catalog.models.values()), self.started))

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        self._check_key(request)
        model = self._find(request.path_params["name"])
        return JSONResponse(model_list([model], self.started)["data"][0])

    async def complete_text(self, request: Request) -> Response:
        """Continue a text."""
        self._check_key(request)
        body = parse_body(await self._read(request), TextBody)
        model = self._find(body.model)
        tokens = text_tokens(model.tokenizer, body.prompt)
        if not tokens:
            raise ApiError("the prompt has no token; send a text", param="prompt")
        return await self._answer(request, body, model, tokens)

    async def complete_chat(self, request: Request) -> Response:
        """Answer the last message of a chat."""
        self._check_key(request)
        body = parse_body(await self._read(request), ChatBody)
        model = self._find(body.model)
        if not model.tokenizer.chat_template:
            raise ApiError(
                f"{model.id} has no chat template; send a prompt to /v1/completions", param="model"
            )
        messages = [message.message() for message in body.messages]
        try:
            tokens = chat_tokens(model.tokenizer, messages)
        except DataError as error:
            raise ApiError(f"the list of messages {error}", param="messages") from error
        return await self._answer(request, body, model, tokens)

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        if not is_authorized(request.headers.get("authorization", ""), self.key):
            raise ApiError(
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )

    def _find(self, name: str) -> ServedModel:
        models = self.catalog.models
        if name not in models:
            raise ApiError(
                f"the model {name[:200]!r} is not served here; use one of {', '.join(models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return models[name]

    async def _read(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            ApiError: it is too large, too slow, or not JSON.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise ApiError(f"the content type is {kind[:80]!r}; send {JSON}", status=415)
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                return await self._read_limited(request)
        except TimeoutError as error:
            raise ApiError(
                f"the body did not arrive within {SECONDS_TO_SEND} seconds; send it again",
                status=408,
            ) from error
        except ClientDisconnect as error:
            raise ApiError("the client has left", status=499) from error

    async def _read_limited(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body_bytes:
                raise ApiError(
                    f"the body has more than {self.max_body_bytes} bytes; send a shorter prompt",
                    status=413,
                )
        return bytes(body)

    async def _answer(
        self, request: Request, body: CompletionBody, model: ServedModel, tokens: list[int]
    ) -> Response:
        pending = self._submit(body, model, tokens)
        if body.stream:
            stream = _stream(pending, includes_usage=body.includes_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        return await _complete(pending, request)

    def _submit(self, body: CompletionBody, model: ServedModel, tokens: list[int]) -> PendingAnswer:
        """Let a request wait for its answer.

        Raises:
            ApiError: it does not fit the context, or too many requests wait.
        """
        options = sampling_options(body, len(tokens), self.catalog.context)
        events: asyncio.Queue[AnswerEvent] = asyncio.Queue()
        emit = _to_loop(events)
        row = AnswerRow(tokens, options, model.tokenizer, model.end_tokens, emit)
        try:
            self.catalog.engine.submit(GenerationJob(model.adapter, row))
        except QueueFullError as error:
            raise ApiError(str(error), status=429, code="queue_full") from error
        except EngineEndedError as error:
            raise ApiError(str(error), status=503) from error
        is_chat = isinstance(body, ChatBody)
        return PendingAnswer(row, events, ResponseFormat(model.id, is_chat, len(tokens)))


def _to_loop(events: "asyncio.Queue[AnswerEvent]") -> Callable[[AnswerEvent], None]:
    """Return a function that passes events from another thread on to this one's loop."""
    loop = asyncio.get_running_loop()

    def emit(event: AnswerEvent) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    return emit


async def _complete(pending: PendingAnswer, request: Request) -> Response:
    """Wait for the complete answer, as long as the client does."""
    pieces: list[str] = []
    try:
        while True:
            try:
                async with asyncio.timeout(SECONDS_BETWEEN_CHECKS):
                    event = await pending.events.get()
            except TimeoutError:
                if await request.is_disconnected():
                    raise ApiError("the client has left", status=499) from None
                continue
            if isinstance(event, TextPiece):
                pieces.append(event.text)
            elif isinstance(event, AnswerEnd):
                return JSONResponse(pending.format.complete("".join(pieces), event))
            else:
                raise _failure(event)
    finally:
        pending.row.cancel()


async def _stream(pending: PendingAnswer, *, includes_usage: bool) -> AsyncIterator[bytes]:
    """Yield the events of an answer; if the client leaves, the answer ends."""
    form = pending.format
    try:
        yield form.first_chunk()
        while True:
            received = await pending.events.get()
            if isinstance(received, TextPiece):
                yield form.text_chunk(received.text)
                continue
            if isinstance(received, AnswerFailure):
                yield event(_failure(received).json())
                return
            yield form.last_chunk(received)
            if includes_usage:
                yield form.usage_chunk(received)
            yield DONE
            return
    finally:
        pending.row.cancel()


def _failure(failure: AnswerFailure) -> ApiError:
    return ApiError(failure.message, status=failure.status)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "the handler is registered for this type"
    headers = {"Retry-After": RETRY_SECONDS} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.json(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Return an error of the web framework, such as an unknown path, in OpenAI's format."""
    assert isinstance(error, HTTPException), "the handler is registered for this type"
    status = error.status_code
    refusal = ApiError(f"{request.method} {request.url.path}: {error.detail}", status=status)
    return JSONResponse(refusal.json(), status_code=status, headers=error.headers)
