"""The report shows the data: sources, warnings, lengths, and examples by token."""

import re
from pathlib import Path

import pytest
from browser.report_parser import render
from summaries import build

TOKENS = ["<|user|>", "Which <b>box</b>?", "<|assistant|>", "Box 3.", "<|end|>"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text of a page with data of one source."""
    folder: Path = tmp_path_factory.mktemp("page")
    summary = build(folder)
    source = {
        "source": "boxes.csv",
        "format": "csv",
        "rows": 2268,
        "schema_name": "question/answer",
        "used_columns": ["question", "answer"],
        "unused_columns": ["id"],
    }
    preview = {
        "tokens": TOKENS,
        "supervised": [False, False, False, True, True],
        "more_tokens": 7,
    }
    summary["data"] |= {
        "sources": [source],
        "lengths": {"upper": [10, 20], "counts": [30, 60], "median": 12, "longest": 20},
        "previews": [preview],
    }
    summary["data_warnings"] = ["9 rows <are> removed"]
    return render(summary, folder / "report.html")[0]


def section(text: str) -> str:
    found = re.search(r'<section id="data">.*?</section>', text, flags=re.DOTALL)
    assert found is not None
    return found[0]


def test_sources_and_warnings_are_on_the_page(text: str) -> None:
    data = section(text)
    assert "<li>9 rows &lt;are&gt; removed</li>" in data
    row = re.search(r"<tr><th>boxes.csv</th>.*?</tr>", data)
    assert row is not None
    for cell in ("csv", "2,268", "question/answer", "question, answer", "id"):
        assert f"<td>{cell}</td>" in row[0]


def test_supervised_tokens_are_marked_and_escaped(text: str) -> None:
    [tokens] = re.findall(r'<pre class="tokens">(.*?)</pre>', section(text), flags=re.DOTALL)
    assert re.findall(r"<b>(.*?)</b>", tokens) == ["Box 3.", "&lt;|end|&gt;"]
    assert "<span>Which &lt;b&gt;box&lt;/b&gt;?</span>" in tokens
    assert "7 more tokens" in tokens


def test_the_longest_bar_is_the_most_frequent_length(text: str) -> None:
    widths = re.findall(r'<i style="width: ([\d.]+)%"></i><small>(\d+)</small>', section(text))
    assert widths == [("30.0", "30"), ("60.0", "60")]
