"""Decisions of people: checked, recorded, and respected by later runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from registered import SmallVersions, copied, register
from summaries import Summary, parsed

from pipelines.errors import RegistryError
from pipelines.reporting.origin import FlowRunReference

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking import cleanup, decisions, registry  # noqa: E402
from pipelines.tracking.catalog import history_of, show_version  # noqa: E402
from pipelines.tracking.move_log import broken_links, read_entries  # noqa: E402
from pipelines.tracking.open_decision import DecisionResult, Grounds  # noqa: E402
from pipelines.tracking.references import Reference  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_store")]
WHY = Grounds("it answers better")
FORCED = Grounds("the other one is broken", force=True)
Decide = Callable[..., DecisionResult]


def moves_of(name: str, runs: Path) -> list[tuple[str, str, str | None, str | None]]:
    """Return action, alias, from and to of every entry of the log."""
    found = []
    for move in history_of(name, runs):
        before = None if move.before is None else move.before.version
        after = None if move.after is None else move.after.version
        found.append((move.action, move.alias, before, after))
    return found


def aliases(name: str) -> dict[str, str]:
    found = mlflow.MlflowClient().get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


def test_every_decision_is_recorded_with_its_reason_and_scores(
    small: SmallVersions, runs: Path
) -> None:
    for content in ("one", "two", "three"):
        small.add("recorded", content)
    for version in ("1", "2", "3"):
        decisions.promote(Reference("recorded", version=version), WHY, runs)
    decisions.rollback("recorded", WHY, runs)
    assert aliases("recorded") == {"champion": "2"}
    decisions.rollback("recorded", WHY, runs)
    assert aliases("recorded") == {"champion": "1"}
    with pytest.raises(RegistryError, match=r"recorded has no version .* each was rolled back"):
        decisions.rollback("recorded", WHY, runs)
    decisions.reject(Reference("recorded", version="3"), WHY, runs)
    decisions.retire(Reference("recorded", alias="champion"), FORCED, runs)
    assert moves_of("recorded", runs) == [
        ("promote", "champion", None, "1"),
        ("promote", "champion", "1", "2"),
        ("promote", "champion", "2", "3"),
        ("rollback", "champion", "3", "2"),
        ("rollback", "champion", "2", "1"),
        ("reject", "", "3", None),
        ("retire", "champion", "1", None),
    ]
    last = history_of("recorded", runs)[-1]
    assert last.reason == FORCED.reason
    assert " on " in last.user
    assert last.scores is not None
    assert (last.scores.verdict, last.scores.task_gain) == ("pass", 0.5)


def test_log_of_an_earlier_release_is_continued(small: SmallVersions, runs: Path) -> None:
    small.add("earlier", "one")
    small.add("earlier", "two")
    client = mlflow.MlflowClient()
    position = {"version": "1", "adapter_sha256": "ab"}
    entry = {"alias": "champion", "before": None, "after": position, "time": "2026-01-01T00:00:00"}
    entry |= {"user": "someone", "flow_run": "", "reason": "it passes"}
    for number in range(2):
        client.set_registered_model_tag("earlier", f"lora.move.{number:08d}", json.dumps(entry))
    decisions.promote(Reference("earlier", version="2"), WHY, runs)
    tags = client.get_registered_model("earlier").tags
    entries = read_entries("earlier", tags)
    assert [one.move.action for one in entries] == ["run", "run", "promote"]
    assert broken_links(tags, entries) == []
    changed = tags | {"lora.move.00000001": json.dumps(entry | {"reason": "other"})}
    assert broken_links(changed, read_entries("earlier", changed)) == [
        "entry 2 does not follow the one before it"
    ]


def test_run_is_recorded_with_its_flow_run(comparison: Summary, runs: Path) -> None:
    name = comparison["name"]
    flow_run = FlowRunReference("0198-flow")
    versions = registry.register(parsed(comparison), runs, [], "", flow_run).versions
    assert [move.flow_run for move in history_of(name, runs)] == ["0198-flow"] * 2
    reference = Reference(name, version=str(versions["rank-16"]))
    assert show_version(reference, runs).lineage.flow_run == "0198-flow"
    decisions.retire(reference, FORCED, runs)
    assert history_of(name, runs)[-1].flow_run == ""


def test_promoting_the_champion_changes_nothing(small: SmallVersions, runs: Path) -> None:
    small.add("twice", "one")
    reference = Reference("twice", version="1")
    assert len(decisions.promote(reference, WHY, runs).moves) == 1
    assert decisions.promote(reference, WHY, runs).moves == ()


@pytest.mark.parametrize(
    ("tags", "problem"),
    [
        ({"verdict": "reject", "reason": "forgot much"}, r"is 'reject' .forgot much.; promote a"),
        ({"verdict": "can't tell"}, 'is "can\'t tell"'),
        ({"retired": "true"}, "was retired or rejected"),
        ({"rejected": "true"}, "was retired or rejected"),
        ({"compared_champion": "none"}, "was not compared with the champion, version 1"),
    ],
)
def test_unsuitable_version_is_promoted_only_by_force(
    small: SmallVersions, runs: Path, tags: dict[str, str], problem: str
) -> None:
    name = "unsuitable-" + next(iter(tags.values())).replace(" ", "-").replace("'", "")
    name += next(iter(tags))
    small.add(name, "one", comparison="first")
    decisions.promote(Reference(name, version="1"), WHY, runs)
    small.add(name, "two", **tags)
    reference = Reference(name, version="2")
    with pytest.raises(RegistryError, match=problem):
        decisions.promote(reference, WHY, runs)
    assert aliases(name) == {"champion": "1"}
    decisions.promote(reference, FORCED, runs)
    assert aliases(name) == {"champion": "2"}
    decisions.promote(reference, Grounds("once more", force=True), runs)


def test_changed_file_is_not_promoted(small: SmallVersions, runs: Path) -> None:
    small.add("changed", "one")
    small.add("changed", "two")
    for version in ("1", "2"):
        decisions.promote(Reference("changed", version=version), WHY, runs)
    source = mlflow.MlflowClient().get_model_version_download_uri("changed", "1")
    Path(source.removeprefix("file://"), "adapter_model.safetensors").write_text("swapped")
    with pytest.raises(RegistryError, match="were changed after they were registered"):
        decisions.promote(Reference("changed", version="1"), FORCED, runs)
    with pytest.raises(RegistryError, match="were changed after they were registered"):
        decisions.rollback("changed", WHY, runs)
    assert aliases("changed") == {"champion": "2"}


@pytest.mark.parametrize("decide", [decisions.reject, decisions.retire])
def test_champion_is_withdrawn_only_by_force(
    small: SmallVersions, runs: Path, decide: Decide
) -> None:
    name = f"withdrawn-{decide.__name__}"
    small.add(name, "one")
    decisions.promote(Reference(name, version="1"), WHY, runs)
    with pytest.raises(RegistryError, match=r"is the champion of .* roll back first"):
        decide(Reference(name, version="1"), WHY, runs)
    decide(Reference(name, version="1"), FORCED, runs)
    assert aliases(name) == {}


@pytest.mark.parametrize("reason", ["", "  ", "x" * 501])
def test_decision_needs_a_reason(reason: str) -> None:
    with pytest.raises(RegistryError, match="state with --reason why"):
        Grounds(reason)


@pytest.mark.parametrize("alias", ["latest", "v1", "7", "a b", "a/b", "", "a" * 256])
def test_alias_that_mlflow_cannot_hold_is_refused(runs: Path, alias: str) -> None:
    with pytest.raises(RegistryError, match="choose another"):
        decisions.promote(Reference("any", version="1"), WHY, runs, alias=alias)


@pytest.mark.parametrize("decide", [decisions.reject, decisions.retire, decisions.rollback])
def test_runs_respect_decisions(comparison: Summary, runs: Path, decide: Decide) -> None:
    name = f"respected-{decide.__name__}"
    comparison = copied(comparison) | {"name": name, "key": name.ljust(64, "k")}
    comparison["recipe"]["registry"]["model"] = name
    first = register(comparison, runs)
    champion = str(first.aliases["champion"])
    if decide is decisions.rollback:
        decisions.promote(Reference(name, version="1"), FORCED, runs)
        decisions.promote(Reference(name, version=champion), FORCED, runs)
        decisions.rollback(name, WHY, runs)
    else:
        decide(Reference(name, version=champion), FORCED, runs)
    before = aliases(name)
    assert "champion" not in register(comparison, runs).aliases
    assert aliases(name) == before


def test_proposal_waits_for_a_decision(comparison: Summary, runs: Path) -> None:
    name = comparison["name"]
    comparison["recipe"]["registry"]["promote"] = "propose"
    version = str(register(comparison, runs).aliases["proposed"])
    assert aliases(name) == {"candidate": version, "proposed": version}
    decisions.promote(Reference(name, alias="proposed"), WHY, runs)
    assert aliases(name) == {"candidate": version, "champion": version}
    # neither the champion nor a rejected adapter is proposed again
    assert "proposed" not in register(comparison, runs).aliases
    decisions.reject(Reference(name, version=version), FORCED, runs)
    assert register(comparison, runs).aliases == {}


def test_unused_versions_are_deleted_and_stay_deleted(small: SmallVersions, runs: Path) -> None:
    for content in ("one", "two", "three", "four", "five"):
        small.add("unused", content)
    for version in ("2", "3", "4"):
        decisions.promote(Reference("unused", version=version), WHY, runs)
    decisions.retire(Reference("unused", version="5"), WHY, runs)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("unused", "shadow", "1")
    client.set_model_version_tag("unused", "1", "retired", "true")
    listed = {one.version: one.why for one in cleanup.unused_versions("unused", runs)}
    # 1 has an alias, 3 is where a rollback goes, 4 is the champion
    assert listed == {"2": "superseded by version 4, the champion", "5": "retired"}
    assert len(client.search_model_versions("name = 'unused'")) == 5
    cleanup.delete_unused("unused", runs)
    left = {str(one.version) for one in client.search_model_versions("name = 'unused'")}
    assert left == {"1", "3", "4"}
    assert moves_of("unused", runs)[-2:] == [("delete", "", "2", None), ("delete", "", "5", None)]
    decisions.rollback("unused", WHY, runs)
    assert aliases("unused")["champion"] == "3"


def test_version_for_a_rollback_is_kept_even_if_a_later_one_is_rejected(
    small: SmallVersions, runs: Path
) -> None:
    for version, content in enumerate(("one", "two", "three"), start=1):
        small.add("usable", content)
        decisions.promote(Reference("usable", version=str(version)), WHY, runs)
    decisions.reject(Reference("usable", version="2"), WHY, runs)
    assert [one.version for one in cleanup.delete_unused("usable", runs)] == ["2"]
    decisions.rollback("usable", WHY, runs)
    assert aliases("usable") == {"champion": "1"}
