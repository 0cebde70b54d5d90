"""The web application on a real base: what is honored, what is refused, and the limits."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served_adapters import alone

from pipelines.evaluation.generation import generate
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import Hardware
from pipelines.models.loading import load_model
from pipelines.models.tokenizer import load_tokenizer
from pipelines.tracking.pull_lock import LockedBase
from pipelines.workflow.serving.app import Api
from pipelines.workflow.serving.batch_engine import GenerationEngine
from pipelines.workflow.serving.options import ServeOptions
from pipelines.workflow.serving.served_models import AdapterSource, Catalog

pytest.importorskip("mlflow")
KEY = "0123456789abcdef"
CPU = Hardware("cpu", torch.float32, "gloo")
LONG = 300
MAX_BODY = 4000


def catalog_of(folder: Path, options: ServeOptions) -> Catalog:
    """Serve a base alone."""
    model = load_model(folder, "none", CPU)
    engine = GenerationEngine(model, batch=options.batch, queue=options.queue)
    base = LockedBase(id=str(folder), revision="", quantization="none", fingerprints={})
    catalog = Catalog(AdapterSource(folder, options), engine, folder, base)
    catalog.add_base()
    return catalog


@pytest.fixture(scope="module")
def catalog(sharp_base: Path) -> Iterator[Catalog]:
    catalog = catalog_of(sharp_base, ServeOptions(batch=1, queue=1))
    yield catalog
    catalog.engine.close()


def send_all(api: Api, bodies: list[dict[str, Any]], path: str, **headers: str) -> Any:
    """Send requests at the same time; return the responses."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api.application())
        base_url = "http://127.0.0.1:1"
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            posts = [client.post(path, json=body, headers=headers) for body in bodies]
            return await asyncio.gather(*posts)

    return asyncio.run(run())


def complete(catalog: Catalog, **changes: Any) -> httpx.Response:
    """Send a request for a completion."""
    body = {"model": "sharp", "prompt": "Say red", "temperature": 0, **changes}
    api = Api(catalog, None, "127.0.0.1", MAX_BODY)
    response: httpx.Response
    [response] = send_all(api, [body], "/v1/completions")
    return response


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("top_k", 5, "unsupported_parameter"),
        ("logit_bias", {"5": 1}, "unsupported_parameter"),
        ("user", "someone", "unsupported_parameter"),
        ("stream_options", {"include_usage": True}, "unsupported_parameter"),
        ("presence_penalty", 0.5, None),
        ("n", 2, None),
        ("temperature", -1, None),
        ("temperature", "1", None),
        ("top_p", 0, None),
        ("max_tokens", 0, None),
        ("stop", [""], None),
        ("seed", 1.5, None),
        ("prompt", ["one", "two"], None),
        ("prompt", "", None),
    ],
)
def test_what_has_no_effect_or_is_not_valid_is_refused(
    catalog: Catalog, name: str, value: object, code: str | None
) -> None:
    response = complete(catalog, **{name: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"].startswith(name)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


def test_neutral_values_are_accepted(catalog: Catalog) -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": None}
    assert text(complete(catalog, **neutral)) == text(complete(catalog))


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"[" * 3000, b'{"model": "sharp"}'])
def test_malformed_bodies_are_refused(catalog: Catalog, raw: bytes) -> None:
    async def post(kind: str) -> httpx.Response:
        transport = httpx.ASGITransport(Api(catalog, None, "127.0.0.1", MAX_BODY).application())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"content-type": kind}
            return await client.post("/v1/completions", content=raw, headers=headers)

    assert asyncio.run(post("application/json")).status_code == 400
    assert asyncio.run(post("text/plain")).status_code == 415


