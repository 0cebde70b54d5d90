"""Three people and one model: train, refuse, propose, promote, pull, roll back, run again."""

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from consistent_comparison import consistent
from mlflow_accounts import ADMIN, logged_in, read_passwords
from parity.rows import Row, at_least, at_most
from registered import register, retrained
from summaries import Summary
from team.team_server import CANDIDATES, NAME, TeamServer, found_secrets
from tiny import save_pairs, save_tiny_model, tiny_recipe

USERS = ("ann=trainer", "bob=promoter", "carl=reader")
REASON = ("--reason", "reviewed")


def holds(what: str, is_true: bool) -> Row:
    """Return a row for something that must be so."""
    return at_least(what, int(is_true), 1)


def write_recipe(folder: Path) -> Path:
    """Write a recipe that registers in CANDIDATES, with its data and its base."""
    recipe = tiny_recipe(
        save_tiny_model(folder / "base"),
        save_pairs(folder / "pairs.jsonl"),
        registry={"model": CANDIDATES, "experiment": "tickets"},
    )
    recipe["name"] = "tickets"
    path = folder / "tickets.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def comparison(folder: Path) -> Summary:
    """Return a comparison, whose rank 16 passes, of a recipe with the same names."""
    summary = consistent(folder, NAME) | {"name": "tickets"}
    summary["recipe"]["registry"] = {"model": CANDIDATES, "experiment": "tickets"}
    summary["registered_champion"] |= {"version": "1"}
    return summary


def set_up(server: TeamServer) -> Row:
    """Create the three users with one command, twice."""
    recipe = str(write_recipe(server.folder))
    file = server.folder / "passwords"
    server.lora(ADMIN, "registry", "roles", recipe, *USERS, "--passwords", str(file))
    server.passwords |= read_passwords(file)
    file.unlink()  # its content is planted everywhere that the commands could show it
    again = server.lora(ADMIN, "registry", "roles", recipe, *USERS, "--json")
    return holds(
        "roles: set up by one command, which can be repeated",
        again.returncode == 0 and json.loads(again.stdout)["changes"] == [],
    )


def training(server: TeamServer) -> Iterator[Row]:
    """Train a tiny adapter as the trainer; its champion is never set by the run."""
    started = time.monotonic()
    ended = server.lora("ann", "run", str(server.folder / "tickets.yaml"))
    yield at_most("trainer: a run that trains and registers", time.monotonic() - started, 900, "s")
    yield holds("trainer: the run ends without an error", ended.returncode == 0)
    shown = server.lora("ann", "registry", "show", CANDIDATES, "--json")
    aliases = [alias for one in json.loads(shown.stdout) for alias in one["aliases"]]
    yield holds("trainer: the run promotes nothing", "champion" not in aliases)


def decisions(server: TeamServer) -> Iterator[Row]:
    """Propose, refuse, promote, pull, roll back, and run again."""
    first = comparison(server.folder / "first")
    proposed = _register(server, first)["proposed"]
    reference = f"{CANDIDATES}/{proposed}"
    refused = server.lora("ann", "registry", "promote", reference, *REASON)
    yield holds(
        "trainer: a promotion is refused with user, permission and object",
        refused.returncode == 2
        and f"'ann' has no EDIT access to the registered model {NAME} (403)" in one_line(refused),
    )
    early = server.lora("carl", "registry", "pull", NAME, "--to", str(server.folder / "pulled"))
    yield holds("reader: nothing can be pulled before a promotion", early.returncode == 2)
    promoted = server.lora("bob", "registry", "promote", f"{CANDIDATES}@proposed", *REASON)
    yield holds("promoter: the proposal becomes the champion", promoted.returncode == 0)
    started = time.monotonic()
    pulled = server.lora(
        "carl", "registry", "pull", NAME, "--to", str(server.folder / "pulled"), "--json"
    )
    yield at_most("reader: a pull, verified", time.monotonic() - started, 120, "s")
    sha256 = first["models"]["rank-16"]["training"]["result"]["saved"]["adapter_sha256"]
    yield holds(
        "reader: the pulled adapter is the one that was trained",
        pulled.returncode == 0 and json.loads(pulled.stdout)["lock"]["adapter_sha256"] == sha256,
    )
    yield from _second_version(server, first)
    verified = server.lora("carl", "registry", "verify", f"{NAME}@champion")
    yield holds("reader: the champion's verdict is recomputed", verified.returncode == 0)


def _second_version(server: TeamServer, first: Summary) -> Iterator[Row]:
    second = retrained(first, "second")
    _register(server, second)
    other = server.lora("bob", "registry", "promote", f"{CANDIDATES}@proposed", *REASON)
    yield holds(
        "promoter: a version that was compared with another champion is refused",
        other.returncode == 2 and "was not compared with the champion" in one_line(other),
    )
    saved = first["models"]["rank-16"]["training"]["result"]["saved"]
    second["registered_champion"]["adapter_sha256"] = saved["adapter_sha256"]
    _register(server, second)
    server.lora("bob", "registry", "promote", f"{CANDIDATES}@proposed", *REASON)
    yield holds("promoter: a better version replaces the champion", _champion(server) == "2")
    server.lora("bob", "registry", "rollback", NAME, "--reason", "worse in use")
    yield holds("promoter: a rollback restores the version before", _champion(server) == "1")
    again = _register(server, second)
    yield holds(
        "trainer: another run neither moves nor proposes the version rolled back",
        "proposed" not in again and _champion(server) == "1",
    )
    history = server.lora("carl", "registry", "history", NAME, "--json")
    actions = [move["action"] for move in json.loads(history.stdout)]
    yield holds("log: every decision, in order", actions == ["promote", "promote", "rollback"])


def secrets(server: TeamServer) -> Row:
    """Count the places where a password of the team is shown or stored."""
    found = found_secrets(server, server.passwords)
    server.transcript += found
    return at_most("secrets: places with a password of the team", len(found), 0)


def one_line(ended: object) -> str:
    """Return what a command printed, without its line breaks."""
    return " ".join(str(getattr(ended, "stderr", "")).split())


def _register(server: TeamServer, summary: Summary) -> dict[str, int]:
    """Register a comparison as the trainer; return the aliases that it moved."""
    with logged_in("ann", server.passwords["ann"]):
        aliases: dict[str, int] = register(summary, server.runs).aliases
    server.transcript.append(f"ann$ (a run registers: {shlex.quote(str(aliases))})\n")
    return aliases


def _champion(server: TeamServer) -> str:
    shown = server.lora("carl", "registry", "show", f"{NAME}@champion", "--json")
    return str(json.loads(shown.stdout)["version"]) if shown.returncode == 0 else ""
