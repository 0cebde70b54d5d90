"""The metrics on the page equal those of the summary."""

import pytest
from browser.report_parser import Cell, ReportParser, interval_of, value_of
from summaries import BENCHMARKS, KINDS, LAYERS, METRICS, Summary, parsed

from pipelines.reporting.report_metrics import report_metrics

Page = tuple[str, ReportParser]
Cells = dict[tuple[str, str], Cell]


@pytest.fixture
def cells(page: Page) -> Cells:
    """The cells of the page by model and metric."""
    return page[1].cells


def status_of(model: Summary) -> str:
    """Return the status of an adapter's verdict; empty for another model."""
    return model["judgment"]["verdict"]["status"] if "judgment" in model else ""


def spectra_of(summary: Summary) -> dict[str, list[Summary]]:
    """Return label → the spectra of its updates, for each adapter."""
    spectra = {}
    for label, model in summary["models"].items():
        if "judgment" in model:
            spectra[label] = model["training"]["result"]["saved"]["spectrum"]
    return spectra


def test_models_table_equals_the_summary(summary: Summary, cells: Cells) -> None:
    for label, model in summary["models"].items():
        task_loss = value_of(cells[label, "task_loss"])
        assert task_loss == model["scores"]["task_loss"]
        assert cells[label, "verdict"]["data-value"] == status_of(model)
        if label == "base":
            assert "data-value" not in cells[label, "task_gain"]
            continue
        total = model.get("total", model["change"])
        assert interval_of(cells[label, "task_gain"]) == total["task_gain"]
        general = model["change"]["choice_probability"]
        assert interval_of(cells[label, "general_change"]) == general


def test_benchmarks_table_equals_the_summary(summary: Summary, cells: Cells) -> None:
    for label, model in summary["models"].items():
        piqa = model["scores"]["benchmarks"]["piqa"]
        if label == "base":
            assert value_of(cells[label, "piqa"]) == piqa["choice_probability"]
            continue
        assert value_of(cells[label, "piqa"], "accuracy") == piqa["accuracy"]
        change = model["change"]
        assert interval_of(cells[label, "all"]) == change["choice_probability"]
        for benchmark in BENCHMARKS:
            cell = cells[label, benchmark]
            check_tested_change(cell, change["benchmarks"][benchmark])


def only_interval(tested: Summary) -> dict[str, float]:
    """Return mean, low and high, without the p-values."""
    return {end: tested[end] for end in ("mean", "low", "high")}


def check_tested_change(cell: Cell, expected: Summary) -> None:
    assert interval_of(cell) == only_interval(expected)
    assert value_of(cell, "p") == expected["adjusted_p"]
    is_clear = expected["adjusted_p"] < 0.05
    assert (cell.get("class") == "clear") == is_clear


SCORED = ["task_loss", "choice_probability", "accuracy", "margin", "text_loss", "chat_loss"]
SCORED += [f"generation.{name}" for name in METRICS]
WITHOUT_CHANGE = {"kl", "corpus.bleu", "corpus.chrf", "unfinished_answers"}


def test_every_metric_has_a_row_with_what_it_detects(summary: Summary, page: Page) -> None:
    text, _ = page
    metrics = report_metrics(parsed(summary).models)
    assert {metric.name for metric in metrics} == {*SCORED, *WITHOUT_CHANGE}
    for metric in metrics:
        assert metric.detects
        assert metric.detects.replace("'", "&#39;") in text


@pytest.mark.parametrize("name", SCORED)
def test_metrics_table_equals_the_summary(summary: Summary, cells: Cells, name: str) -> None:
    section, _, key = name.rpartition(".")
    model = summary["models"]["rank-16"]
    scores = model["scores"]
    change = model["change"]
    if section:
        scores = scores[section]
        change = change[section]
    change_key = "task_gain" if key == "task_loss" else key
    cell = cells["rank-16", f"change.{name}"]
    assert value_of(cell, "level") == scores[key]
    assert interval_of(cell) == change[change_key]


