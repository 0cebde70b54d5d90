"""The report shows the summary's figures unchanged, in three forms, and the page needs nothing beside itself."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.reporting.report import duration, headline, markdown_table, registered_text, scaled, signed, terminal_table, write_html

Summary = dict[str, Any]
BENCHMARKS = ("piqa", "lambada")
HOSTILE = "<script>alert('x')</script>\u2028& <b>bold</b>"


def interval(mean: float, reach: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": round(mean - reach, 6), "high": round(mean + reach, 6)}


def change(gain: float, general: float) -> Summary:
    return {
        "task_gain": interval(gain, 0.1),
        "choice_probability": interval(general),
        "accuracy": interval(0.0),
        "chrf": None,
        "benchmarks": {name: interval(general) for name in BENCHMARKS},
    }


def scores(loss: float) -> Summary:
    figures = {"choice_probability": 0.512345, "accuracy": 0.425, "items": 40.0}
    return {
        "task_loss": loss,
        "chrf": None,
        "rouge_l": None,
        "choice_probability": 0.512345,
        "accuracy": 0.425,
        "margin": 0.04,
        "benchmarks": dict.fromkeys(BENCHMARKS, figures),
    }


def trained(rank: int | None, gain: float, general: float) -> Summary:
    weights, size = (4_884_480, 19_651_476) if rank else (134_515_008, 269_060_552)
    figures = {"trained_weights": weights, "file_bytes": size, "tokens_per_second": 207.5, "peak_memory_bytes": 2_594_799_616}
    return {
        "label": f"rank-{rank}" if rank else "control",
        "rank": rank,
        "figures": figures,
        "scores": scores(3.6 - gain),
        "change": change(gain + 0.4 if rank else gain, general),
        "total": change(gain, general - 0.01),
    }


def adapter(rank: int, gain: float, general: float, status: str) -> Summary:
    rules = [{"name": name, "status": status, "reason": f"{name} at {rank}"} for name in ("learnt enough", "forgot little")]
    verdict = {"status": status, "reason": "as it is", "rules": rules}
    return {**trained(rank, gain, general), "gain_share": interval(gain), "beyond_control": interval(0.0), "verdict": verdict}


def recipe(ranks: list[int]) -> Summary:
    return {
        "name": "tiny_run",
        "base_model": {"id": "tiny", "quantization": "nf4"},
        "data": {"source": "rows.jsonl", "revision": None},
        "lora": {"ranks": ranks},
        "gate": {"min_gain_share": 0.5, "max_general_drop": 0.03, "max_drop_beyond_control": 0.03},
    }


def build(folder: Path) -> Summary:
    """Return a comparison over a 4-bit base whose ranks stand out of order, with its item files in the folder."""
    adapters = [adapter(64, 0.7, -0.06, "reject"), adapter(4, 0.6, -0.004, "can't tell"), adapter(16, 0.723456, -0.0031, "pass")]
    models: Summary = {
        "base": {"scores": scores(3.6)},
        "base-nf4": {"scores": scores(4.0), "change": change(-0.4, -0.01)},
        "control": trained(None, 0.86, -0.001),
        **{model["label"]: model for model in adapters},
    }
    counts = {
        "train_examples": 2201,
        "validation_examples": 64,
        "train_tokens": 263276,
        "supervised_tokens": 28168,
        "cut": 0,
        "left_out": 3,
    }
    return {
        "name": "tiny_run",
        "key": "ab" * 32,
        "seed": 7,
        "recipe": recipe([64, 4, 16]),
        "commit": None,
        "versions": {"torch": "2.13.0"},
        "machine": "2 cores",
        "base": {"id": "tiny", "revision": None, "digests": {"dense": "12" * 32}, "weights": 134_515_008},
        "data": {**counts, "digest": "cd" * 32},
        "items": {label: str(write_items(folder / f"{label}.jsonl", label)) for label in models},
        "stages": [{"name": "data", "seconds": 16.0, "cached": True, "folder": "x"}],
        "seconds": 760.2,
        "models": models,
        "candidate": "rank-16",
        "champion": "rank-16",
        "decision": "rank-16 passes and gains most",
    }


def write_items(path: Path, label: str) -> Path:
    answers = [
        {"kind": "generation", "id": place, "answer": f"{label} {HOSTILE}", "reference": f"r{place}", "chrf": 40.0} for place in range(6)
    ]
    records = [{"kind": "task", "id": 0, "nll": 1.0, "tokens": 2}, *answers]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


class Figures(HTMLParser):
    """Collects the attributes of every cell that names a model, and of every element that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: dict[tuple[str, str], dict[str, str | None]] = {}
        self.tags: set[str] = set()
        self.identifiers: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.identifiers += [values["id"] or ""] if "id" in values else []
        self.links += [values[name] or "" for name in ("src", "href", "xlink:href", "data", "action") if name in values]
        if "data-figure" in values:
            self.cells[values["data-model"] or "", values["data-figure"] or ""] = values


