"""Pulled adapters: verified against digests and base, usable offline, exported for other programs.

A real adapter of a tiny Llama is registered once for all tests.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from registered import SmallVersions, configure_store, register, write_adapter, write_training
from summaries import build
from tiny import save_tiny_model

from lora_core.files import sha256_of_file
from pipelines.errors import PipelineError, RegistryError, UnreachableError

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking.pull_lock import LOCK, Format, LockedBase, PullLock  # noqa: E402
from pipelines.tracking.pulled import GGUF_FILE, PullRequest, pull  # noqa: E402
from pipelines.workflow.local_base import base_finder, find_local_base  # noqa: E402

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
NAME = "pulled"
WEIGHTS = "adapter_model.safetensors"


def save_real_adapter(folder: Path, base: Path) -> dict[str, Any]:
    """Write an adapter of rank 4 for a base; return its sidecar."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_core import LoraConfig, inject, save_adapter
    from lora_core.adapter.io import Identity

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"))
    inject(model, config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    save_adapter(model, folder, config, Identity(base=str(base)))
    identity: dict[str, Any] = json.loads((folder / "adapter_identity.json").read_text())
    return identity


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(runs: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The registered champion's folder, as training left it."""
    folder = tmp_path_factory.mktemp("comparison")
    summary = build(folder)
    summary["recipe"]["registry"]["model"] = NAME
    for label, model in summary["models"].items():
        if "training" in model:
            model["training"]["folder"] = str(write_training(folder / label))
        if "judgment" in model:
            saved = model["training"]["result"]["saved"]
            saved["adapter_sha256"] = write_adapter(folder / label / "adapter", label)
    saved = summary["models"]["rank-16"]["training"]["result"]["saved"]
    identity = save_real_adapter(folder / "rank-16" / "adapter", base)
    saved["adapter_sha256"] = identity["adapter_sha256"]
    summary["base"] |= {"id": str(base), "digests": identity["base_digests"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        configure_store(runs)
        register(summary, runs)
        yield folder / "rank-16" / "adapter"


@pytest.fixture
def request_for(adapter: Path, runs: Path, tmp_path: Path) -> PullRequest:
    """A request for the champion in PEFT's format."""
    return PullRequest(f"{NAME}@champion", tmp_path, "peft", base_finder(runs, ""))


def test_folder_has_the_registered_files_and_a_lock(
    request_for: PullRequest, adapter: Path, base: Path, runs: Path
) -> None:
    pulled = pull(request_for, runs)
    folder = Path(pulled.folder)
    sha256 = sha256_of_file(adapter / WEIGHTS)
    assert folder.name == sha256[:16]
    for path in adapter.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    lock = PullLock.model_validate_json((folder / LOCK).read_bytes())
    assert (lock.name, lock.version, lock.aliases) == (NAME, "2", ("candidate", "champion"))
    assert lock.adapter_sha256 == lock.files[WEIGHTS] == sha256
    assert set(lock.files) == {
        "MLmodel",
        "README.md",
        WEIGHTS,
        "adapter_config.json",
        "adapter_identity.json",
        "bom.cdx.json",
        "evidence/items.json",
        "evidence/summary.json",
    }
    assert pulled.base == lock.base.id == str(base)


def test_pulled_version_needs_no_server(
    request_for: PullRequest, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pull(request_for, runs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    digest = first.lock.adapter_sha256
    for reference in (f"{NAME}/2", f"models:/{NAME}/2", digest, digest[:12]):
        again = pull(replace(request_for, reference=reference), runs)
        assert again == first.model_copy(update={"reused": True})
    with pytest.raises(UnreachableError):
        pull(request_for, runs)  # an alias may have moved


@pytest.mark.parametrize("file", [WEIGHTS, "evidence/items.json", "added.py"])
def test_changed_folder_is_refused(request_for: PullRequest, runs: Path, file: str) -> None:
    folder = Path(pull(request_for, runs).folder)
    (folder / file).write_text("of someone else")
    for reference in (request_for.reference, f"{NAME}/2"):
        with pytest.raises(RegistryError, match=f"{file} is not the file of .*{LOCK}"):
            pull(replace(request_for, reference=reference), runs)


def test_changed_evidence_is_not_pulled(request_for: PullRequest, runs: Path) -> None:
    source = mlflow.MlflowClient().get_model_version_download_uri(NAME, "2")
    stored = Path(source.removeprefix("file://"), "evidence", "items.json")
    content = stored.read_text()
    stored.write_text(content.replace("1", "2", 1))
    with pytest.raises(RegistryError, match="does not contain the evidence of its tag"):
        pull(request_for, runs)
    assert list(request_for.folder.iterdir()) == []
    stored.write_text(content)


@pytest.mark.parametrize("tag", ["", "../../elsewhere", "ab" * 31])
def test_folder_is_never_named_by_something_else(
    request_for: PullRequest, small: SmallVersions, tag: str
) -> None:
    version = small.add("unnamed", "one", adapter_sha256=tag)
    with pytest.raises(RegistryError, match="which is not a digest"):
        pull(replace(request_for, reference=f"unnamed/{version}"), small.runs)


def test_other_base_on_this_host_is_refused(
    request_for: PullRequest, runs: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    wrong = replace(request_for, folder=tmp_path / "to", find_base=base_finder(runs, str(other)))
    with pytest.raises(RegistryError, match="its weights are not those that the adapter was"):
        pull(wrong, runs)
    assert not (tmp_path / "to").exists()


def test_export_for_vllm_has_the_same_update(request_for: PullRequest, runs: Path) -> None:
    import torch
    from safetensors.torch import load_file

    plain = load_file(Path(pull(request_for, runs).folder, WEIGHTS))
    pulled = pull(replace(request_for, format="vllm"), runs)
    padded = load_file(Path(pulled.folder, WEIGHTS))
    assert pulled.lock.files[WEIGHTS] != pulled.lock.adapter_sha256
    [key, *_] = [name.removesuffix("lora_A.weight") for name in plain if "lora_A" in name]
    update = 2 * plain[f"{key}lora_B.weight"] @ plain[f"{key}lora_A.weight"]
    found = padded[f"{key}lora_B.weight"] @ padded[f"{key}lora_A.weight"]
    torch.testing.assert_close(found, update)


def test_export_for_llama_cpp_needs_the_base(request_for: PullRequest, runs: Path) -> None:
    from gguf import GGUFReader

    wanted = replace(request_for, format="llama.cpp")
    without = replace(wanted, find_base=lambda base: None)
    with pytest.raises(RegistryError, match="name its folder with --base"):
        pull(without, runs)
    pulled = pull(wanted, runs)
    names = {tensor.name for tensor in GGUFReader(Path(pulled.folder) / GGUF_FILE).tensors}
    assert "blk.0.attn_q.weight.lora_a" in names
    assert pull(replace(wanted, reference=f"{NAME}/2"), runs).reused


@pytest.mark.parametrize("kind", ["peft", "vllm"])
def test_formats_have_their_own_folders(request_for: PullRequest, runs: Path, kind: Format) -> None:
    pulled = pull(replace(request_for, format=kind), runs)
    assert Path(pulled.folder).name.endswith("-vllm") == (kind == "vllm")


def test_base_is_found_only_on_this_host(runs: Path, base: Path, tmp_path: Path) -> None:
    absent = LockedBase(id="nobody/nothing", revision="", quantization="none", fingerprints={})
    assert find_local_base(absent, runs) is None
    gone = absent.model_copy(update={"id": str(tmp_path / "gone.gguf")})
    assert find_local_base(gone, runs) is None
    assert find_local_base(absent.model_copy(update={"id": str(base)}), runs) == base
    with pytest.raises(PipelineError, match=r"has no config.json; give the folder"):
        base_finder(runs, str(tmp_path))
