"""`lora registry` on a real SQLite store: each command in both formats."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from registered import register, retrained, runs_with_store, write_adapter, write_training
from summaries import Summary, build
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.errors import PipelineError, RegistryError

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.server
NAME = "tickets"
SHA256 = 64


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    folder = tmp_path_factory.mktemp("comparison")
    summary = build(folder)
    summary["recipe"]["registry"]["model"] = NAME
    for label, model in summary["models"].items():
        if "training" in model:
            model["training"]["folder"] = str(write_training(folder / label))
        if "judgment" in model:
            saved = model["training"]["result"]["saved"]
            saved["adapter_sha256"] = write_adapter(folder / label / "adapter", label)
    return summary


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory, comparison: Summary) -> Iterator[Path]:
    """A store with versions 1 (can't tell), 2 (passed) and 3 (passed later, on other data)."""
    runs = runs_with_store(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_RUNS", str(runs))
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("COLUMNS", "250")
        register(comparison, runs)
        second = retrained(comparison, "second")
        for label in ("rank-4", "rank-64"):
            del second["models"][label]
        second["data"]["digest"] = "99" * 32
        second["recipe"]["seed"] = 8
        second["recipe"]["gate"]["min_gain_over_champion"] = None
        register(second | {"seed": 8}, runs)
        yield runs


def lora(*arguments: str) -> Result:
    """Run a command of the registry in this process."""
    result = CliRunner().invoke(app, ["registry", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def values(*arguments: str) -> Any:
    """Return what a command prints with --json."""
    return json.loads(lora(*arguments, "--json").stdout)


def test_list_has_each_name_with_its_champion_and_last_move() -> None:
    [entry] = values("list")
    assert (entry["name"], entry["versions"]) == (NAME, 3)
    assert entry["aliases"] == {"candidate": "3", "champion": "3"}
    assert entry["last_move"]["alias"] == "champion"
    assert NAME in lora("list").stdout


def test_show_has_scores_digests_and_lineage() -> None:
    version = values("show", f"{NAME}@champion")
    assert (version["version"], version["rank"], version["verdict"]) == ("3", 16, "pass")
    assert version["aliases"] == ["candidate", "champion"]
    assert version["scores"]["task/gain"] == 0.723456
    assert version["scores"]["benchmark/piqa"] > 0
    assert {len(digest) for digest in version["digests"].values()} == {SHA256}
    lineage = version["lineage"]
    assert (lineage["base"], lineage["data_digest"]) == ("tiny", "99" * 32)
    assert lineage["base_fingerprints"] == {"dense": "12" * 32}
    assert " on " in lineage["author"]
    for address in (lineage["recipe"], lineage["report"]):
        run, _, path = address.removeprefix("runs:/").partition("/")
        assert path in ("recipe.yaml", "report.html")
        tags = mlflow.MlflowClient().get_run(run).data.tags
        assert tags["lora.comparison"] == lineage["comparison"]
    assert "99" * 32 in lora("show", f"{NAME}/3").stdout


def test_show_of_a_name_lists_its_versions() -> None:
    versions = values("show", NAME)
    assert versions == values("show", f"models:/{NAME}")
    assert [version["verdict"] for version in versions] == ["can't tell", "pass", "pass"]
    assert "can't tell" in lora("show", NAME).stdout


def test_history_has_every_move() -> None:
    moves = values("history", NAME)
    found = [(move["alias"], move["after"]["version"], move["action"]) for move in moves]
    assert found == [
        ("candidate", "2", "run"),
        ("champion", "2", "run"),
        ("candidate", "3", "run"),
        ("champion", "3", "run"),
    ]
    assert moves[-1]["scores"] == {
        "verdict": "pass",
        "task_gain": 0.723456,
        "general_change": -0.0031,
    }
    assert moves[-1]["reason"] in lora("history", NAME).stdout


def test_diff_has_what_differs_only() -> None:
    found = values("diff", f"{NAME}/2", f"{NAME}/3")["differences"]
    differences = {(one["part"], one["name"]): (one["before"], one["after"]) for one in found}
    assert differences == {
        ("data", "digest"): ("cd" * 32, "99" * 32),
        ("data", "seed"): ("7", "8"),
        ("config", "recipe.seed"): (7.0, 8.0),
        ("config", "recipe.gate.min_gain_over_champion"): (0.0, None),
    }
    assert "recipe.seed" in lora("diff", f"{NAME}/2", f"{NAME}/3").stdout
    ranks = values("diff", f"{NAME}/1", NAME)["differences"]
    assert {"part": "config", "name": "rank", "before": 4.0, "after": 16.0} in ranks


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--data", "cd" * 32, ["1", "2"]),
        ("--data", "99999999", ["3"]),
        ("--data", "00000000", []),
        ("--base", "tiny", ["1", "2", "3"]),
        ("--base", "1212121212", ["1", "2", "3"]),
        ("--base", "other", []),
    ],
)
def test_derived_versions_are_found(option: str, value: str, expected: list[str]) -> None:
    assert [one["version"] for one in values("derived", option, value)] == expected


def test_pull_prints_the_folder_and_its_lock(tmp_path: Path) -> None:
    pulled = values("pull", NAME, "--to", str(tmp_path))
    assert (pulled["lock"]["name"], pulled["lock"]["version"]) == (NAME, "3")
    folder = Path(pulled["folder"])
    assert folder.parent == tmp_path
    assert (folder / "lora.lock.json").is_file()
    assert "pulled before" in lora("pull", f"{NAME}/3", "--to", str(tmp_path)).stdout


def test_verify_ends_with_status_2_if_something_was_changed() -> None:
    # the scores of this summary are invented, so that they do not follow from its records
    result = CliRunner().invoke(app, ["registry", "verify", NAME, "--json"])
    assert result.exit_code == 2
    checks = {check["name"]: check["problems"] for check in json.loads(result.stdout)["checks"]}
    assert [name for name, problems in checks.items() if problems] == ["verdict"]
    result = CliRunner().invoke(app, ["registry", "verify", NAME])
    assert result.exit_code == 2
    assert "changed" in result.stdout


def test_promotion_is_printed() -> None:
    arguments = ["promote", f"{NAME}/1", "--reason", "a trial", "--alias", "trial"]
    with pytest.raises(RegistryError, match="add --force with your reason"):
        lora(*arguments)
    assert "trial" in lora(*arguments, "--force").stdout
    assert values("show", f"{NAME}@trial")["version"] == "1"
    assert len(values("retire", f"{NAME}/1", "--reason", "ended")["moves"]) == 1


def test_decisions_are_printed() -> None:
    rolled_back = values("rollback", NAME, "--reason", "worse on refunds")
    [move] = rolled_back["moves"]
    assert (move["before"]["version"], move["after"]["version"]) == ("3", "2")
    assert "worse on refunds" in lora("history", NAME).stdout
    rejected = lora("reject", f"{NAME}/3", "--reason", "worse on refunds")
    assert "candidate" in rejected.stdout
    assert values("show", f"{NAME}/3")["decision"] == "rejected"
    assert [one["version"] for one in values("gc", NAME)] == ["1", "3"]
    assert "Deleted" in lora("gc", NAME, "--yes").stdout
    assert [one["version"] for one in values("show", NAME)] == ["2"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["show", f"{NAME}/9"], "lists the versions of tickets"),
        (["show", f"{NAME}@nobody"], "has no alias nobody; its aliases are "),
        (["show", "absent"], "there is no registered model absent"),
        (["show", ""], "'' does not name a registered adapter"),
        (["history", "absent"], "there is no registered model absent"),
        (["history", ""], "there is no registered model ''"),
        (["rollback", "absent", "--reason", "x"], "there is no registered model absent"),
        (["gc", "absent"], "there is no registered model absent"),
        (["gc", "absent", "--yes"], "there is no registered model absent"),
        (["retire", f"{NAME}/x", "--reason", "x"], "does not name a registered adapter"),
        (["derived"], "give either --data DIGEST or --base ID"),
        (["derived", "--data", "abc"], "give at least the first 8"),
    ],
)
def test_mistakes_end_with_one_sentence(arguments: list[str], problem: str) -> None:
    with pytest.raises((PipelineError, RegistryError), match=problem):
        lora(*arguments)