def page_of(summary: Summary, path: Path) -> tuple[str, Figures]:
    write_html(summary, path)
    text = path.read_text(encoding="utf-8")
    figures = Figures()
    figures.feed(text)
    return text, figures


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Figures]:
    """The page of the unaltered comparison; read it only."""
    folder = tmp_path_factory.mktemp("page")
    return page_of(build(folder), folder / "report.html")


def printed(summary: Summary, width: int = 100) -> str:
    stream = StringIO()
    Console(file=stream, width=width, color_system=None).print(terminal_table(summary))
    return stream.getvalue()


def one_rank(summary: Summary) -> None:
    del summary["models"]["rank-4"], summary["models"]["rank-64"]


def dense(summary: Summary) -> None:
    del summary["models"]["base-nf4"]


def no_champion(summary: Summary) -> None:
    summary["champion"] = None


def nothing_kept(summary: Summary) -> None:
    summary["champion"] = summary["candidate"] = None


def no_answers(summary: Summary) -> None:
    path = Path(summary["items"]["rank-4"])
    path.write_text(json.dumps({"kind": "task", "id": 0, "nll": 1.0, "tokens": 2}) + "\n", encoding="utf-8")


def test_every_model_has_a_row_with_its_verdict_at_100_columns(summary: Summary) -> None:
    text = printed(summary)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    for label, model in summary["models"].items():
        row = next(line for line in text.splitlines() if line.split()[:1] == [label])
        assert model.get("verdict", {}).get("status", "–") in row


def test_terminal_units_and_marks(summary: Summary) -> None:
    (row,) = [line for line in printed(summary, 120).splitlines() if "champion" in line]
    for expected in ("4.88\u00a0M", "19.7\u00a0MB", "2.877", "+0.723", "−0.003 (−0.023, +0.017)", "pass, champion", "208", "2.59\u00a0GB"):
        assert expected in row


def test_the_control_has_a_file_as_the_adapters_have(summary: Summary) -> None:
    (row,) = [line for line in markdown_table(summary).splitlines() if line.startswith("| control")]
    assert "269\u00a0MB" in row


