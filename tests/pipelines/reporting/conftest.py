"""A comparison and its page."""

from pathlib import Path

import pytest
from browser.report_parser import ReportParser, render
from summaries import Summary, build


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


@pytest.fixture(scope="package")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ReportParser]:
    """Text and parser of the page of the unaltered comparison; do not change them."""
    folder = tmp_path_factory.mktemp("page")
    return render(build(folder), folder / "report.html")
