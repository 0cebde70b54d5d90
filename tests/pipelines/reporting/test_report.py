"""The report shows the summary's figures unchanged, in three forms, and the page needs nothing beside itself."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from summaries import (
    BENCHMARKS,
    KINDS,
    LAYERS,
    METRICS,
    UNUSUAL,
    Summary,
    a_gate_that_allows_no_drop,
    a_rate_that_diverged,
    build,
    control_by_lora,
    dense,
    figures_of_any_scale,
    no_answers,
    no_champion,
    no_chat,
    no_control,
    no_frontier,
    no_general_ability,
    no_prompts,
    nothing_kept,
    one_rank,
)

from pipelines.config.recipe import Recipe, load_recipe
from pipelines.reporting.figures import figures
from pipelines.reporting.page_sections import commands, left_out, recipe_text, samples
from pipelines.reporting.report import markdown_table, terminal_table, write_html
from pipelines.reporting.words import headline, recommended_text, registered_text

Cell = dict[str, str | None]


class Figures(HTMLParser):
    """Collects the attributes of every cell that names a model, and of every element that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: dict[tuple[str, str], Cell] = {}
        self.points: dict[tuple[str, str], Cell] = {}
        self.rules: dict[tuple[str, str], str] = {}
        self.tags: set[str] = set()
        self.identifiers: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        named = {
            name: values.get(f"data-{name}") or "" for name in ("model", "point", "figure", "rule")
        }
        self.tags.add(tag)
        self.identifiers += [values["id"] or ""] if "id" in values else []
        self.links += [
            values[name] or ""
            for name in ("src", "href", "xlink:href", "data", "action")
            if name in values
        ]
        if "data-rule" in values:
            self.rules[named["model"], named["rule"]] = values["data-value"] or ""
        if "data-figure" in values:
            kept = self.points if named["point"] else self.cells
            kept[named["point"] or named["model"], named["figure"]] = values


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


def test_every_model_has_a_row_with_its_verdict_at_100_columns(summary: Summary) -> None:
    text = printed(summary)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    for label, model in summary["models"].items():
        row = next(line for line in text.splitlines() if line.split()[:1] == [label])
        assert model.get("verdict", {}).get("status", "–") in row


def test_terminal_units_and_marks(summary: Summary) -> None:
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
    summary["registered"] = {
        "model": "tiny-model",
        "versions": {"rank-4": 2, "rank-16": 3},
        "aliases": {"candidate": 3, "champion": 3},
    }
    expected = "Registered in tiny-model: rank-4 as version 2, rank-16 as version 3; candidate is version 3, champion is version 3."
    assert expected in markdown_table(summary)
    assert expected in page_of(summary, tmp_path / "report.html")[0]
    summary["registered"]["aliases"] = {}
    assert registered_text(summary).endswith("version 3; no alias was moved.")
    assert "no alias was moved." in printed(summary)


def test_the_rank_to_use_and_the_control_are_named(summary: Summary) -> None:
    for text in (printed(summary, 120), markdown_table(summary)):
        assert "Recommended: rank-16 is the only one that passes." in text
        assert summary["control"]["words"] in text
    summary["recommended"] = None
    assert recommended_text(summary) == ""
    assert "Recommended" not in printed(summary) + markdown_table(summary)


def test_page_is_self_contained_and_its_identifiers_are_unique(page: tuple[str, Figures]) -> None:
    text, figures = page
    assert not figures.tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "image",
    }
    assert "http" not in text
    assert "@import" not in text
    assert all(link.startswith("#") and link[1:] in figures.identifiers for link in figures.links)
    assert all(target in figures.identifiers for target in re.findall(r"url\(#([^)]*)\)", text))
    assert len(figures.identifiers) == len(set(figures.identifiers))
    assert (
        text.count('<svg role="img" aria-label="General change')
        == text.count('<svg role="img" aria-label="Task gain')
        == 1
    )


def test_every_colour_of_a_plot_follows_the_page(page: tuple[str, Figures]) -> None:
    plots = "".join(
        re.findall(
            r'<svg role="img" aria-label="(?:General change|Task gain).*?</svg>',
            page[0],
            flags=re.DOTALL,
        )
    )
    assert (
        len(re.findall(r"var\(--[\w-]+, #\w{6}\)", plots))
        == len(re.findall(r"#\w{6}\b", plots))
        > 50
    )
    used, declared = (
        set(re.findall(r"var\((--[\w-]+)", page[0])),
        set(re.findall(r"(--[\w-]+):", page[0])),
    )
    assert used <= declared


