"""Trainer, promoter and reader on an MLflow server with accounts: what each may and may not do."""

import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from consistent_comparison import consistent
from mlflow_accounts import (
    ADMIN,
    ADMIN_PASSWORD,
    SERVER_OPTIONS,
    logged_in,
    read_passwords,
    server_environment,
)
from registered import WEIGHTS, register
from summaries import Summary

from lora_core.files import sha256_of_file
from pipelines.errors import PipelineError, RegistryError

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking.account_roles import RolePlan, set_up_roles  # noqa: E402
from pipelines.tracking.bundle_verification import verify_version  # noqa: E402
from pipelines.tracking.catalog import history_of, show_version  # noqa: E402
from pipelines.tracking.decisions import reject, rollback  # noqa: E402
from pipelines.tracking.open_decision import Grounds  # noqa: E402
from pipelines.tracking.pulled import PullRequest, pull  # noqa: E402
from pipelines.tracking.references import Reference  # noqa: E402
from pipelines.tracking.registry import fetch_champion  # noqa: E402
from pipelines.tracking.releases import promote_candidate  # noqa: E402

pytestmark = pytest.mark.server
NAME = "tickets"
CANDIDATES = "tickets-candidates"
PROPOSED = Reference(CANDIDATES, alias="proposed")
CHAMPION = Reference(NAME, alias="champion")
GROUNDS = Grounds("reviewed")
USERS = {"ann": "trainer", "bob": "promoter", "carl": "reader"}


@dataclass(frozen=True)
class Team:
    """A server with the three users, and a proposed candidate."""

    address: str
    runs: Path
    summary: Summary
    plan: RolePlan
    passwords: dict[str, str]

    def acting(self, user: str) -> AbstractContextManager[None]:
        return logged_in(user, self.passwords[user])


def candidates_summary(folder: Path) -> Summary:
    """Return a comparison of a recipe that registers in CANDIDATES."""
    summary = consistent(folder, NAME)
    summary["recipe"]["registry"] = {"model": CANDIDATES}
    return summary


@pytest.fixture(scope="module")
def team(
    start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Team]:
    pytest.importorskip("flask_wtf", reason="MLflow's accounts need mlflow[auth]")
    folder = tmp_path_factory.mktemp("team")
    address = start_server(*SERVER_OPTIONS, environment=server_environment(folder))
    summary = candidates_summary(folder)
    summary["registered_champion"] |= {"version": "1"}
    plan = RolePlan(CANDIDATES, summary["name"], users=USERS)
    passwords = folder / "passwords"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", address)
        with logged_in(ADMIN, ADMIN_PASSWORD):
            set_up_roles(plan, passwords, folder)
        assert stat.S_IMODE(passwords.stat().st_mode) == 0o600
        found = read_passwords(passwords) | {ADMIN: ADMIN_PASSWORD}
        team = Team(address, folder, summary, plan, found)
        with team.acting("ann"):
            assert register(summary, folder).aliases == {"candidate": 1, "proposed": 1}
        yield team


@pytest.fixture(scope="module")
def promoted(team: Team) -> str:
    """The version of the copy that the promoter made."""
    with team.acting("bob"):
        return promote_candidate(PROPOSED, GROUNDS, team.runs).version


def test_setup_can_be_repeated(team: Team) -> None:
    with team.acting(ADMIN):
        assert set_up_roles(team.plan, None, team.runs).changes == ()


def test_roles_of_one_user_exclude_each_other(team: Team) -> None:
    with team.acting(ADMIN):
        with pytest.raises(RegistryError, match="'ann' is trainer of tickets-candidates, and a"):
            set_up_roles(replace(team.plan, users={"ann": "promoter"}), None, team.runs)
        with pytest.raises(RegistryError, match="'admin' is an administrator"):
            set_up_roles(replace(team.plan, users={ADMIN: "reader"}), None, team.runs)
        with pytest.raises(RegistryError, match="no user dora; name a new file with --passwords"):
            set_up_roles(replace(team.plan, users={"dora": "reader"}), None, team.runs)
    with pytest.raises(PipelineError, match="use a name that ends in '-candidates'"):
        replace(team.plan, candidates=NAME)
    with team.acting("ann"), pytest.raises(RegistryError, match="the user 'ann' has no MANAGE"):
        set_up_roles(team.plan, None, team.runs)


def test_permission_beyond_the_role_is_refused(team: Team) -> None:
    from pipelines.tracking.accounts import Accounts

    accounts = Accounts(team.address)
    body = {"username": "carl", "resource_type": "registered_model", "resource_id": NAME}
    with team.acting(ADMIN):
        path = "/api/3.0/mlflow/users/permissions/"
        accounts._send("POST", f"{path}grant", **body, permission="EDIT")
        expected = "'carl' has the permission EDIT on the registered_model tickets, and a reader"
        with pytest.raises(RegistryError, match=expected):
            set_up_roles(team.plan, None, team.runs)
        accounts._send("POST", f"{path}revoke", **body)


def test_role_can_be_given_and_taken(team: Team, tmp_path: Path) -> None:
    new = replace(team.plan, users={"emma": "reader"})
    with team.acting(ADMIN):
        created = set_up_roles(new, tmp_path / "passwords", team.runs)
        assert created.changes == ("created the user emma", "gave emma the role tickets:reader")
        taken = replace(team.plan, users={}, removed=("emma",))
        assert set_up_roles(taken, None, team.runs).changes == (
            "took the role tickets:reader from emma",
        )
    password = read_passwords(tmp_path / "passwords")["emma"]
    expected = "the user 'emma' has no READ access"
    with logged_in("emma", password), pytest.raises(RegistryError, match=expected):
        show_version(CHAMPION, team.runs)


