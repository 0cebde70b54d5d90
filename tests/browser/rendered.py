"""A page as rendered by headless Chromium, and the metrics in it."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NO_BROWSER = "no chromium, chromium-browser or google-chrome is installed"


class Rendered(HTMLParser):
    """Collects each element with a metric, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[tuple[str, str], dict[str, str]] = {}
        self.loads: list[str] = []
        self.open: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.loads += [
            values[name]
            for name in ("src", "href", "xlink:href", "srcset", "action", "poster")
            if name in values
        ]
        if "data-figure" in values:
            owner = values.get("data-model") or values.get("data-point") or ""
            self.metrics[owner, values["data-figure"]] = values
            values["text"] = ""
            self.open.append((tag, values))

    def handle_data(self, data: str) -> None:
        for _, values in self.open:
            values["text"] += data

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][0] == tag:
            self.open.pop()


def dump(page: Path, folder: Path) -> str:
    """Open a page and return the document after loading."""
    assert BROWSER is not None
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=3000",
        "--no-first-run",
    ]
    profile = f"--user-data-dir={folder / 'profile'}"
    ended = subprocess.run(
        [BROWSER, *options, profile, "--window-size=1300,2000", "--dump-dom", page.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    return ended.stdout
