"""What the commands of the registry print: a table, or JSON."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from pipelines.console import print_table
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.account_roles import PreparedRoles
from pipelines.tracking.bundle_verification import VerificationReport
from pipelines.tracking.catalog import CatalogEntry, VersionDetails
from pipelines.tracking.cleanup import UnusedVersion
from pipelines.tracking.lineage import DerivedVersion
from pipelines.tracking.move_log import AliasMove, AliasPosition
from pipelines.tracking.signatures import SignedVersion
from pipelines.tracking.version_diff import VersionDiff

if TYPE_CHECKING:  # it loads torch, to verify a base
    from pipelines.tracking.pulled import PulledAdapter

NOTHING = "–"
SHORT = 12
"""Characters of a digest that a table shows."""
MAX_PROBLEMS = 5


def output(value: Values | Sequence[Values], table: Table, *, as_json: bool) -> None:
    """Print a table, or its values as JSON."""
    if not as_json:
        print_table(table)
        return
    plain = value.plain() if isinstance(value, Values) else [one.plain() for one in value]
    typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))


def models_table(entries: Sequence[CatalogEntry]) -> Table:
    """Return the registered names."""
    table = _table("Name", "Versions", "Champion", "Proposed", "Last move")
    for entry in entries:
        champion = entry.champion or NOTHING
        proposed = entry.proposed or NOTHING
        last = NOTHING if entry.last_move is None else _move_text(entry.last_move)
        _add_row(table, entry.name, str(entry.versions), champion, proposed, last)
    return table


def versions_table(versions: Sequence[VersionDetails]) -> Table:
    """Return the versions of a name."""
    table = _table(
        "Version", "Rank", "Verdict", "Gain", "General", "Aliases", "Decision", "Created"
    )
    for version in versions:
        _add_row(
            table,
            version.version,
            _number(version.rank),
            version.verdict or NOTHING,
            _score(version, "task/gain"),
            _score(version, "general/change"),
            ", ".join(version.aliases) or NOTHING,
            version.decision or NOTHING,
            version.created,
        )
    return table


def version_table(version: VersionDetails) -> Table:
    """Return everything about a version."""
    table = _table("Version", f"{version.name}/{version.version}")
    facts = {
        "aliases": ", ".join(version.aliases),
        "decision": version.decision,
        "verdict": version.verdict,
        "reason": version.reason,
        "rank": _number(version.rank),
        "created": version.created,
    }
    lineage = version.lineage.plain()
    fingerprints = lineage.pop("base_fingerprints")
    facts |= {name: str(value) for name, value in lineage.items()}
    facts |= {f"base {kind}": digest for kind, digest in fingerprints.items()}
    facts |= version.digests
    facts |= {name: f"{value:.6g}" for name, value in version.scores.items()}
    for name, fact in facts.items():
        _add_row(table, name, fact or NOTHING)
    return table


def moves_table(moves: Sequence[AliasMove]) -> Table:
    """Return moves of aliases."""
    table = _table("Time", "Alias", "From", "To", "By", "Action", "Verdict", "Gain", "Reason")
    if not moves:
        table.caption = "no alias was moved"
    for move in moves:
        scores = move.scores
        gain = None if scores is None else scores.task_gain
        _add_row(
            table,
            move.time,
            move.alias or NOTHING,
            _position(move.before),
            _position(move.after),
            f"{move.user}\n{move.flow_run}".rstrip(),
            move.action,
            NOTHING if scores is None else scores.verdict,
            NOTHING if gain is None else f"{gain:+.3f}",
            move.reason,
        )
    return table


def diff_table(diff: VersionDiff) -> Table:
    """Return what differs between two versions."""
    first = f"{diff.before.name}/{diff.before.version}"
    second = f"{diff.after.name}/{diff.after.version}"
    table = _table("Part", "Value", first, second)
    for one in diff.differences:
        _add_row(table, one.part, one.name, _cell(one.before), _cell(one.after))
    return table


def pulled_table(pulled: "PulledAdapter") -> Table:
    """Return where an adapter is, and what was verified."""
    lock = pulled.lock
    table = _table("Pulled", f"{lock.name}/{lock.version}")
    facts = {
        "folder": pulled.folder,
        "for": lock.format,
        "aliases": ", ".join(lock.aliases) or NOTHING,
        "digest": lock.adapter_sha256,
        "files": f"{len(lock.files)}, verified" + (", pulled before" if pulled.reused else ""),
        "base": lock.base.id,
        "base on this host": pulled.base or "not found, so its fingerprint is not verified",
    }
    for name, fact in facts.items():
        _add_row(table, name, fact)
    return table


def checks_table(report: VerificationReport) -> Table:
    """Return what was verified of a version."""
    table = _table("Check", "Result", f"{report.name}/{report.version}")
    for check in report.checks:
        details = "\n".join(check.problems[:MAX_PROBLEMS]) or check.skipped
        _add_row(table, check.name, check.status, details)
    return table


def signed_table(signed: SignedVersion) -> Table:
    """Return what was signed."""
    table = _table("Signed", "Digest", "Files")
    name = f"{signed.name}/{signed.version}"
    _add_row(table, name, signed.adapter_sha256[:SHORT], str(signed.files))
    return table


def unused_table(unused: Sequence[UnusedVersion], *, deleted: bool) -> Table:
    """Return versions that can be deleted, or were."""
    table = _table("Deleted" if deleted else "Unused", "Digest", "Why")
    for one in unused:
        _add_row(table, one.version, one.adapter_sha256[:SHORT], one.why)
    return table


def derived_table(versions: Sequence[DerivedVersion]) -> Table:
    """Return the versions that were derived from data or a base."""
    table = _table("Version", "Aliases", "Verdict", "Base", "Data")
    for one in versions:
        name = f"{one.name}/{one.version}"
        aliases = ", ".join(one.aliases) or NOTHING
        _add_row(table, name, aliases, one.verdict, one.base, one.data_digest[:SHORT])
    return table


def roles_table(prepared: PreparedRoles) -> Table:
    """Return what was set up for the roles of a pair of names."""
    table = _table("Roles", prepared.model)
    facts = {
        "candidates": prepared.candidates,
        "experiment": prepared.experiment,
        "promoted files": prepared.releases,
        "passwords": prepared.passwords_file or "no new users",
    }
    facts |= prepared.users
    facts |= dict.fromkeys(prepared.removed, "no role")
    for name, fact in facts.items():
        _add_row(table, name, fact)
    _add_row(table, "changes", "\n".join(prepared.changes) or "none, everything was set up")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table


def _add_row(table: Table, *cells: str) -> None:
    """Add a row of text, in which nothing is markup."""
    table.add_row(*[Text(cell) for cell in cells])


def _move_text(move: AliasMove) -> str:
    what = move.alias or "version"
    return f"{move.time}: {what} {_position(move.before)} → {_position(move.after)}"


def _position(position: AliasPosition | None) -> str:
    return NOTHING if position is None else position.version


def _number(value: int | None) -> str:
    return NOTHING if value is None else str(value)


def _score(version: VersionDetails, name: str) -> str:
    value = version.scores.get(name)
    return NOTHING if value is None else f"{value:+.3f}"


def _cell(value: str | float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.6g}" if isinstance(value, float) else value
