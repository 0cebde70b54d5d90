"""`lora serve` as a process: several adapters at once, a stream, a moved alias, Ctrl-C."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from served_adapters import RunningServer, SmallRegistry, alone, register_adapter

pytestmark = pytest.mark.server
PROMPTS = ("Say red.", "The quick brown fox", "def area(width, height): return", "Say blue 12.")
TOKENS = 24
SECONDS_TO_RELOAD = 60


def chat(server: RunningServer, model: str, prompt: str, **changes: Any) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
        **changes,
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def text_of(answer: dict[str, Any]) -> str:
    [choice] = answer["choices"]
    return str(choice["message"]["content"])


def entry(server: RunningServer, name: str) -> dict[str, Any]:
    models = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    [found] = [model for model in models if model["id"] == name]
    return dict(found)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_RELOAD
    while not condition():
        assert time.monotonic() < deadline, "the server does not reload"
        time.sleep(0.1)


def test_a_server_answers_like_each_adapter_alone_and_follows_an_alias(
    running_server: RunningServer, small_registry: SmallRegistry
) -> None:
    """One server for all, because its start takes most of the time."""
    _check_mixed_batches(running_server, small_registry)
    _check_stream(running_server, small_registry)
    _check_reload(running_server, small_registry)
    assert running_server.interrupt() == 0
    assert running_server.log.read_text().splitlines()[-1] == "stopped"


def _check_mixed_batches(server: RunningServer, registry: SmallRegistry) -> None:
    expected = {
        "sales@champion": alone(registry.base, registry.folders["sales"], PROMPTS, TOKENS),
        "support/1": alone(registry.base, registry.folders["support"], PROMPTS, TOKENS),
        "sharp": alone(registry.base, None, PROMPTS, TOKENS),
    }
    requests = [(model, index) for index in range(len(PROMPTS)) for model in expected]
    assert len({expected[model][index] for model, index in requests}) > len(PROMPTS)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = pool.map(lambda one: text_of(chat(server, one[0], PROMPTS[one[1]])), requests)
        for (model, index), answer in zip(requests, answers, strict=True):
            assert answer == expected[model][index], (model, index)
    health = httpx.get(f"{server.url}/health", timeout=60).json()
    assert health["largest_batch"] > 3
    assert health["largest_mix"] == len(expected)


def _check_stream(server: RunningServer, registry: SmallRegistry) -> None:
    [expected] = alone(registry.base, registry.folders["sales"], PROMPTS[:1], TOKENS)
    body = {
        "model": "sales@champion",
        "messages": [{"role": "user", "content": PROMPTS[0]}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    assert len(deltas) > 3
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == TOKENS
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def _check_reload(server: RunningServer, registry: SmallRegistry) -> None:
    """Version 2 of sales replaces version 1; what is not intact replaces nothing."""
    name = "sales@champion"
    before = entry(server, name)
    assert (before["version"], before["reload_error"]) == ("1", None)
    [new] = alone(registry.base, registry.folders["later"], PROMPTS[:1], TOKENS)
    old = text_of(chat(server, name, PROMPTS[0]))
    assert old != new
    version = register_adapter(registry.runs, "sales", registry.folders["later"])
    until(lambda: entry(server, name)["version"] == version)
    assert text_of(chat(server, name, PROMPTS[0])) == new
    assert entry(server, name)["adapter_sha256"] != before["adapter_sha256"]
    register_adapter(registry.runs, "sales", registry.folders["support"], adapter_sha256="0" * 64)
    until(lambda: entry(server, name)["reload_error"] is not None)
    assert "does not contain the adapter" in entry(server, name)["reload_error"]
    assert entry(server, name)["version"] == version
    assert text_of(chat(server, name, PROMPTS[0])) == new
