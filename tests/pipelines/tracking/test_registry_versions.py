"""Versions of the registered model, in a real SQLite store: nothing twice, no wrong champion."""

from pathlib import Path

import pytest
from registered import WEIGHTS, copied, register, retrained
from summaries import Summary, parsed

from pipelines.errors import RegistryError
from pipelines.tracking.model_card import card

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking.registry import download, fetch_champion  # noqa: E402
from pipelines.tracking.tag_names import tags_of  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]


def champion_of(comparison: Summary, version: int) -> Summary:
    """Return the registered champion in a comparison with this version."""
    found = mlflow.MlflowClient().get_model_version(comparison["name"], str(version))
    return {
        "version": str(version),
        "adapter_sha256": found.tags["adapter_sha256"],
        "objection": None,
        "label": f"champion-{version}",
        "words": "",
    }


def test_registering_again_creates_nothing(comparison: Summary, runs: Path) -> None:
    first = register(comparison, runs)
    assert register(comparison, runs) == first
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{comparison['name']}'")
    assert len(versions) == 2
    # neither the control nor the rejected adapter
    assert set(first.versions) == {"rank-4", "rank-16"}


def test_version_has_the_tags_of_the_last_comparison(comparison: Summary, runs: Path) -> None:
    first = register(comparison, runs)
    verdict = comparison["models"]["rank-4"]["judgment"]["verdict"]
    verdict |= {"status": "pass", "reason": "more items were scored"}
    again = register(comparison | {"key": "b" * 64}, runs)
    assert again.versions == first.versions
    version = str(first.versions["rank-4"])
    tags = tags_of(mlflow.MlflowClient().get_model_version(comparison["name"], version))
    assert tags["verdict"] == "pass"
    assert tags["reason"] == "more items were scored"
    assert tags["comparison"] == "b" * 64


def test_version_has_the_card_of_the_last_comparison(
    comparison: Summary, runs: Path, tmp_path: Path
) -> None:
    register(comparison, runs)
    again = copied(comparison) | {"key": "c" * 64}
    verdict = again["models"]["rank-16"]["judgment"]["verdict"]
    verdict["rules"][0] |= {"reason": "more examples were scored"}
    adapter = Path(comparison["models"]["rank-16"]["training"]["folder"]) / "adapter"
    weights = (adapter / WEIGHTS).read_bytes()
    uri = f"models:/{comparison['name']}@champion"
    for index, one in enumerate((comparison, again)):
        version = register(one, runs).versions["rank-16"]
        folder = download(uri, runs, tmp_path / str(index))
        expected = card(parsed(one), "rank-16", version)
        assert (folder / "README.md").read_text(encoding="utf-8") == expected
        assert (folder / WEIGHTS).read_bytes() == weights
    assert card(parsed(comparison), "rank-16") != card(parsed(again), "rank-16")


def test_undecided_adapter_never_becomes_champion(comparison: Summary, runs: Path) -> None:
    comparison["champion"] = "rank-4"
    expected = 'rank-4 is named champion, but its verdict is "can\'t tell"'
    with pytest.raises(RegistryError, match=expected):
        register(comparison, runs)
    comparison["champion"] = "control"
    with pytest.raises(RegistryError, match="its verdict is None"):
        register(comparison, runs)


def test_comparison_without_a_champion_moves_no_champion(comparison: Summary, runs: Path) -> None:
    champion = register(comparison, runs).aliases["champion"]
    compared = champion_of(comparison, champion)
    second = retrained(comparison, "second", champion=None, registered_champion=compared)
    assert register(second, runs).aliases == {"candidate": 3}
    found = fetch_champion(comparison["name"], runs, runs / "champions")
    assert found is not None
    assert int(found.version) == champion


def test_champion_replaces_only_the_one_it_was_compared_with(
    comparison: Summary, runs: Path
) -> None:
    name = comparison["name"]
    first = register(comparison, runs).aliases["champion"]
    client = mlflow.MlflowClient()
    compared = champion_of(comparison, first)
    next_comparison = retrained(comparison, "second", registered_champion=compared)
    second = register(next_comparison, runs).aliases["champion"]
    assert second != first

    # compared with the first, while the second was registered
    third = retrained(comparison, "third", registered_champion=compared)
    expected = (
        f"has version {second} as its champion, "
        f"but rank-16 was compared with version {first}; run the"
    )
    with pytest.raises(RegistryError, match=expected):
        register(third, runs)
    assert int(client.get_model_version_by_alias(name, "champion").version) == second
    assert int(client.get_model_version_by_alias(name, "candidate").version) == 4
    with pytest.raises(RegistryError, match="was compared with none"):
        register(third | {"registered_champion": None}, runs)

    client.delete_registered_model_alias(name, "champion")
    with pytest.raises(RegistryError, match="has no champion, but"):
        register(third, runs)
    aliases = register(third | {"registered_champion": None}, runs).aliases
    assert aliases == {"candidate": 4, "champion": 4}


def test_recipe_that_does_not_compare_champions_replaces_any(
    comparison: Summary, runs: Path
) -> None:
    register(comparison, runs)
    second = retrained(comparison, "second")
    second["recipe"]["gate"]["min_gain_over_champion"] = None
    assert register(second, runs).aliases["champion"] == 3


def test_champion_from_the_same_comparison_may_be_replaced(comparison: Summary, runs: Path) -> None:
    first = register(comparison, runs)
    comparison["models"]["rank-4"]["judgment"]["verdict"]["status"] = "pass"
    again = register(comparison | {"champion": "rank-4"}, runs)
    assert again.aliases["champion"] == first.versions["rank-4"]
