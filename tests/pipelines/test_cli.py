"""Invalid command lines end with one clear sentence, before any model is loaded."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command
import pytest
import yaml
from tiny import save_pairs, tiny_recipe


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use one folder of runs for all tests, so that they share prepared stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


def lora(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in `folder`, with the runs of all tests."""
    variables = {"LORA_RUNS": os.environ["LORA_RUNS"], "COLUMNS": "80", **environment}
    return command.lora(folder, *arguments, **variables)


def refused(ended: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """Assert one sentence on stderr with these words, exit status 2 and no traceback."""
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    sentences = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, ended.stderr
    for word in words:
        assert word in sentences[0]


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> dict[str, Any]:
    """Return the tiny recipe's plain values."""
    return tiny_recipe(tiny_folder, save_pairs(tmp_path / "pairs.jsonl"))


def write(folder: Path, recipe: dict[str, Any]) -> str:
    """Save a recipe; return its file name."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return "recipe.yaml"


def test_a_misspelt_key(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["trainning"] = recipe.pop("training")
    refused(
        lora(tmp_path, "run", write(tmp_path, recipe)), "'trainning'", "did you mean 'training'?"
    )


def test_rank_zero(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["lora"]["ranks"] = [0]
    refused(
        lora(tmp_path, "run", write(tmp_path, recipe)),
        "lora.ranks.0 = 0",
        "greater than or equal to 1",
    )


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("lora", {"ranks": [2, 512]}, ("rank 512 exceeds", "at most")),
        ("lora", {"target_modules": ["q_prjo"]}, ("'q_prjo'", "matches no module", "q_proj")),
        ("data", {"source": "absent.jsonl"}, ("absent.jsonl", "does not exist")),
        ("data", {"max_tokens": 8}, ("no completion left within max_tokens=8",)),
        ("base_model", {"id": "nobody/no-such-model"}, ("nobody/no-such-model", "HF_HUB_OFFLINE")),
    ],
)
def test_an_impossible_plan_is_refused(
    tmp_path: Path,
    recipe: dict[str, Any],
    section: str,
    changes: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    recipe[section] |= changes
    refused(lora(tmp_path, "plan", write(tmp_path, recipe)), *words)


def test_a_malformed_line_is_named(tmp_path: Path, recipe: dict[str, Any]) -> None:
    with (tmp_path / "pairs.jsonl").open("a") as stream:
        stream.write('{"prompt": "cut sho\n')
    refused(lora(tmp_path, "plan", write(tmp_path, recipe)), "line 61", "pairs.jsonl")


def test_plan_prints_targets_weights_and_sizes(tmp_path: Path, recipe: dict[str, Any]) -> None:
    ended = lora(tmp_path, "plan", write(tmp_path, recipe))
    assert ended.returncode == 0, ended.stderr
    for word in (
        "q_proj",
        "down_proj",
        "rank-2",
        "rank-4",
        "control",
        "optimizer",
        "activations",
        "MB",
        "init kaiming",
    ):
        assert word in ended.stdout
    assert "GPUs" not in ended.stdout


def test_plan_prints_the_shape_rank_scale_and_weights_of_each_target(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    recipe["lora"] |= {
        "init": "pissa",
        "use_rslora": True,
        "target_modules": ["k_proj"],
        "layers_to_transform": [1],
    }
    ended = lora(tmp_path, "plan", write(tmp_path, recipe))
    assert ended.returncode == 0, ended.stderr
    rows = {
        tuple(re.split(r"\s*│\s*", line.strip(" │")))
        for line in ended.stdout.splitlines()
        if "k_proj" in line
    }
    # One layer of 32×64; alpha 8 over √rank; rank · (32 + 64) weights.
    assert rows == {
        ("k_proj", "1", "32 × 64", "2", "5.65685", "192"),
        ("k_proj", "1", "32 × 64", "4", "4", "384"),
    }
    assert "init pissa" in ended.stdout
    assert re.search(r"rank in the file\W+4\W+8\W", ended.stdout)


def test_plan_prints_what_fits_a_gpu(tmp_path: Path, recipe: dict[str, Any]) -> None:
    ended = lora(tmp_path, "plan", write(tmp_path, recipe), "--gpu-gb", "24")
    assert ended.returncode == 0, ended.stderr
    for word in ("24 GB", "qlora", "zero3", "8 GPUs", "✓"):
        assert word in ended.stdout


def test_deploying_without_a_server_names_the_variable_to_set(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    refused(
        lora(tmp_path, "deploy", write(tmp_path, recipe), "--cron", "0 2 * * *"), "PREFECT_API_URL"
    )


def test_a_run_whose_server_is_away_can_be_retried(tmp_path: Path, recipe: dict[str, Any]) -> None:
    ended = lora(tmp_path, "run", write(tmp_path, recipe), PREFECT_API_URL="http://127.0.0.1:9/api")
    assert ended.returncode == 75, ended.stderr
    assert "127.0.0.1:9 does not answer this run" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_comparing_an_unknown_run_lists_the_known_ones(tmp_path: Path) -> None:
    refused(lora(tmp_path, "compare", "nothing"), "'nothing'", "none yet")


def test_an_adapter_that_is_not_a_folder(tmp_path: Path) -> None:
    refused(
        lora(tmp_path, "generate", "--adapter", "nowhere", "hello"), "'nowhere'", "not a folder"
    )


def test_a_full_disk_is_one_sentence_and_keeps_finished_stages(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    """A real file system has room for the base's stage, but not for the data's."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        ended = lora(tmp_path, "plan", write(tmp_path, recipe), LORA_RUNS=str(small))
        refused(ended, "no space left")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_an_address_that_is_none_is_refused_and_not_repeated(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    ended = lora(tmp_path, "run", write(tmp_path, recipe), "--notify", "hooks.example/planted")
    refused(ended, "--notify", "https://")
    assert "planted" not in ended.stdout + ended.stderr