def test_what_a_model_wrote_is_escaped(page: tuple[str, Figures]) -> None:
    text, figures = page
    assert "script" not in figures.tags
    assert (
        text.count("&lt;script&gt;") == 4 * (5 + 1) + 1
    )  # four samples: the base, the control, three adapters, the prompt; a reason
    assert "base-nf4 &lt;script" not in text


def test_an_answer_that_did_not_end_is_marked(page: tuple[str, Figures]) -> None:
    assert (
        page[0].count("unfinished after 40 tokens") == 5
    )  # one prompt of four, asked of five models


def test_what_was_left_out_is_counted(page: tuple[str, Figures]) -> None:
    assert "40 items, 2 left out" in page[0]
    told = re.search(r'id="left-out">(.*?)</p>', page[0], flags=re.DOTALL)
    assert told is not None
    long = "(613 tokens exceed the context of 512)"
    assert (
        f"lambada 2 {long}, passages 1 {long}, answers 1 (its answer had no end &lt;script&gt;"
        in told.group(1)
    )
    assert "longer than" not in page[0]


def test_without_records_only_the_count_is_told(summary: Summary) -> None:
    no_answers(summary)
    assert {one["name"]: one["count"] for one in left_out(summary)} == {
        "lambada": 2,
        "passages": 1,
        "answers": 1,
    }
    summary["items"] = {"rank-4": summary["items"]["rank-4"]}
    assert left_out(summary) == [{"name": "lambada", "count": 2, "why": ""}]


def test_a_prompt_that_one_model_left_out_is_no_sample(summary: Summary) -> None:
    assert [next(iter(one.values()))["id"] for one in samples(summary)] == [0, 1, 2, 3]
    path = Path(summary["items"]["rank-4"])
    kept = [line for line in path.read_text(encoding="utf-8").split("\n") if '"id": 2,' not in line]
    path.write_text(
        "\n".join([json.dumps({"kind": "generation", "id": 2, "left_out": "too long"}), *kept]),
        encoding="utf-8",
    )
    assert [next(iter(one.values()))["id"] for one in samples(summary)] == [0, 1, 3, 4]


def test_many_reasons_are_cut_short(summary: Summary) -> None:
    records = [{"kind": "chat", "id": place, "left_out": f"reason {place}"} for place in range(5)]
    Path(summary["items"]["base"]).write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    summary["items"] = {"base": summary["items"]["base"]}
    assert left_out(summary)[1:] == [
        {"name": "chat", "count": 5, "why": "reason 0; reason 1; and 3 more like it"}
    ]


def test_the_recipe_on_the_page_is_the_recipe(summary: Summary, page: tuple[str, Figures]) -> None:
    class Code(HTMLParser):
        text = ""
        depth = 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.depth += tag == "code"

        def handle_endtag(self, tag: str) -> None:
            self.depth -= tag == "code"

        def handle_data(self, data: str) -> None:
            self.text += data if self.depth else ""

    code = Code()
    code.feed(page[0])
    shown = code.text[code.text.rindex("name: tiny_run") :]
    assert Recipe.model_validate(yaml.safe_load(shown)) == Recipe.model_validate(summary["recipe"])
    assert "git checkout 0123456789ab" in code.text
    assert (
        "lora run tiny_run.yaml\n" in code.text and "saved as <code>tiny_run.yaml</code>" in page[0]
    )


def test_the_recipe_runs_from_a_file_of_its_name(summary: Summary, tmp_path: Path) -> None:
    command = next(line for line in commands(summary) if "lora run" in line)
    path = tmp_path / command.split()[-1]
    path.write_text(recipe_text(summary), encoding="utf-8")
    assert load_recipe(str(path)).model_dump(mode="json") == summary["recipe"]


def test_figures_on_the_page_equal_the_summarys(
    summary: Summary, page: tuple[str, Figures]
) -> None:
    _, figures = page
    for label, model in summary["models"].items():
        cell = {
            name: figures.cells[label, name]
            for name in ("task_loss", "task_gain", "general_change", "verdict", "piqa", "all")
        }
        assert float(cell["task_loss"]["data-value"] or "") == model["scores"]["task_loss"]
        assert cell["verdict"]["data-value"] == model.get("verdict", {}).get("status", "")
        if label == "base":
            assert "data-value" not in cell["task_gain"]
            assert (
                float(cell["piqa"]["data-value"] or "")
                == model["scores"]["benchmarks"]["piqa"]["choice_probability"]
            )
            continue
        assert read(cell["task_gain"]) == model.get("total", model["change"])["task_gain"]
        assert (
            read(cell["general_change"])
            == read(cell["all"])
            == model["change"]["choice_probability"]
        )
        for benchmark in BENCHMARKS:
            found = figures.cells[label, benchmark]
            expected = model["change"]["benchmarks"][benchmark]
            assert read(found) == {end: expected[end] for end in ("mean", "low", "high")}
            assert float(found["data-p"] or "") == expected["adjusted_p"]
            assert (found.get("class") == "clear") == (expected["adjusted_p"] < 0.05)
        assert (
            float(cell["piqa"]["data-accuracy"] or "")
            == model["scores"]["benchmarks"]["piqa"]["accuracy"]
        )


