"""What users decide by hand persists: runs neither move aliases back nor register again."""

from pathlib import Path

import pytest
from registered import copied, register, retrained
from summaries import Summary

from pipelines.errors import RegistryError

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking.history import PROPOSE_TAG, History  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]


def digest(comparison: Summary, label: str = "rank-16") -> str:
    """Return the digest of an adapter."""
    return str(comparison["models"][label]["training"]["result"]["saved"]["adapter_sha256"])


def alias_version(name: str, alias: str = "champion") -> int:
    return int(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)


def request(comparison: Summary) -> None:
    """Request that rank 16 is proposed once more."""
    tag = PROPOSE_TAG + digest(comparison)
    mlflow.MlflowClient().set_registered_model_tag(comparison["name"], tag, "true")


def test_alias_moved_by_hand_is_not_moved_back(comparison: Summary, runs: Path) -> None:
    name = comparison["name"]
    first = register(comparison, runs)
    client = mlflow.MlflowClient()
    assert alias_version(name) == first.versions["rank-16"]
    client.set_registered_model_alias(name, "champion", "1")
    for _ in range(2):
        again = register(comparison, runs)
        assert again.versions == first.versions
        assert "champion" not in again.aliases
        assert alias_version(name) == 1

    # a new adapter replaces the user's choice, and the demoted one stays demoted
    second = retrained(comparison, "second", registered_champion=None)
    assert register(second, runs).aliases["champion"] == 3
    register(comparison, runs)
    assert alias_version(name) == 3


def test_alias_removed_by_hand_is_not_restored(comparison: Summary, runs: Path) -> None:
    name = comparison["name"]
    register(comparison, runs)
    for alias in ("candidate", "champion"):
        mlflow.MlflowClient().delete_registered_model_alias(name, alias)
    assert register(comparison, runs).aliases == {}
    assert mlflow.MlflowClient().get_registered_model(name).aliases == {}


def test_alias_moved_back_by_hand_is_accepted(comparison: Summary, runs: Path) -> None:
    name = comparison["name"]
    champion = register(comparison, runs).aliases["champion"]
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, "champion", "1")
    register(comparison, runs)
    client.set_registered_model_alias(name, "champion", str(champion))
    assert register(comparison, runs).aliases["champion"] == champion


def test_deleted_version_is_not_registered_again(comparison: Summary, runs: Path) -> None:
    name = comparison["name"]
    deleted = register(comparison, runs).versions["rank-16"]
    client = mlflow.MlflowClient()
    client.delete_model_version(name, str(deleted))
    again = register(comparison, runs)
    assert again.aliases == {}
    assert set(again.versions) == {"rank-4"}
    assert len(client.search_model_versions(f"name = '{name}'")) == 1


@pytest.mark.parametrize("decision", ["deleted", "demoted", "rejected"])
def test_request_proposes_an_adapter_once_more(
    comparison: Summary, runs: Path, decision: str
) -> None:
    name = f"{comparison['name']}-{decision}"
    comparison = copied(comparison) | {"name": name, "key": name.ljust(64, "k")}
    comparison["recipe"]["registry"]["model"] = name
    version = register(comparison, runs).versions["rank-16"]
    client = mlflow.MlflowClient()
    if decision == "deleted":
        client.delete_model_version(name, str(version))
    elif decision == "rejected":
        client.delete_registered_model_alias(name, "champion")
        client.set_model_version_tag(name, str(version), "rejected", "true")
    else:
        client.set_registered_model_alias(name, "champion", "1")
    request(comparison)
    again = register(comparison, runs)
    assert again.aliases["champion"] == again.versions["rank-16"] == alias_version(name)
    # the request counts once
    client.set_registered_model_alias(name, "champion", "1")
    assert "champion" not in register(comparison, runs).aliases


@pytest.mark.parametrize(("value", "is_retired"), [("true", True), ("false", False)])
def test_retired_version_gets_no_alias(
    comparison: Summary, runs: Path, value: str, is_retired: bool
) -> None:
    name = f"{comparison['name']}-{value}"
    comparison = copied(comparison) | {"name": name, "key": name.ljust(64, "k")}
    comparison["recipe"]["registry"]["model"] = name
    first = register(copied(comparison) | {"champion": None, "candidate": "rank-4"}, runs)
    version = first.versions["rank-16"]
    mlflow.MlflowClient().set_model_version_tag(name, str(version), "retired", value)
    assert ("champion" not in register(comparison, runs).aliases) == is_retired


def test_every_move_is_recorded(comparison: Summary, runs: Path) -> None:
    name = comparison["name"]
    register(comparison, runs)
    register(comparison, runs)  # moves nothing
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, "champion", "1")
    second = retrained(comparison, "second")
    register(second, runs)
    moves = History.read(client, name).moves
    found = []
    for move in moves:
        before = None if move.before is None else move.before.version
        found.append((move.alias, before, move.after.version))
    assert found == [
        ("candidate", None, "2"),
        ("champion", None, "2"),
        ("candidate", "2", "3"),
        ("champion", "1", "3"),
    ]
    assert moves[-1].after.adapter_sha256 == digest(second)
    assert moves[-1].reason == comparison["decision"]
    assert " on " in moves[-1].user


@pytest.mark.parametrize("tag", ["lora.move.00000009", "lora.lease.a"])
def test_tag_that_cannot_be_read_is_refused(comparison: Summary, runs: Path, tag: str) -> None:
    name = f"{comparison['name']}-{tag}"
    comparison["recipe"]["registry"]["model"] = name
    register(comparison, runs)
    mlflow.MlflowClient().set_registered_model_tag(name, tag, "{}")
    with pytest.raises(RegistryError, match=f"the tag {tag} of .* delete the tag"):
        register(comparison, runs)