def test_divergence_has_an_interval(summary: Summary, page: Page) -> None:
    text, found = page
    kl = summary["models"]["rank-16"]["change"]["kl"]
    cell = found.cells["rank-16", "change.kl"]
    assert value_of(cell, "level") == kl
    assert "0.050<small>0.040, 0.060</small>" in text


def test_clear_changes_are_counted(cells: Cells) -> None:
    # of the four trained models, only rank-64 forgot clearly
    assert cells["", "moved.choice_probability"]["data-value"] == "1"
    assert cells["", "moved.task_loss"]["data-value"] == "4"


def test_every_point_of_the_frontier_is_listed(summary: Summary, page: Page) -> None:
    points = page[1].points
    assert len(points) == 2 * len(summary["frontier"])
    for row in summary["frontier"]:
        label = row["label"]
        assert interval_of(points[label, "gain"]) == row["gain"]
        assert interval_of(points[label, "general"]) == row["general"]


def test_every_rule_of_every_adapter_is_listed(summary: Summary, page: Page) -> None:
    expected = {}
    for label, model in summary["models"].items():
        if "judgment" in model:
            for rule in model["judgment"]["verdict"]["rules"]:
                expected[label, rule["name"]] = rule["status"]
    assert page[1].rules == expected


def test_spectra_show_the_effective_rank(summary: Summary, cells: Cells) -> None:
    for label, modules in spectra_of(summary).items():
        for kind in KINDS:
            ranks = []
            for module in modules:
                if module["module"].endswith(kind):
                    ranks.append(module["effective_rank"])
            name = kind.rpartition(".")[2]
            assert len(ranks) == LAYERS
            mean = value_of(cells[label, f"effective_rank.{name}"])
            assert mean == pytest.approx(sum(ranks) / LAYERS)


def test_spectra_show_the_intruder_dimensions(summary: Summary, cells: Cells) -> None:
    for label, modules in spectra_of(summary).items():
        for kind in KINDS:
            counts = [each["intruders"] for each in modules if each["module"].endswith(kind)]
            counted = [count for count in counts if count is not None]
            assert counted
            name = kind.rpartition(".")[2]
            assert value_of(cells[label, f"intruders.{name}"]) == sum(counted)


def test_power_table_equals_the_summary(summary: Summary, page: Page, cells: Cells) -> None:
    text, _ = page
    for label in spectra_of(summary):
        power = summary["models"][label]["power"]
        piqa = power["benchmarks"]["piqa"]
        assert value_of(cells[label, "power.needed"]) == power["needed"]
        assert value_of(cells[label, "enough.all"]) == power["enough"]
        assert value_of(cells[label, "enough.piqa"]) == piqa["enough"]
        assert value_of(cells[label, "smallest_drop.piqa"]) == piqa["smallest_drop"]
    # rank-64 on all benchmarks
    assert text.count("too few to detect a drop of 0.03") == 1
    assert text.count("too few to detect it") == 2 * len(BENCHMARKS)


def test_effects_are_separated(summary: Summary, cells: Cells) -> None:
    quantized = summary["models"]["base-nf4"]["change"]
    training = summary["models"]["rank-16"]["change"]
    total = summary["models"]["rank-16"]["total"]
    piqa = total["benchmarks"]["piqa"]
    assert interval_of(cells["rank-16", "quantization.task_gain"]) == quantized["task_gain"]
    assert interval_of(cells["rank-16", "training.task_gain"]) == training["task_gain"]
    general = interval_of(cells["rank-16", "total.choice_probability"])
    assert general == total["choice_probability"]
    assert interval_of(cells["rank-16", "total.piqa"]) == only_interval(piqa)
    assert "data-value" not in cells["control", "quantization.task_gain"]
    assert "data-value" not in cells["base-nf4", "training.task_gain"]
