"""The terminal table and the Markdown table of a comparison."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from browser.report_parser import render
from rich.console import Console
from summaries import UNUSUAL, Summary, dense, no_champion, parsed

from pipelines.reporting.report import markdown_table, terminal_table
from pipelines.reporting.words import recommended_text, registered_text


def printed(summary: Summary, width: int = 100) -> str:
    stream = StringIO()
    console = Console(file=stream, width=width, color_system=None)
    console.print(terminal_table(parsed(summary)))
    return stream.getvalue()


def test_every_model_has_a_row_with_its_verdict_at_100_columns(summary: Summary) -> None:
    text = printed(summary)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    for label, model in summary["models"].items():
        row = next(line for line in text.splitlines() if line.split()[:1] == [label])
        status = model["judgment"]["verdict"]["status"] if "judgment" in model else "–"
        assert status in row


def test_terminal_table_has_units_and_marks(summary: Summary) -> None:
    (row,) = [line for line in printed(summary, 120).splitlines() if "champion" in line]
    for expected in (
        "4.88\u00a0M",
        "19.7\u00a0MB",
        "2.877",
        "+0.723",
        "−0.003 (−0.023, +0.017)",
        "pass, champion",
        "208",
        "2.59\u00a0GB",
    ):
        assert expected in row


def test_control_has_a_file_size(summary: Summary) -> None:
    (row,) = [
        line
        for line in markdown_table(parsed(summary)).splitlines()
        if line.startswith("| control")
    ]
    assert "269\u00a0MB" in row


def test_markdown_rows_match_the_heading(summary: Summary) -> None:
    rows = [line for line in markdown_table(parsed(summary)).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(summary["models"])
    assert len({row.count("|") for row in rows}) == 1
    assert summary["decision"] in markdown_table(parsed(summary))


def test_registered_versions_are_listed(summary: Summary, tmp_path: Path) -> None:
    assert registered_text(parsed(summary)) == ""
    assert registered_text(parsed({**summary, "registered": None})) == ""
    summary["registered"] = {
        "tracking_uri": "sqlite:///mlflow.db",
        "experiment_id": "1",
        "parent_run": "p",
        "runs": {"rank-4": "a", "rank-16": "b"},
        "model": "tiny-model",
        "versions": {"rank-4": 2, "rank-16": 3},
        "aliases": {"candidate": 3, "champion": 3},
    }
    expected = (
        "Registered in tiny-model: rank-4 as version 2, rank-16 as version 3; "
        "candidate is version 3, champion is version 3."
    )
    page, _ = render(summary, tmp_path / "report.html")
    assert expected in markdown_table(parsed(summary))
    assert expected in page
    summary["registered"]["aliases"] = {}
    assert registered_text(parsed(summary)).endswith("version 3; no alias was moved.")
    assert "no alias was moved." in printed(summary)


def test_recommended_rank_and_control_are_named(summary: Summary) -> None:
    for text in (printed(summary, 120), markdown_table(parsed(summary))):
        assert "Recommended: rank-16 is the only one that passes." in text
        assert summary["control"]["words"] in text
    summary["recommended"] = None
    assert recommended_text(parsed(summary)) == ""
    assert "Recommended" not in printed(summary) + markdown_table(parsed(summary))


def test_undecided_adapter_is_named_if_another_is_champion(summary: Summary) -> None:
    expected = "Can't tell for rank-4: forgot little: -0.004."
    assert expected in printed(summary)
    assert expected in markdown_table(parsed(summary))
    no_champion(summary)  # then the decision names all of them
    assert "Can't tell for" not in printed(summary) + markdown_table(parsed(summary))


@pytest.mark.parametrize("alter", UNUSUAL)
def test_unusual_comparison_has_tables(summary: Summary, alter: Callable[[Summary], None]) -> None:
    alter(summary)
    has_quantized_base = alter is not dense
    assert ("base-nf4" in printed(summary)) == has_quantized_base
    assert ("base-nf4" in markdown_table(parsed(summary))) == has_quantized_base
