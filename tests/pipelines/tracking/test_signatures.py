"""A version is signed with an offline key, and its ML-BOM says what it was made from."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from consistent_comparison import consistent
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from registered import configure_store, register
from typer.testing import CliRunner

mlflow = pytest.importorskip("mlflow")
from lora_core.files import sha256_of_file  # noqa: E402
from pipelines.cli import app  # noqa: E402
from pipelines.errors import RegistryError  # noqa: E402
from pipelines.tracking import decisions  # noqa: E402
from pipelines.tracking.bill_of_materials import (  # noqa: E402
    BILL_OF_MATERIALS,
    bill_of_materials,
)
from pipelines.tracking.bundle_verification import (  # noqa: E402
    VersionBundle,
    download_bundle,
    verify_bundle,
)
from pipelines.tracking.open_decision import Grounds  # noqa: E402
from pipelines.tracking.references import Reference  # noqa: E402
from pipelines.tracking.signatures import check_signature, sign_version  # noqa: E402
from pipelines.tracking.tag_names import stored_name  # noqa: E402

pytestmark = pytest.mark.server
NAME = "signed"
CHAMPION = Reference(NAME, alias="champion")
SIDECAR = {
    "adapter_sha256": "12" * 32,
    "base": "org/base",
    "revision": "main",
    "base_digests": {"dense": "34" * 32},
    "lineage": {"data_digest": "56" * 32, "quantization": "nf4"},
}


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Make keys with openssl, as a user does; return the private and the public one."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(make, check=True, capture_output=True)
    show = ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)]
    subprocess.run(show, check=True, capture_output=True)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return key_pair(tmp_path_factory.mktemp("keys"), "own")


@pytest.fixture(scope="module")
def registered(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Register a champion; return the folder of runs."""
    summary = consistent(tmp_path_factory.mktemp("signed"), NAME)
    summary["recipe"]["registry"]["promote"] = "propose"
    summary["registered_champion"] |= {"version": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        configure_store(runs)
        register(summary, runs)
        decisions.promote(Reference(NAME, alias="proposed"), Grounds("it passes"), runs)
        yield runs


@pytest.fixture
def signed(registered: Path, keys: tuple[Path, Path], tmp_path: Path) -> VersionBundle:
    """Sign the champion, and download it."""
    done = sign_version(CHAMPION, keys[0], registered)
    assert (done.name, done.files) == (NAME, 3)
    return download_bundle(mlflow.MlflowClient(), CHAMPION, tmp_path / "download")


def test_a_signed_version_is_intact_for_its_key_alone(
    signed: VersionBundle, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    assert check_signature(signed, keys[1]).status == "ok"
    assert all(not check.problems for check in verify_bundle(signed).checks)
    _, other = key_pair(tmp_path, "other")
    [problem] = check_signature(signed, other).problems
    assert problem.startswith("no signature of these files by other.pub")


def test_a_file_that_was_changed_with_its_tags_does_not_have_the_signature(
    signed: VersionBundle, keys: tuple[Path, Path]
) -> None:
    weights = signed.folder / "adapter_model.safetensors"
    weights.write_text("other weights")
    forged = replace(signed, tags=dict(signed.tags) | {"adapter_sha256": sha256_of_file(weights)})
    [problem] = check_signature(forged, keys[1]).problems
    assert "Signature mismatch" in problem and "adapter_model.safetensors" in problem


def test_a_later_comparison_keeps_the_signature(
    signed: VersionBundle, keys: tuple[Path, Path]
) -> None:
    (signed.folder / "README.md").write_text("another card")
    (signed.folder / "evidence" / "added.json").write_text("{}")
    assert check_signature(signed, keys[1]).status == "ok"


def test_no_signature_and_no_key_are_one_sentence(
    signed: VersionBundle, keys: tuple[Path, Path], registered: Path, tmp_path: Path
) -> None:
    unsigned = replace(signed, tags={**signed.tags, "signature": "{}"})
    assert check_signature(unsigned, keys[1]).status == "changed"
    tags = {name: value for name, value in signed.tags.items() if name != "signature"}
    [problem] = check_signature(replace(signed, tags=tags), keys[1]).problems
    assert problem.startswith("the version is not signed")
    with pytest.raises(RegistryError, match="is not a public elliptic-curve key"):
        check_signature(signed, tmp_path / "missing.pub")
    with pytest.raises(RegistryError, match="is not a private elliptic-curve key"):
        sign_version(CHAMPION, keys[1], registered)


def test_a_changed_version_is_not_signed(registered: Path, keys: tuple[Path, Path]) -> None:
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias(NAME, "champion")
    name = stored_name("card_sha256")
    before = version.tags[name]
    client.set_model_version_tag(NAME, version.version, name, "0" * 64)
    with pytest.raises(RegistryError, match="is not signed, because it fails `lora registry"):
        sign_version(CHAMPION, keys[0], registered)
    client.set_model_version_tag(NAME, version.version, name, before)


def test_the_bill_of_materials_is_valid_and_names_base_data_and_files(
    signed: VersionBundle, tmp_path: Path
) -> None:
    stored = (signed.folder / BILL_OF_MATERIALS).read_text()
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text("weights")
    (folder / "adapter_identity.json").write_text(json.dumps(SIDECAR))
    complete = bill_of_materials(folder)
    assert bill_of_materials(folder) == complete
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    for text in (stored, complete):
        assert validator.validate_str(text) is None
    values = json.loads(complete)
    base, data, *files = values["components"]
    assert (base["name"], base["version"]) == ("org/base", "main")
    assert base["properties"] == [{"name": "lora:fingerprint:dense", "value": "34" * 32}]
    assert data["version"] == "56" * 32
    assert {one["name"] for one in files} == {"adapter_model.safetensors", "adapter_identity.json"}


def test_the_commands_sign_and_verify(
    registered: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_RUNS", str(registered))

    def run(*words: str) -> Result:
        return CliRunner().invoke(app, ["registry", *words, "--json"])

    private, public = map(str, keys)
    done = run("sign", f"{NAME}@champion", "--key", private)
    assert json.loads(done.output)["files"] == 3
    verified = run("verify", f"{NAME}@champion", "--public-key", public)
    assert verified.exit_code == 0
    checks = {one["name"]: one["problems"] for one in json.loads(verified.output)["checks"]}
    assert checks["signature"] == []
    _, other = key_pair(tmp_path, "other")
    assert run("verify", f"{NAME}@champion", "--public-key", str(other)).exit_code == 2
