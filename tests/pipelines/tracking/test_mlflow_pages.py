"""MLflow's pages in a real browser: the links open what they name, and show little."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser.rendered import BROWSER, NO_BROWSER
from registered import register, write_adapter, write_rows
from summaries import build

from pipelines.comparison.document import Registered
from pipelines.reporting.origin import FlowRunReference

mlflow = pytest.importorskip("mlflow")

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER),
]
IMAGE = os.environ.get("LORA_TEST_IMAGE", "")
"""File that gets an image of the ranks; LORA_TEST_IMAGE=infra/images/mlflow.png replaces ours."""
MILLISECONDS = 15_000
FLOW_RUN = FlowRunReference("0a1b2c3d" * 4, "http://prefect.example")
SHOWN_TAGS = {"adapter_sha256", "base", "general_change", "rank", "task_gain", "verdict"}


@dataclass(frozen=True)
class Pages:
    """An MLflow server with a comparison."""

    url: str
    folder: Path
    registered: Registered

    def text(self, address: str) -> str:
        """Return the text of a page, with a line for each element."""
        parser = Texts()
        parser.feed(self.browse(address, "--dump-dom"))
        return "\n".join(parser.found)

    def browse(self, address: str, *options: str) -> str:
        """Open a page in the browser until its requests are answered; return what it prints."""
        assert BROWSER is not None
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--virtual-time-budget={MILLISECONDS}", "--no-first-run", *options]
        command += [f"--user-data-dir={self.folder / 'profile'}", "--window-size=1850,620"]
        ended = subprocess.run(
            [*command, address], capture_output=True, encoding="utf-8", timeout=120, check=True
        )
        return ended.stdout


class Texts(HTMLParser):
    """Collects the texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.found.append(data.strip())


@pytest.fixture(scope="module")
def pages(
    start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pages]:
    folder = tmp_path_factory.mktemp("pages")
    url = start_server(environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    summary = build(folder)
    summary["name"] = "tickets"
    for label, model in summary["models"].items():
        training = folder / "train" / label
        if "training" in model:
            rows = [row(step) for step in range(1, 9)]
            model["training"]["folder"] = str(write_rows(training, rows))
        if "judgment" in model:
            saved = model["training"]["result"]["saved"]
            saved["adapter_sha256"] = write_adapter(training / "adapter", label)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", url)
        patch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
        yield Pages(url, folder, register(summary, folder, [], "the note", FLOW_RUN))


def row(step: int) -> dict[str, float]:
    """Return a row of a training that has just ended."""
    seconds = 10.0
    now = time.time() - 600 + step * seconds
    return {"step": step, "time": now, "seconds": seconds, "loss": 3 / step, "eval_loss": 4 / step}


def test_link_opens_the_ranks_with_their_columns(pages: Pages) -> None:
    assert "workflowType=machine_learning" in pages.registered.page
    text = pages.text(pages.registered.page)
    assert "Model training" in text
    lines = text.splitlines()
    assert {"lora.r", "verdict", "task/gain", "general/change"} <= set(lines)
    for shown in ("rank-4", "rank-16", "rank-64", "pass", "reject", "can't tell", "0.723456"):
        assert shown in lines, shown
    assert "base" not in lines
    assert "control" not in lines
    assert "learning_rate" not in lines
    if IMAGE:
        pages.browse(pages.registered.page, f"--screenshot={Path(IMAGE).resolve()}")


def test_version_has_a_headline_five_rows_and_six_tags(pages: Pages) -> None:
    version = pages.registered.versions["rank-16"]
    query = "workflowType=machine_learning"
    text = pages.text(f"{pages.url}/#/models/tiny-model/versions/{version}?{query}")
    lines = text.splitlines()
    assert "rank-16: pass" in lines
    for name in ("Task gain", "General change", "Base", "Data", "Registered by"):
        assert lines.count(name) == 1, name
    assert "all ranks" in lines
    assert re.search(r"ada on \S+, *", text)
    assert "flow run 0a1b2c3d0a1b" in lines
    assert not re.search(r"mlflow\.lora|sha256:", text)
    tags = set(re.findall(r"^[a-z_.0-9]+$", text, re.MULTILINE))
    all_tags = mlflow.MlflowClient().get_model_version("tiny-model", str(version)).tags
    names = {name.removeprefix("mlflow.lora.") for name in all_tags}
    assert (names & tags) - {"comparison"} == SHOWN_TAGS  # the text of a link


def test_run_of_a_rank_has_author_flow_run_and_few_metrics(pages: Pages) -> None:
    run = pages.registered.runs["rank-16"]
    address = f"{pages.url}/#/experiments/{pages.registered.experiment_id}/runs/{run}"
    text = pages.text(f"{address}?workflowType=machine_learning")
    assert re.search(r"^ada on ", text, re.MULTILINE)
    assert "lora.flow_run" in text
    [count] = re.findall(r"Metrics \((\d+)\)", text)
    assert int(count) <= 20


def test_note_of_the_comparison_links_the_ranks(pages: Pages) -> None:
    parent = pages.registered.parent_run
    address = f"{pages.url}/#/experiments/{pages.registered.experiment_id}/runs/{parent}"
    page = pages.browse(f"{address}?workflowType=machine_learning", "--dump-dom")
    links = re.findall(r'href="([^"]*viewStateShareKey=[^"]*)"', page)
    assert len(links) == 1
    assert f"viewStateShareKey={parent}" in links[0]
    assert "http://prefect.example/runs/flow-run/0a1b2c3d" in page
