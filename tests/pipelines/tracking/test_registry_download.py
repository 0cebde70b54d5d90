"""Adapters downloaded from a real SQLite store: complete, only once, loadable in PEFT."""

import os
from pathlib import Path

import pytest
from registered import WEIGHTS, register
from summaries import Summary
from tiny import save_tiny_model

from lora_core.files import sha256_of_file
from pipelines.errors import RegistryError

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking.registry import download, fetch_champion  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]


def test_champion_is_downloaded(comparison: Summary, runs: Path, tmp_path: Path) -> None:
    name = comparison["name"]
    assert fetch_champion(name, runs, tmp_path) is None
    aliases = register(comparison, runs).aliases
    found = fetch_champion(name, runs, tmp_path)
    assert found is not None
    assert int(found.version) == aliases["champion"]
    assert found.tags["verdict"] == "pass"
    digest = comparison["models"]["rank-16"]["training"]["result"]["saved"]["adapter_sha256"]
    assert found.adapter_sha256 == digest
    assert sha256_of_file(found.folder / WEIGHTS) == digest


def test_champion_is_downloaded_again_only_if_incomplete(
    comparison: Summary, runs: Path, tmp_path: Path
) -> None:
    register(comparison, runs)
    found = fetch_champion(comparison["name"], runs, tmp_path)
    assert found is not None
    weights = found.folder / WEIGHTS
    before = weights.stat().st_mtime_ns
    assert fetch_champion(comparison["name"], runs, tmp_path) == found
    assert weights.stat().st_mtime_ns == before
    weights.write_text("half of i")
    assert fetch_champion(comparison["name"], runs, tmp_path) == found
    assert sha256_of_file(weights) == found.adapter_sha256


def test_champion_with_other_files_is_refused(
    comparison: Summary, runs: Path, tmp_path: Path
) -> None:
    name = comparison["name"]
    version = register(comparison, runs).aliases["champion"]
    client = mlflow.MlflowClient()
    client.set_model_version_tag(name, str(version), "adapter_sha256", "0" * 64)
    with pytest.raises(RegistryError, match="does not contain the adapter of its tag"):
        fetch_champion(name, runs, tmp_path)


def test_stored_weights_are_readable_by_others(comparison: Summary, runs: Path) -> None:
    adapter = Path(comparison["models"]["rank-16"]["training"]["folder"]) / "adapter"
    (adapter / WEIGHTS).chmod(0o600)  # as safetensors writes it
    previous = os.umask(0o027)
    try:
        version = register(comparison, runs).aliases["champion"]
    finally:
        os.umask(previous)
    client = mlflow.MlflowClient()
    source = client.get_model_version_download_uri(comparison["name"], str(version))
    stored = Path(source.removeprefix("file://")) / WEIGHTS
    assert stored.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json", "added.json"])
def test_swapped_file_is_refused(
    comparison: Summary, runs: Path, tmp_path: Path, file: str
) -> None:
    name = f"{comparison['name']}-{file}"
    comparison["recipe"]["registry"]["model"] = name
    comparison |= {"name": name, "key": name.ljust(64, "k")}
    adapter = Path(comparison["models"]["rank-16"]["training"]["folder"]) / "adapter"
    (adapter / "adapter_config.json").write_text("{}")
    registered = register(comparison, runs)
    version = registered.aliases["champion"]
    for uri in (f"models:/{name}@champion", f"models:/{name}/{version}"):
        assert (download(uri, runs, tmp_path / "before") / WEIGHTS).is_file()

    source = mlflow.MlflowClient().get_model_version_download_uri(name, str(version))
    stored = Path(source.removeprefix("file://"))
    (stored / file).write_text("of someone else")
    for uri in (f"models:/{name}@champion", f"models:/{name}/{version}"):
        with pytest.raises(RegistryError, match="were changed after they were registered"):
            download(uri, runs, tmp_path / "after")
    with pytest.raises(RegistryError, match="were changed after they were registered"):
        fetch_champion(name, runs, tmp_path / "champions")


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("models:/{name}@other", "has no alias other"),
        ("models:/{name}/9", "not found"),
        ("models:/{name}", "use models:/NAME@ALIAS"),
        ("models:/{name}/latest", "use models:/NAME@ALIAS"),
    ],
)
def test_address_without_a_version_is_refused(
    comparison: Summary, runs: Path, tmp_path: Path, uri: str, problem: str
) -> None:
    register(comparison, runs)
    with pytest.raises(RegistryError, match=problem):
        download(uri.format(name=comparison["name"]), runs, tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_downloaded_adapter_has_its_card_and_loads_in_peft(
    comparison: Summary, runs: Path, tmp_path: Path
) -> None:
    import torch
    from huggingface_hub import ModelCard
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_core import LoraConfig, inject, load_adapter, save_adapter
    from lora_core.adapter.io import Identity

    base = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",))
    inject(model, config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    training = comparison["models"]["rank-16"]["training"]
    adapter = Path(training["folder"]) / "adapter"
    digest = save_adapter(model, adapter, config, Identity(base=str(base)))
    training["result"]["saved"]["adapter_sha256"] = digest
    saved = {path.name: path.read_bytes() for path in adapter.iterdir()}
    register(comparison, runs)

    uri = f"models:/{comparison['name']}@champion"
    folder = download(uri, runs, tmp_path / "fetched")
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == saved
    assert {name: (folder / name).read_bytes() for name in saved} == saved
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    ids = torch.arange(6)[None]
    ours = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(ours, folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
