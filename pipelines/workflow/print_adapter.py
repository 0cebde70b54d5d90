"""What the commands `lora adapter …` print: tables, or JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from lora_core.export.conversion_formats import Conversion
from lora_core.inspection.adapter_report import AdapterReport, UpdateGroup
from lora_core.inspection.adapter_verification import Verification
from lora_core.inspection.difference import AdapterDifference
from lora_core.merging.streaming import MergeReport
from lora_core.spectrum.intruders import Intruders
from pipelines.console import print_table
from pipelines.reporting.formats import short_count, short_size

NOTHING = "–"
SHORT = 20
"""Characters of a digest that a table shows."""
Counts = Mapping[str, Intruders]


def print_report(report: AdapterReport, intruders: Counts | None, *, as_json: bool) -> None:
    """Print what an adapter is.

    Args:
        report: of its files.
        intruders: module path → intruder dimensions; None if they were not counted.
        as_json: print one JSON document instead of tables.
    """
    if as_json:
        counts = None
        if intruders is not None:
            counts = {name: asdict(each) for name, each in intruders.items()}
        _print_json({**asdict(report), "intruders": counts})
        return
    print_table(_facts_table(report))
    print_table(_groups_table(report, intruders))
    if intruders is not None:
        typer.echo(_intruders_text(intruders))
    for anomaly in report.anomalies:
        kind = "problem" if anomaly.is_damage else "note"
        typer.echo(f"{kind}: {anomaly.text}")
    if not report.anomalies:
        typer.echo("nothing unusual was found")


def print_conversion(conversion: Conversion) -> None:
    """Print what was converted, and the error of each layer if something was approximated."""
    if conversion.relative_errors:
        table = _table("Module", "Relative error")
        for name in sorted(conversion.relative_errors, key=_in_model_order):
            _add_row(table, name, f"{conversion.relative_errors[name]:.4f}")
        print_table(table)
        typer.echo(f"relative error of all updates together: {conversion.relative_error:.4f}")
    for change in conversion.changes:
        typer.echo(change)
    typer.echo(f"{conversion.destination} is written, sha256 {conversion.sha256}")


def print_difference(difference: AdapterDifference, *, as_json: bool) -> None:
    """Print how two adapters differ."""
    if as_json:
        _print_json(asdict(difference))
        return
    table = _table("Module", "‖A‖", "‖B‖", "‖A − B‖", "Ranks", "Cosine", "Overlap in", "out")
    for row in sorted(difference.updates, key=lambda row: _in_model_order(row.module)):
        _add_row(
            table,
            row.module,
            *(f"{norm:.4g}" for norm in (*row.norms, row.difference)),
            f"{row.ranks[0]}, {row.ranks[1]}",
            *map(_fraction, (row.cosine, row.overlap_right, row.overlap_left)),
        )
    print_table(table)
    first, second = difference.norms
    typer.echo(
        f"all updates: norms {first:.4g} and {second:.4g}, of the difference "
        f"{difference.difference:.4g}, cosine {_fraction(difference.cosine)}"
    )
    changed = [key for key, norm in difference.other_tensors.items() if norm != 0]
    if changed:
        typer.echo(f"{len(changed)} other tensors differ, such as {changed[0]}")
    if difference.same_base is False:
        typer.echo("the adapters name different bases")


def print_merge(report: MergeReport, destination: str) -> None:
    """Print what a merge retained of each update, and what it did not copy."""
    table = _table("Module", "Retained", "Relative error", "Update / weight")
    for name in sorted(report.retention, key=_in_model_order):
        retention = report.retention[name]
        _add_row(
            table,
            name,
            f"{retention.fraction:.4f}",
            f"{retention.relative_error:.2g}",
            f"{retention.relative_size:.2g}",
        )
    print_table(table)
    if report.left_out:
        typer.echo(f"not copied, as they hold other weights: {', '.join(report.left_out)}")
    typer.echo(f"{destination} is written: {', '.join(report.files)}")


def print_verification(verification: Verification, *, as_json: bool) -> None:
    """Print what was verified."""
    if as_json:
        _print_json({"verified": True, **asdict(verification)})
        return
    table = _table("Verified", verification.folder)
    for name in ("files", "values", "base"):
        _add_row(table, name, getattr(verification, name))
    print_table(table)


def print_failure(folder: Path, error: Exception, *, as_json: bool) -> None:
    """Print as JSON why an adapter is not verified; otherwise the command line prints the error."""
    if as_json:
        _print_json({"verified": False, "folder": str(folder), "error": str(error)})


def _in_model_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key of a module path that orders layers by number: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _facts_table(report: AdapterReport) -> Table:
    base = report.base or "not recorded"
    if report.revision:
        base += f" at {report.revision}"
    facts = {
        "type": report.type,
        "base": base,
        "base in training": report.quantization or "not recorded",
        "targets": ", ".join(report.targets),
        "weights": short_count(report.weights),
        "file": short_size(report.file_bytes),
    }
    for kind, digest in report.fingerprints.items():
        facts[f"fingerprint, {kind}"] = f"{digest[:SHORT]}…"
    for kind, number in report.others.items():
        facts[f"also: {kind}"] = f"{number} tensors"
    table = _table("Adapter", report.folder)
    for name, fact in facts.items():
        _add_row(table, name, fact)
    return table


def _groups_table(report: AdapterReport, intruders: Counts | None) -> Table:
    titles = [
        "Target",
        "Layers",
        "out × in",
        "Rank",
        "Alpha",
        "Scale",
        "dtype",
        "‖ΔW‖",
        "eff. rank",
    ]
    if intruders is not None:
        titles.append("Intruders")
    table = _table(*titles)
    for group in report.groups:
        cells = _group_cells(group)
        if intruders is not None:
            cells.append(_counted(group, intruders))
        _add_row(table, *cells)
    return table


def _group_cells(group: UpdateGroup) -> list[str]:
    return [
        group.kind,
        str(group.modules),
        f"{group.shape[0]} × {group.shape[1]}",
        str(group.rank),
        f"{group.alpha:g}",
        f"{group.scale:.4g}",
        group.dtype,
        f"{group.mean_norm:.3g}",
        f"{group.mean_effective_rank:.1f}",
    ]


def _counted(group: UpdateGroup, intruders: Counts) -> str:
    """Return the intruders among the leading directions of the kind's measured layers."""
    found = [each for name, each in intruders.items() if name.rpartition(".")[2] == group.kind]
    if not found:
        return NOTHING
    return f"{sum(each.left for each in found)} of {sum(each.leading for each in found)}"


def _intruders_text(intruders: Counts) -> str:
    left = sum(each.left for each in intruders.values())
    right = sum(each.right for each in intruders.values())
    leading = sum(each.leading for each in intruders.values())
    text = f"intruder dimensions: {left} of {leading} leading directions of the outputs and "
    text += f"{right} of the inputs, in {len(intruders)} merged weights"
    if not all(each.is_exact for each in intruders.values()):
        text += "; large weights are compared with their strongest directions"
    return text


def _table(*titles: str) -> Table:
    """Return an empty table whose first column, and the second of two, are texts."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        is_text = index == 0 or len(titles) == 2
        table.add_column(Text(title), justify="left" if is_text else "right", overflow="fold")
    return table


def _add_row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def _fraction(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