def upload(client: Any, team: Team, name: str) -> None:
    """Replace the weights of a version's files."""
    with logged_in(ADMIN, ADMIN_PASSWORD):
        version = client.get_model_version(name, "1")
    client.log_text(version.run_id, "other weights", f"adapter/{WEIGHTS}")


def change(client: Any, team: Team, name: str, action: str) -> None:
    """Try to change a registered model or a version."""
    actions = {
        "alias": lambda: client.set_registered_model_alias(name, "champion", "1"),
        "no alias": lambda: client.delete_registered_model_alias(name, "champion"),
        "tag": lambda: client.set_registered_model_tag(name, "lora.log", "0"),
        "version tag": lambda: client.set_model_version_tag(name, "1", "verdict", "pass"),
        "version": lambda: client.create_model_version(name, f"models:/{CANDIDATES}/1"),
        "rename": lambda: client.rename_registered_model(name, "taken"),
        "delete version": lambda: client.delete_model_version(name, "1"),
        "delete": lambda: client.delete_registered_model(name),
        "files": lambda: upload(client, team, name),
    }
    actions[action]()


ACTIONS = (
    "alias",
    "no alias",
    "tag",
    "version tag",
    "version",
    "rename",
    "delete version",
    "delete",
    "files",
)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(("user", "name"), [("ann", NAME), ("carl", NAME), ("carl", CANDIDATES)])
def test_forbidden_changes_are_refused(
    team: Team, promoted: str, user: str, name: str, action: str
) -> None:
    client = mlflow.MlflowClient()
    with team.acting(user), pytest.raises(Exception, match=r"403|Permission denied"):
        change(client, team, name, action)


def test_forbidden_commands_name_user_permission_and_object(team: Team, promoted: str) -> None:
    runs = team.runs
    on_model = f"has no EDIT access to the registered model {NAME} .403."
    with team.acting("ann"):
        with pytest.raises(RegistryError, match=f"'ann' {on_model}"):
            promote_candidate(Reference(CANDIDATES, version="1"), GROUNDS, runs)
        with pytest.raises(RegistryError, match=f"'ann' {on_model}"):
            reject(CHAMPION, GROUNDS, runs)
    with team.acting("bob"), pytest.raises(RegistryError, match="'bob' has no EDIT access to the"):
        register(team.summary, runs)  # into the trainers' experiment
    with team.acting("carl"):
        with pytest.raises(RegistryError, match="'carl' has no READ access to the registered mod"):
            show_version(Reference(CANDIDATES, version="1"), runs)
        with pytest.raises(RegistryError, match="'carl' has no EDIT access to the experiment"):
            register(team.summary, runs)


def test_copy_is_verified_logged_and_has_its_own_files(team: Team, promoted: str) -> None:
    saved = team.summary["models"]["rank-16"]["training"]["result"]["saved"]
    with team.acting("carl"):
        details = show_version(CHAMPION, team.runs)
        report = verify_version(CHAMPION, team.runs)
        [move] = history_of(NAME, team.runs)
    assert [(check.name, check.status) for check in report.checks if check.status != "ok"] == []
    assert report.adapter_sha256 == saved["adapter_sha256"]
    assert (details.version, details.aliases, details.verdict) == (promoted, ("champion",), "pass")
    assert details.scores["task/gain"] == pytest.approx(0.8, abs=0.1)
    assert (move.action, move.alias, move.reason) == ("promote", "champion", "reviewed")
    assert move.user.startswith("bob on ")
    with team.acting("ann"):
        candidate = show_version(Reference(CANDIDATES, version="1"), team.runs)
        assert candidate.aliases == ("candidate",)
        assert history_of(CANDIDATES, team.runs)[-1].alias == "proposed"
        assert candidate.lineage.run != details.lineage.run
        assert show_version(CHAMPION, team.runs).lineage.report == candidate.lineage.report != ""


def test_reader_of_the_model_alone_pulls_the_champion(
    team: Team, promoted: str, tmp_path: Path
) -> None:
    request = PullRequest(NAME, tmp_path, "peft", lambda base: None)
    with team.acting("carl"):
        folder = Path(pull(request, team.runs).folder)
    saved = team.summary["models"]["rank-16"]["training"]["result"]["saved"]
    assert sha256_of_file(folder / WEIGHTS) == saved["adapter_sha256"]
    card = (folder / "README.md").read_text()
    assert f"models:/{NAME}/{promoted}" in card
    assert CANDIDATES not in card


def test_later_runs_change_neither_the_copy_nor_the_decision(
    team: Team, promoted: str, tmp_path: Path
) -> None:
    with team.acting("bob"):  # again: the same version
        assert promote_candidate(Reference(CANDIDATES, version="1"), GROUNDS, team.runs).moves == ()
    later = candidates_summary(tmp_path) | {"key": "later".ljust(64, "k")}
    with team.acting("ann"):
        assert "proposed" not in register(later, team.runs).aliases  # it is the champion
        champion = fetch_champion(CANDIDATES, team.runs, tmp_path)
        assert champion is not None
        assert champion.version == promoted
        upload(mlflow.MlflowClient(), team, CANDIDATES)
    with team.acting("carl"):
        assert verify_version(CHAMPION, team.runs).is_intact
    with team.acting("bob"):
        with pytest.raises(RegistryError, match="has no version to which the alias champion can"):
            rollback(NAME, GROUNDS, team.runs)
        reject(CHAMPION, Grounds("it was wrong", force=True), team.runs)
    with team.acting("ann"):
        assert "proposed" not in register(later, team.runs).aliases