def test_answers_stop_as_in_an_evaluation(catalog: Catalog, sharp_base: Path) -> None:
    tokenizer = load_tokenizer(sharp_base)
    prompt = tokenizer("Say red").input_ids
    reader = CheckedReader(load_model(sharp_base, "none", CPU))
    [expected] = generate(reader, tokenizer, [prompt], 30)
    assert text(complete(catalog, max_tokens=30)) == expected.text
    stop = expected.text[5:7]
    [cut] = generate(reader, tokenizer, [prompt], 30, until=[stop])
    response = complete(catalog, max_tokens=30, stop=[stop, "never"])
    assert text(response) == cut.text != expected.text
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_a_seed_repeats_an_answer(catalog: Catalog) -> None:
    sampled = {"temperature": 1, "max_tokens": 20}
    first, again = (text(complete(catalog, seed=7, **sampled)) for _ in range(2))
    assert first == again
    assert first != text(complete(catalog, seed=8, **sampled))
    assert text(complete(catalog, **sampled)) != text(complete(catalog, **sampled))


def test_prompt_and_answer_must_fit_the_context(catalog: Catalog) -> None:
    refused = complete(catalog, max_tokens=catalog.context)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert complete(catalog, prompt="x " * 600).status_code == 400


def test_large_bodies_unknown_models_and_paths_are_refused(catalog: Catalog) -> None:
    assert complete(catalog, prompt="x" * MAX_BODY).status_code == 413
    missing = complete(catalog, model="sales@champion")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    api = Api(catalog, None, "127.0.0.1", MAX_BODY)
    [nowhere] = send_all(api, [{}], "/v1/embeddings")
    assert (nowhere.status_code, list(nowhere.json())) == (404, ["error"])


def test_requests_beyond_the_queue_are_refused(catalog: Catalog) -> None:
    body = {"model": "sharp", "prompt": "Say", "temperature": 0, "max_tokens": LONG}
    api = Api(catalog, None, "127.0.0.1", MAX_BODY)
    responses = send_all(api, [body] * 6, "/v1/completions")
    statuses = sorted(response.status_code for response in responses)
    assert statuses[0] == 200
    assert statuses[-3:] == [429] * 3  # one is answered, one waits
    [refused, *_] = [response for response in responses if response.status_code == 429]
    assert refused.headers["retry-after"]


def test_a_key_is_required_if_there_is_one(catalog: Catalog) -> None:
    api = Api(catalog, KEY, "0.0.0.0", MAX_BODY)
    body = {"model": "sharp", "prompt": "Say", "max_tokens": 1}
    for headers in ({}, {"authorization": f"Bearer {KEY}x"}):
        [refused] = send_all(api, [body], "/v1/completions", **headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    headers = {"authorization": f"Bearer {KEY}", "host": "served.example"}
    [answered] = send_all(api, [body], "/v1/completions", **headers)
    assert answered.status_code == 200


def test_without_a_key_other_host_names_are_refused(catalog: Catalog) -> None:
    """A page in a browser could resolve its own name to this host."""
    api = Api(catalog, None, "127.0.0.1", MAX_BODY)
    body = {"model": "sharp", "prompt": "Say", "max_tokens": 1}
    [refused] = send_all(api, [body], "/v1/completions", host="attacker.example")
    assert refused.status_code == 400


def test_parts_of_a_message_are_joined(catalog: Catalog, sharp_base: Path) -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "red."}]
    body = {
        "model": "sharp",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_completion_tokens": 12,
    }
    api = Api(catalog, None, "127.0.0.1", MAX_BODY)
    [response] = send_all(api, [body], "/v1/chat/completions")
    [expected] = alone(sharp_base, None, ["Say red."], 12)
    assert response.json()["choices"][0]["message"]["content"] == expected


def test_a_base_without_a_template_completes_texts_only(plain_folder: Path) -> None:
    catalog = catalog_of(plain_folder, ServeOptions())
    api = Api(catalog, None, "127.0.0.1", MAX_BODY)
    chat = {"model": "plain", "messages": [{"role": "user", "content": "Hi"}]}
    [refused] = send_all(api, [chat], "/v1/chat/completions")
    assert "send a prompt to /v1/completions" in refused.json()["error"]["message"]
    [answered] = send_all(api, [{"model": "plain", "prompt": "Hi"}], "/v1/completions")
    assert answered.json()["usage"]["completion_tokens"] <= 16
    catalog.engine.close()
    [ended] = send_all(api, [{"model": "plain", "prompt": "Hi"}], "/v1/completions")
    assert (ended.status_code, json.loads(ended.text)["error"]["type"]) == (503, "server_error")
