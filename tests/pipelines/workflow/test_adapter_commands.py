"""The `lora adapter` commands, on adapters of PEFT and of this library."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import lora
from peft_adapters import WEIGHTS, Tensors, Values, edit_adapter, save_peft_adapter
from safetensors.torch import load_file
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification
from typer.testing import CliRunner, Result

from lora_core import Identity, LoraConfig, LoraError, inject, lora_layers, merge, save_adapter
from lora_core.adapter.json_files import IDENTITY
from pipelines.cli import app
from pipelines.errors import PipelineError


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT with the base's folder in its config; only read."""
    return save_peft_adapter(tiny_folder, tmp_path_factory.mktemp("adapters") / "theirs")


@pytest.fixture(scope="module")
def ours(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of this library on the same base; only read."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
    inject(model, config, seed=0)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_()
    folder = tmp_path_factory.mktemp("adapters") / "ours"
    save_adapter(model, folder, config, Identity(str(tiny_folder)))
    return folder


def run(*words: object) -> Result:
    """Run `lora adapter …` in this process."""
    return CliRunner().invoke(app, ["adapter", *map(str, words)])


def done(*words: object) -> str:
    """Return what a command printed to stdout."""
    result = run(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def refused(*words: object) -> str:
    """Return the error of a command, which `main` prints in one sentence with status 2."""
    error = run(*words).exception
    assert isinstance(error, LoraError | PipelineError), error
    return str(error)


def test_inspect_prints_ranks_scales_and_intruders(adapter: Path, tiny_folder: Path) -> None:
    text = done("inspect", adapter, "--base", tiny_folder, "--layers", 0)
    assert f"base              {tiny_folder}" in text
    [row] = [line.split() for line in text.splitlines() if line.startswith(" q_proj ")]
    assert row[:9] == ["q_proj", "2", "64", "×", "64", "4", "8", "2", "float32"]
    assert row[-2:] == ["of", "20"]
    assert "in 6 merged weights" in text
    assert "nothing unusual was found" in text


def test_inspect_prints_json(ours: Path, tiny_folder: Path) -> None:
    found = json.loads(done("inspect", ours, "--json", "--base", tiny_folder, "--layers", 1))
    assert found["type"] == "LoRA"
    assert {group["scale"] for group in found["groups"]} == {2.0}
    assert len(found["intruders"]) == 3
    assert all(each["leading"] == 10 for each in found["intruders"].values())
    assert found["fingerprints"].keys() >= {"dense"}


def test_inspect_prints_what_is_unusual(adapter: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors, values: Values) -> None:
        del tensors[min(tensors)]

    text = done("inspect", edit_adapter(adapter, tmp_path / "damaged", damage))
    assert "problem: 1 updates lack A: model.layers.0.mlp.down_proj" in text


def test_diff_prints_each_module_and_the_total(adapter: Path, ours: Path) -> None:
    text = done("diff", adapter, ours)
    rows = [line.split()[0] for line in text.splitlines() if line.startswith(" model.layers")]
    assert len(rows) == 6
    assert "all updates: norms" in text
    found = json.loads(done("diff", adapter, adapter, "--json"))
    assert found["difference"] == 0
    assert found["cosine"] == pytest.approx(1)


def test_convert_writes_each_format(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    done("convert", adapter, tmp_path / "peft", "--to", "peft", "--base", tiny_folder)
    assert load_file(tmp_path / "peft" / WEIGHTS).keys() == load_file(adapter / WEIGHTS).keys()
    assert "max_lora_rank of 8" in done("convert", adapter, tmp_path / "vllm", "--to", "vllm")
    # The base that the adapter names is found.
    done("convert", adapter, tmp_path / "adapter.gguf", "--to", "gguf")
    assert (tmp_path / "adapter.gguf").read_bytes()[:4] == b"GGUF"


def test_convert_prints_the_error_of_each_layer(tiny_folder: Path, tmp_path: Path) -> None:
    save_peft_adapter(tiny_folder, tmp_path / "dora", use_dora=True)
    text = done("convert", tmp_path / "dora", tmp_path / "lora", "--to", "lora", "--rank", 8)
    errors = [line.split()[1] for line in text.splitlines() if line.startswith(" model.layers")]
    assert len(errors) == 6
    assert all(0 < float(error) < 1 for error in errors)
    assert "relative error of all updates together: 0." in text
    assert {group["rank"] for group in report_of(tmp_path / "lora")["groups"]} == {8}


def test_convert_of_plain_lora_reads_no_base(ours: Path, tmp_path: Path) -> None:
    """The base that the sidecar names has other weights, so a check of it would fail."""
    folder = tmp_path / "moved"
    shutil.copytree(ours, folder)
    sidecar = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    sidecar["base"] = str(save_tiny_model(tmp_path / "other", seed=1))
    (folder / IDENTITY).write_text(json.dumps(sidecar), encoding="utf-8")
    assert "was trained on" in refused("verify", folder)
    done("convert", folder, tmp_path / "lora", "--to", "lora", "--rank", 2)
    assert {group["rank"] for group in report_of(tmp_path / "lora")["groups"]} == {2}


def test_convert_renames_paths(adapter: Path, tmp_path: Path) -> None:
    rename = "model.layers=model.language_model.layers"
    done("convert", adapter, tmp_path / "renamed", "--to", "peft", "--rename", rename)
    keys = load_file(tmp_path / "renamed" / WEIGHTS)
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)


def report_of(folder: Path) -> Values:
    found: Values = json.loads(done("inspect", folder, "--json"))
    return found


def test_merge_prints_what_was_retained(ours: Path, tiny_folder: Path, tmp_path: Path) -> None:
    text = done("merge", ours, tiny_folder, tmp_path / "merged", "--dtype", "bfloat16")
    rows = [line.split() for line in text.splitlines() if line.startswith(" model.layers")]
    assert len(rows) == 6
    assert all(0.9 < float(row[1]) < 1.1 for row in rows)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16


def test_merge_knows_the_former_names_in_the_files_of_a_base(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    vit = ViTConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4)
    model = ViTForImageClassification(vit)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj",))
    inject(model, config, seed=0)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_()
    save_adapter(model, tmp_path / "adapter", config, Identity())
    done("merge", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    merge(model)
    merged = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(
        merged.vit.layers[0].attention.q_proj.weight, model.vit.layers[0].attention.q_proj.weight
    )


def test_merge_reads_old_layouts_and_refuses_dora(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    def wrap(tensors: Tensors, values: Values) -> None:
        for key in list(tensors):
            tensors[f"module.{key}"] = tensors.pop(key)

    old = edit_adapter(adapter, tmp_path / "old", wrap)
    done("merge", old, tiny_folder, tmp_path / "of old")
    done("merge", adapter, tiny_folder, tmp_path / "of present")
    files = [tmp_path / name / "model.safetensors" for name in ("of old", "of present")]
    assert files[0].read_bytes() == files[1].read_bytes()
    save_peft_adapter(tiny_folder, tmp_path / "dora", use_dora=True)
    assert "--to lora" in refused("merge", tmp_path / "dora", tiny_folder, tmp_path / "x")


def test_verify_finds_the_base_that_the_adapter_names(ours: Path, adapter: Path) -> None:
    assert "recorded fingerprint" in " ".join(done("verify", ours).split())
    assert "right shapes" in " ".join(done("verify", adapter).split())


def test_verify_reports_a_failure_as_json_too(ours: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors, values: Values) -> None:
        values["lora_alpha"] = 9

    changed = edit_adapter(ours, tmp_path / "changed", change)
    result = run("verify", changed, "--json")
    found = json.loads(result.stdout)
    assert found["verified"] is False
    assert found["error"] == str(result.exception)
    assert "adapter_config.json has sha256" in found["error"]


def test_another_base_is_refused(ours: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    for words in (["verify", ours, "--base", other], ["merge", ours, other, tmp_path / "x"]):
        assert "was trained on" in refused(*words)


def test_invalid_arguments_are_refused(adapter: Path, tmp_path: Path) -> None:
    assert "'nowhere' is not a folder" in refused("inspect", "nowhere")
    assert f"it contains {adapter}" in refused("diff", adapter.parent, adapter)
    assert "must be OLD=NEW" in refused(
        "convert", adapter, tmp_path / "x", "--to", "peft", "--rename", "model"
    )
    assert "'nothing' is neither a folder" in refused("inspect", adapter, "--base", "nothing")


def test_a_damaged_adapter_is_one_sentence_with_status_2(adapter: Path, tmp_path: Path) -> None:
    """In a real process."""

    def damage(tensors: Tensors, values: Values) -> None:
        tensors[min(tensors)] *= torch.nan

    edit_adapter(adapter, tmp_path / "damaged", damage)
    ended = lora(tmp_path, "adapter", "verify", "damaged")
    assert ended.returncode == 2, ended.stderr
    [sentence] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "1 tensors hold values that are not finite" in sentence
    assert "Traceback" not in ended.stderr
