"""The claims of infra/SECURITY.md: each names a test, and those without another are here."""

import ast
import ipaddress
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from tiny import tiny_recipe

from lora_core.base.weight_files import open_checkpoint
from lora_core.errors import CheckpointError
from pipelines.config.recipe import Recipe, parse_recipe
from pipelines.errors import PipelineError, RecipeError, RegistryError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "infra" / "SECURITY.md"
NAMES = ("../outside", "/etc/outside", "a/../../b", "a\nb", "a\0b", "a\x1b[2Jb", "x" * 10_000_000)
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "tarfile", "shutil.unpack_archive"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}


def test_each_claim_names_a_test_that_exists() -> None:
    text = PAGE.read_text()
    claims = text[text.index("## Claims") : text.index("## What remains")]
    assert len(re.findall(r"^- ", claims, re.M)) > 15
    for claim in re.split(r"^- ", claims, flags=re.M)[1:]:
        tests = re.findall(r"`(tests/\S+\.py)::(\w+)`", claim)
        assert tests, claim
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(), name


def test_pages_and_local_server_listen_on_this_host_only() -> None:
    from pipelines.orchestration import local_server, pages

    assert ipaddress.ip_address(local_server.HOST).is_loopback
    assert pages.HOST is local_server.HOST
    for module in (local_server, pages):
        text = Path(str(module.__file__)).read_text()
        assert text.count('"--host"') == len(re.findall(r'"--host", HOST\b', text))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
@pytest.mark.parametrize("key", ["name", "registry.model"])
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, key: str, name: str) -> None:
    values = tiny_recipe(tmp_path, tmp_path / "pairs.jsonl")
    section, _, field = key.rpartition(".")
    (values[section] if section else values)[field] = name
    started = time.monotonic()
    with pytest.raises(RecipeError) as found:
        parse_recipe(values)
    assert time.monotonic() - started < 5
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:12]))
def test_experiments_that_leave_their_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from pipelines.tracking.preflight import check_access

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with pytest.raises((PipelineError, OSError, ValueError)):
        check_access("model", name, tmp_path / "runs")
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == []


@pytest.mark.parametrize("tag", ["../../../x", "", "/etc/passwd", "AB" * 32, "ab" * 31])
def test_tag_of_the_registry_names_no_folder(tag: str) -> None:
    from pipelines.tracking.version_files import adapter_digest

    version = SimpleNamespace(name="tickets", version="1", tags={"adapter_sha256": tag})
    with pytest.raises(RegistryError, match="which is not a digest"):
        adapter_digest(cast(Any, version))


class HostileServer(BaseHTTPRequestHandler):
    """Lists one file, which may be outside the folder that a client downloads."""

    listed = "inside.txt"

    def do_GET(self) -> None:
        listed = {"files": [{"path": self.listed, "is_dir": False, "file_size": 7}]}
        body = json.dumps(listed).encode() if "path=" in self.path else b"written"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hostile() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HostileServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_server_cannot_write_outside_the_download(
    hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    target = tmp_path / "a" / "b" / "download"
    target.mkdir(parents=True)
    uri = f"mlflow-artifacts://{hostile}/0/run/artifacts/adapter"
    options = {"dst_path": str(target), "tracking_uri": f"http://{hostile}"}
    mlflow.artifacts.download_artifacts(artifact_uri=uri, **options)
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["inside.txt"]
    monkeypatch.setattr(HostileServer, "listed", "../../outside.txt")
    with pytest.raises(mlflow.exceptions.MlflowException):
        mlflow.artifacts.download_artifacts(artifact_uri=uri, **options)
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["inside.txt"]


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_of_a_base_names_its_own_files_only(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    index = {"weight_map": {"model.embed_tokens.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(tmp_path)


def test_no_module_unpacks_unpickles_or_runs_text() -> None:
    found = []
    for package in ("lora_core", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for problem in unsafe_parts(ast.parse(path.read_text())):
                found.append((name, problem))
    assert [one for one in found if one[0] != "lora_core/base/pickled_tensors.py"] == []
    text = (ROOT / "lora_core" / "base" / "pickled_tensors.py").read_text()
    assert "pickle.load" not in text
    assert text.count("torch.load(") == text.count("weights_only=True") == 1


def unsafe_parts(tree: ast.AST) -> Iterator[str]:
    """Yield imports and calls that can run or unpack what they read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
            yield from sorted(UNSAFE_MODULES & names)
        elif isinstance(node, ast.Call):
            yield from unsafe_call(ast.unparse(node.func), node)


def unsafe_call(name: str, call: ast.Call) -> Iterator[str]:
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    if name in UNSAFE_CALLS or name in ("yaml.load", "os.system", "torch.load"):
        yield name
    if options.get("shell") == "True" or options.get("allow_pickle") == "True":
        yield f"{name} with a shell or pickles"


def test_remote_code_is_off_by_default(tmp_path: Path) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path, tmp_path / "pairs.jsonl"))
    assert recipe.base_model.trust_remote_code is False
    for path in sorted((ROOT / "pipelines").rglob("*.py")):
        assert "trust_remote_code=True" not in path.read_text(), path
    for path in sorted((ROOT / "pipelines" / "recipes").glob("*.yaml")):
        shipped = Recipe.model_validate(yaml.safe_load(path.read_text()))
        assert not shipped.base_model.trust_remote_code
