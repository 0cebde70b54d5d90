"""The report in a real browser: metrics equal the summary, no requests, no overlapping text."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser.rendered import BROWSER, NO_BROWSER, Rendered, dump
from summaries import Summary, build, parsed

from pipelines.comparison.resampling import Interval
from pipelines.reporting.formats import ends, signed
from pipelines.reporting.report import write_html

pytestmark = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
WIDTHS = (400, 1200)
FOLD = 800
"""Pixels of a page that a small screen shows at first."""
MEASURE = (Path(__file__).parent / "measure.js").read_text(encoding="utf-8")


def measured(page: str, folder: Path) -> list[dict[str, Any]]:
    """Show a page in frames of several widths and return the measurements of each frame.

    Frames are needed because a browser window cannot be narrower than 500 pixels.
    """
    frames = ""
    for width in WIDTHS:
        style = f"border:0;width:{width}px;height:2000px"
        frames += f'<iframe style="{style}" srcdoc="{html.escape(page)}"></iframe>'
    body = f'{frames}<pre id="found"></pre><script>{MEASURE}</script>'
    host = folder / "host.html"
    host.write_text(f'<!DOCTYPE html><meta charset="utf-8">{body}', encoding="utf-8")
    found = re.search(r'<pre id="found">(.+?)</pre>', dump(host, folder), flags=re.DOTALL)
    assert found is not None, "the measuring script did not finish"
    frames_found: list[dict[str, Any]] = json.loads(html.unescape(found.group(1)))
    return frames_found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of a comparison."""
    path = tmp_path_factory.mktemp("page")
    write_html(parsed(build(path)), path / "report.html")
    return path


@pytest.fixture(scope="module")
def rendered(folder: Path) -> Rendered:
    """The report as loaded by the browser."""
    parser = Rendered()
    parser.feed(dump(folder / "report.html", folder))
    return parser


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    return build(folder)


def test_browser_shows_the_metrics_of_the_summary(summary: Summary, rendered: Rendered) -> None:
    for label, model in summary["models"].items():
        assert (
            float(rendered.metrics[label, "task_loss"]["data-value"])
            == model["scores"]["task_loss"]
        )
        for figure, change in (
            ("change.choice_probability", "choice_probability"),
            ("change.task_loss", "task_gain"),
        ):
            if "change" not in model:
                continue
            shown, expected = rendered.metrics[label, figure], model["change"][change]
            assert {
                end: float(shown[f"data-{key}"])
                for end, key in (("mean", "value"), ("low", "low"), ("high", "high"))
            } == expected
            assert shown["text"].startswith(signed(expected["mean"]) + ends(Interval(**expected)))
        if "judgment" in model:
            status = model["judgment"]["verdict"]["status"]
            assert rendered.metrics[label, "verdict"]["text"] == status


def test_browser_shows_every_point_of_the_frontier(summary: Summary, rendered: Rendered) -> None:
    for row in summary["frontier"]:
        for figure in ("gain", "general"):
            shown = rendered.metrics[row["label"], figure]
            assert float(shown["data-value"]) == row[figure]["mean"]
            assert shown["text"].strip() == signed(row[figure]["mean"]) + ends(
                Interval(**row[figure])
            )


def test_page_makes_no_requests(folder: Path, rendered: Rendered) -> None:
    assert rendered.loads and all(link.startswith("#") for link in rendered.loads)
    assert all(
        frame["requested"] == []
        for frame in measured((folder / "report.html").read_text(encoding="utf-8"), folder)
    )


def test_no_text_overflows_on_a_phone_or_a_desktop(folder: Path) -> None:
    frames = measured((folder / "report.html").read_text(encoding="utf-8"), folder)
    assert [frame["width"] for frame in frames] == list(WIDTHS)
    for frame in frames:
        assert frame["texts"] > 500
        assert frame["page_width"] == frame["width"]
        assert frame["overflowing"] == []
        assert frame["colliding"] == []


def test_rank_gain_change_and_verdict_are_visible_on_a_phone(folder: Path) -> None:
    phone, desktop = measured((folder / "report.html").read_text(encoding="utf-8"), folder)
    assert phone["models"]["columns"] == ["Model", "Task gain", "General change", "Verdict"]
    assert phone["models"]["hidden_pixels"] == 0
    assert len(desktop["models"]["columns"]) == 9


def test_the_first_rows_are_above_the_fold(folder: Path) -> None:
    for frame in measured((folder / "report.html").read_text(encoding="utf-8"), folder):
        assert max(frame["models"]["first_rows"]) < FOLD


def test_all_numbers_have_the_same_minus_sign(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    without_code = re.sub(r"<(style|pre|code)\b.*?</\1>", "", page, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", "|", without_code)
    assert text.count("\N{MINUS SIGN}") > 50
    assert re.findall(r"(?<![\w.])-\d[\d.]*", text) == []


def test_measuring_script_detects_each_defect(folder: Path) -> None:
    wide = '<p style="white-space: nowrap">' + "word " * 60 + "</p>"
    cell = (
        '<div class="scroll"><table style="table-layout: fixed; width: 60px"><tr>'
        '<td style="white-space: nowrap">' + "cell " * 9
    )
    labels = (
        '<svg width="90" height="40"><text x="5" y="20">one</text><text x="9" y="20">two</text>'
        '<text x="80" y="20">far out</text></svg>'
    )
    image = '<img src="http://127.0.0.1:9/missing.png">'
    narrow, _ = measured(
        f"<!DOCTYPE html><body>{wide}{labels}{image}{cell}</td></tr></table></div>", folder
    )
    assert [text[:7] for text in narrow["overflowing"]] == ["word wo", "far out", "cell ce"]
    assert narrow["colliding"] == ["one / two"]
    assert narrow["page_width"] > narrow["width"]
    assert [name.rpartition("/")[2] for name in narrow["requested"]] == ["missing.png"]