def read(cell: Cell) -> dict[str, float]:
    return {
        name: float(cell[f"data-{key}"] or "")
        for name, key in (("mean", "value"), ("low", "low"), ("high", "high"))
    }


def test_every_figure_has_a_row_that_says_what_it_detects(
    summary: Summary, page: tuple[str, Figures]
) -> None:
    text, (models, cells) = page[0], (summary["models"], page[1].cells)
    names = [
        "task_loss",
        "choice_probability",
        "accuracy",
        "margin",
        "text_loss",
        "chat_loss",
        *(f"generation.{name}" for name in METRICS),
    ]
    assert {*names, "kl", "corpus.bleu", "corpus.chrf", "unfinished_answers"} == {
        figure.name for figure in figures(models)
    }
    for name in names:
        section, _, key = name.rpartition(".")
        scores, change = models["rank-16"]["scores"], models["rank-16"]["change"]
        cell = cells["rank-16", f"change.{name}"]
        assert float(cell["data-level"] or "") == (scores[section] if section else scores)[key]
        assert (
            read(cell)
            == (change[section] if section else change)[{"task_loss": "task_gain"}.get(key, key)]
        )
    assert (
        float(cells["rank-16", "change.kl"]["data-level"] or "")
        == models["rank-16"]["change"]["kl"]
    )
    assert "0.050<small>0.040, 0.060</small>" in text
    assert all(
        figure.detects and figure.detects.replace("'", "&#39;") in text
        for figure in figures(models)
    )
    assert (
        cells["", "moved.choice_probability"]["data-value"] == "1"
    )  # of the four trained models, rank-64 alone
    assert cells["", "moved.task_loss"]["data-value"] == "4"


def test_every_point_of_the_frontier_is_listed(summary: Summary, page: tuple[str, Figures]) -> None:
    points = page[1].points
    assert len(points) == 2 * len(summary["frontier"])
    for row in summary["frontier"]:
        assert read(points[row["label"], "gain"]) == row["gain"]
        assert read(points[row["label"], "general"]) == row["general"]


def test_every_rule_stands_beside_its_adapter(summary: Summary, page: tuple[str, Figures]) -> None:
    expected = {
        (label, rule["name"]): rule["status"]
        for label, model in summary["models"].items()
        if "verdict" in model
        for rule in model["verdict"]["rules"]
    }
    assert page[1].rules == expected


def test_spectra_and_power_are_shown(summary: Summary, page: tuple[str, Figures]) -> None:
    cells = page[1].cells
    for label, modules in summary["spectrum"].items():
        for kind in KINDS:
            ranks = [
                module["effective_rank"] for module in modules if module["module"].endswith(kind)
            ]
            shown = float(
                cells[label, f"effective_rank.{kind.rpartition('.')[2]}"]["data-value"] or ""
            )
            assert len(ranks) == LAYERS and shown == pytest.approx(sum(ranks) / LAYERS)
        power = summary["models"][label]["power"]
        assert float(cells[label, "power.needed"]["data-value"] or "") == power["needed"]
        assert cells[label, "enough.all"]["data-value"] == str(int(power["enough"]))
        assert cells[label, "enough.piqa"]["data-value"] == str(
            int(power["benchmarks"]["piqa"]["enough"])
        )
        assert (
            float(cells[label, "smallest_drop.piqa"]["data-value"] or "")
            == power["benchmarks"]["piqa"]["smallest_drop"]
        )
    assert page[0].count("too few to tell a drop of 0.03") == 1  # of rank-64, on all benchmarks
    assert page[0].count("too few to tell it") == 2 * len(BENCHMARKS)


def test_a_gate_that_allows_no_drop_asks_for_no_number(summary: Summary, tmp_path: Path) -> None:
    a_gate_that_allows_no_drop(summary)
    text = page_of(summary, tmp_path / "report.html")[0]
    assert "too few to tell" not in text and ">no number shows that nothing was lost<" in text


def test_what_cannot_be_told_is_named_beside_a_champion(summary: Summary) -> None:
    expected = "Can't tell of rank-4: forgot little: -0.004."
    assert expected in printed(summary) and expected in markdown_table(summary)
    no_champion(summary)  # then the decision names them all
    assert "Can't tell of" not in printed(summary) + markdown_table(summary)


