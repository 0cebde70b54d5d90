"""A screenshot of the report's page, taken by a headless Chromium if one is installed."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def page_rows(page: Path, picture: Path) -> Iterator[dict[str, Any]]:
    """Take the screenshot and yield its size."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        yield {
            "what": "the page's picture: install Chromium",
            "value": 0,
            "unit": "bytes",
            "goal": "> 20000",
            "holds": False,
        }
        return
    picture.parent.mkdir(exist_ok=True)
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1200,5200",
    ]
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", page.resolve().as_uri()],
        check=True,
        capture_output=True,
    )
    size = picture.stat().st_size
    yield {
        "what": f"the page's picture, build/{picture.name}",
        "value": size,
        "unit": "bytes",
        "goal": "> 20000",
        "holds": size > 20_000,
    }