def test_markdown_rows_match_the_heading(summary: Summary) -> None:
    rows = [line for line in markdown_table(summary).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(summary["models"])
    assert len({row.count("|") for row in rows}) == 1
    assert summary["decision"] in markdown_table(summary)


def test_what_was_registered_is_named(summary: Summary, tmp_path: Path) -> None:
    assert registered_text(summary) == registered_text({**summary, "registered": None}) == ""
    summary["registered"] = {"model": "tiny-model", "versions": {"rank-4": 2, "rank-16": 3}, "aliases": {"candidate": 3, "champion": 3}}
    expected = "Registered in tiny-model: rank-4 as version 2, rank-16 as version 3; candidate is version 3, champion is version 3."
    assert expected in markdown_table(summary)
    assert expected in page_of(summary, tmp_path / "report.html")[0]
    summary["registered"]["aliases"] = {}
    assert registered_text(summary).endswith("version 3; no alias was moved.")


def test_page_is_self_contained_and_its_identifiers_are_unique(page: tuple[str, Figures]) -> None:
    text, figures = page
    assert not figures.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    assert "http" not in text
    assert "@import" not in text
    assert all(link.startswith("#") and link[1:] in figures.identifiers for link in figures.links)
    assert all(target in figures.identifiers for target in re.findall(r"url\(#([^)]*)\)", text))
    assert len(figures.identifiers) == len(set(figures.identifiers))
    assert text.count("<svg") == 2


def test_a_prompt_is_shown_where_the_records_keep_it(summary: Summary, page: tuple[str, Figures], tmp_path: Path) -> None:
    assert "<summary>Prompt" not in page[0]
    for path in map(Path, summary["items"].values()):
        records = [json.loads(line) | {"prompt": f"ask {HOSTILE}"} for line in path.read_text(encoding="utf-8").split("\n") if line]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    text, figures = page_of(summary, tmp_path / "report.html")
    assert text.count("<summary>Prompt</summary><pre>ask &lt;script") == 4
    assert "script" not in figures.tags


def test_what_a_model_wrote_is_escaped(page: tuple[str, Figures]) -> None:
    text, figures = page
    assert "script" not in figures.tags
    assert text.count("&lt;script&gt;") == 4 * 5  # four samples; the base, the control and three adapters
    assert "base-nf4 &lt;script" not in text


def test_figures_on_the_page_equal_the_summarys(summary: Summary, page: tuple[str, Figures]) -> None:
    _, figures = page
    for label, model in summary["models"].items():
        cell = {name: figures.cells[label, name] for name in ("task_loss", "task_gain", "general_change", "verdict", "piqa", "all")}
        assert float(cell["task_loss"]["data-value"] or "") == model["scores"]["task_loss"]
        assert cell["verdict"]["data-value"] == model.get("verdict", {}).get("status", "")
        if label == "base":
            assert "data-value" not in cell["task_gain"]
            assert float(cell["piqa"]["data-value"] or "") == model["scores"]["benchmarks"]["piqa"]["choice_probability"]
            continue
        assert read(cell["task_gain"]) == model.get("total", model["change"])["task_gain"]
        assert read(cell["general_change"]) == read(cell["all"]) == model["change"]["choice_probability"]
        assert read(cell["piqa"]) == model["change"]["benchmarks"]["piqa"]
        assert float(cell["piqa"]["data-accuracy"] or "") == model["scores"]["benchmarks"]["piqa"]["accuracy"]


def read(cell: dict[str, str | None]) -> dict[str, float]:
    return {name: float(cell[f"data-{key}"] or "") for name, key in (("mean", "value"), ("low", "low"), ("high", "high"))}


def test_three_effects_are_told_apart(summary: Summary, page: tuple[str, Figures]) -> None:
    models, cells = summary["models"], page[1].cells
    assert read(cells["rank-16", "quantisation.task_gain"]) == models["base-nf4"]["change"]["task_gain"]
    assert read(cells["rank-16", "training.task_gain"]) == models["rank-16"]["change"]["task_gain"]
    assert read(cells["rank-16", "total.choice_probability"]) == models["rank-16"]["total"]["choice_probability"]
    assert "data-value" not in cells["control", "quantisation.task_gain"]
    assert "data-value" not in cells["base-nf4", "training.task_gain"]


@pytest.mark.parametrize("alter", [one_rank, dense, no_champion, no_answers])
def test_unusual_comparisons_are_reported(summary: Summary, tmp_path: Path, alter: Any) -> None:
    alter(summary)
    text, figures = page_of(summary, tmp_path / "report.html")
    assert {model for model, figure in figures.cells if figure == "task_loss"} == set(summary["models"])
    assert ('id="samples"' in text) == (alter is not no_answers)
    assert ("base-nf4" in text) == ("base-nf4" in printed(summary)) == ("base-nf4" in markdown_table(summary)) == (alter is not dense)
    assert ("champion</span>" in text) == (summary["champion"] is not None)


def test_two_writes_give_equal_bytes(summary: Summary, tmp_path: Path, page: tuple[str, Figures]) -> None:
    assert page_of(summary, tmp_path / "elsewhere.html")[0] == page[0]


def test_headline_says_what_to_do(summary: Summary) -> None:
    assert headline(summary).startswith("Use rank-16: by training 3.6\u00a0% as many weights it learnt 72\u00a0% of")
    no_champion(summary)
    assert headline(summary) == "No adapter is put forward; rank-16 was not rejected, and scoring more items would tell."
    nothing_kept(summary)
    assert headline(summary) == "No adapter is put forward."


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (512, "512"), (999.6, "1.00\u00a0k"), (4_884_480, "4.88\u00a0M"), (99_960_000, "100\u00a0M")]
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert scaled(value, ("", "k", "M", "G")) == text


@pytest.mark.parametrize(("value", "text"), [(0.7234, "+0.723"), (-0.0066, "−0.007"), (-0.0004, "0.000"), (0.0, "0.000")])
def test_differences_bear_a_sign_unless_they_round_to_zero(value: float, text: str) -> None:
    assert signed(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(16.04, "16.0 s"), (760.2, "12 min 40 s"), (119.6, "2 min 00 s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