def test_a_rate_at_which_training_diverged_is_named(summary: Summary, tmp_path: Path) -> None:
    a_rate_that_diverged(summary)
    text = page_of(summary, tmp_path / "report.html")[0]
    assert re.search(
        r'data-rate="0.001" class="none">–</td><td class="text short">diverged</td>', text
    )
    assert re.search(
        r'data-rate="0.0001" data-value="2.91">2.9100</td><td class="text">chosen</td>', text
    )


def test_figures_of_any_scale_are_written_short(summary: Summary, tmp_path: Path) -> None:
    figures_of_any_scale(summary)
    text = page_of(summary, tmp_path / "report.html")[0]
    assert (
        "−1e+30" in text
        and "−2e+30" in text
        and "−1.235e+05" in text
        and "0" * 12 not in re.sub(r'="[^"]*"', "", text)
    )
    assert "my|metrics:a&lt;b&gt;" in text and "<b>|" not in text


def test_three_effects_are_told_apart(summary: Summary, page: tuple[str, Figures]) -> None:
    models, cells = summary["models"], page[1].cells
    assert (
        read(cells["rank-16", "quantisation.task_gain"])
        == models["base-nf4"]["change"]["task_gain"]
    )
    assert read(cells["rank-16", "training.task_gain"]) == models["rank-16"]["change"]["task_gain"]
    assert (
        read(cells["rank-16", "total.choice_probability"])
        == models["rank-16"]["total"]["choice_probability"]
    )
    total = models["rank-16"]["total"]["benchmarks"]["piqa"]
    assert read(cells["rank-16", "total.piqa"]) == {
        end: total[end] for end in ("mean", "low", "high")
    }
    assert "data-value" not in cells["control", "quantisation.task_gain"]
    assert "data-value" not in cells["base-nf4", "training.task_gain"]


@pytest.mark.parametrize("alter", UNUSUAL)
def test_unusual_comparisons_are_reported(summary: Summary, tmp_path: Path, alter: Any) -> None:
    alter(summary)
    text, found = page_of(summary, tmp_path / "report.html")
    assert {model for model, figure in found.cells if figure == "task_loss"} == set(
        summary["models"]
    )
    assert ('id="samples"' in text) == (alter not in (no_answers, no_prompts))
    assert (
        ("base-nf4" in text)
        == ("base-nf4" in printed(summary))
        == ("base-nf4" in markdown_table(summary))
        == (alter is not dense)
    )
    assert ("champion</span>" in text) == (summary["champion"] is not None)
    assert ('id="unmeasured">Not measured: Passages’ loss, Chat loss, KL divergence;' in text) == (
        alter is no_chat
    )
    assert ("control: full fine-tuning" in text) == (alter not in (no_control, control_by_lora))
    assert ("cut to a lower rank" in text) == (
        alter not in (no_frontier, one_rank, no_general_ability)
    )
    assert ('id="plot-frontier"' in text) == (alter is not no_general_ability)
    assert not re.search(r"\bNone\b|\bnan\b", text)


def test_an_incumbent_has_its_say(summary: Summary, tmp_path: Path) -> None:
    summary["incumbent"] = {
        "version": "3",
        "adapter_sha256": "00",
        "label": "champion-3",
        "words": "Version 3 was the champion.",
    }
    assert (
        '<p class="quiet" id="incumbent">Version 3 was the champion.</p>'
        in page_of(summary, tmp_path / "report.html")[0]
    )


def test_two_writes_give_equal_bytes(
    summary: Summary, tmp_path: Path, page: tuple[str, Figures]
) -> None:
    assert page_of(summary, tmp_path / "elsewhere.html")[0] == page[0]


def test_headline_says_what_to_do(summary: Summary) -> None:
    assert headline(summary).startswith(
        "Use rank-16: by training 3.6\u00a0% as many weights it learnt 84\u00a0% of what full fine-tuning"
    )
    assert headline(summary).endswith("it forgot no more than the gate allows.")
    smaller = summary | {"recommended": {"label": "rank-4", "reason": "it does"}}
    assert headline(smaller).endswith(
        "than the gate allows; rank-4 is smaller and not surely worse."
    )
    control_by_lora(summary)
    assert "of what the control, an adapter of rank 128, learnt" in headline(summary)
    no_control(summary)
    assert "it gained 0.723 nats per token on the task" in headline(summary)
    no_champion(summary)
    assert (
        headline(summary)
        == "No adapter is put forward; rank-16 was not rejected, and scoring more items would tell."
    )
    nothing_kept(summary)
    assert headline(summary) == "No adapter is put forward."
