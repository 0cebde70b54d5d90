"""The HTML page needs no other file, escapes model output, and handles unusual comparisons."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser.report_parser import ReportParser, render
from summaries import (
    UNUSUAL,
    Summary,
    a_gate_that_allows_no_drop,
    a_rate_that_diverged,
    control_by_lora,
    dense,
    figures_of_any_scale,
    no_answers,
    no_chat,
    no_control,
    no_frontier,
    no_general_ability,
    no_prompts,
    one_rank,
    parsed,
)

from pipelines.config.recipe import Recipe, load_recipe
from pipelines.reporting.page_sections import commands, recipe_text

LOADING_TAGS = {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
Page = tuple[str, ReportParser]


def test_page_is_self_contained_and_its_identifiers_are_unique(page: Page) -> None:
    text, found = page
    assert not found.tags & LOADING_TAGS
    assert "http" not in text
    assert "@import" not in text
    targets = re.findall(r"url\(#([^)]*)\)", text)
    targets += [link.removeprefix("#") for link in found.links]
    assert all(link.startswith("#") for link in found.links)
    assert set(targets) <= set(found.identifiers)
    assert len(found.identifiers) == len(set(found.identifiers))
    assert text.count('<svg role="img" aria-label="General change') == 1
    assert text.count('<svg role="img" aria-label="Task gain') == 1


def test_every_color_of_a_plot_is_a_variable_of_the_page(page: Page) -> None:
    text, _ = page
    plot = r'<svg role="img" aria-label="(?:General change|Task gain).*?</svg>'
    plots = "".join(re.findall(plot, text, flags=re.DOTALL))
    colors = re.findall(r"#\w{6}\b", plots)
    assert len(re.findall(r"var\(--[\w-]+, #\w{6}\)", plots)) == len(colors) > 50
    used = set(re.findall(r"var\((--[\w-]+)", text))
    declared = set(re.findall(r"(--[\w-]+):", text))
    assert used <= declared


def test_model_output_is_escaped(page: Page) -> None:
    text, found = page
    assert "script" not in found.tags
    answers = 4 * 5  # four samples of the base, the control and three adapters
    prompts = 4
    reasons = 1
    assert text.count("&lt;script&gt;") == answers + prompts + reasons
    assert "base-nf4 &lt;script" not in text


def test_unfinished_answers_are_marked(page: Page) -> None:
    # one of the four prompts, answered by five models
    assert page[0].count("unfinished after 40 tokens") == 5


def test_left_out_items_are_counted(page: Page) -> None:
    text, _ = page
    assert "40 items, 2 left out" in text
    listed = re.search(r'id="left-out">(.*?)</p>', text, flags=re.DOTALL)
    assert listed is not None
    reason = "(613 tokens exceed the context of 512)"
    assert f"lambada 2 {reason}, passages 1 {reason}, answers 1 (its answer" in listed.group(1)
    assert "(its answer had no end &lt;script&gt;" in listed.group(1)
    assert "longer than" not in text


class Code(HTMLParser):
    """Collects the text of all <code> elements."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += tag == "code"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "code"

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.text += data


def test_recipe_on_the_page_equals_the_recipe(summary: Summary, page: Page) -> None:
    text, _ = page
    code = Code()
    code.feed(text)
    shown = code.text[code.text.rindex("name: tiny_run") :]
    assert Recipe.model_validate(yaml.safe_load(shown)) == Recipe.model_validate(summary["recipe"])
    assert "git checkout 0123456789ab" in code.text
    assert "lora run tiny_run.yaml\n" in code.text
    assert "saved as <code>tiny_run.yaml</code>" in text


def test_recipe_runs_from_a_file_with_its_name(summary: Summary, tmp_path: Path) -> None:
    command = next(line for line in commands(parsed(summary)) if "lora run" in line)
    path = tmp_path / command.split()[-1]
    path.write_text(recipe_text(parsed(summary)), encoding="utf-8")
    assert load_recipe(str(path)).model_dump(mode="json") == summary["recipe"]


def test_diverged_learning_rate_is_marked(summary: Summary, tmp_path: Path) -> None:
    a_rate_that_diverged(summary)
    text, _ = render(summary, tmp_path / "report.html")
    diverged = 'data-rate="0.001" class="none">–</td><td class="text short">diverged</td>'
    chosen = 'data-rate="0.0001" data-value="2.91">2.9100</td><td class="text">chosen</td>'
    assert diverged in text
    assert chosen in text


def test_gate_that_allows_no_drop_needs_no_number_of_items(
    summary: Summary, tmp_path: Path
) -> None:
    a_gate_that_allows_no_drop(summary)
    text, _ = render(summary, tmp_path / "report.html")
    assert "too few to detect" not in text
    assert ">no number of items can show that nothing was lost<" in text


def test_metrics_of_any_scale_are_written_short(summary: Summary, tmp_path: Path) -> None:
    figures_of_any_scale(summary)
    text, _ = render(summary, tmp_path / "report.html")
    for expected in ("−1e+30", "−2e+30", "−1.235e+05", "my|metrics:a&lt;b&gt;"):
        assert expected in text
    without_attributes = re.sub(r'="[^"]*"', "", text)
    assert "0" * 12 not in without_attributes
    assert "<b>|" not in text


def test_registered_champion_is_mentioned(summary: Summary, tmp_path: Path) -> None:
    summary["registered_champion"] = {
        "version": "3",
        "adapter_sha256": "00",
        "objection": None,
        "label": "champion-3",
        "words": "Version 3 was the champion.",
    }
    text, _ = render(summary, tmp_path / "report.html")
    assert '<p class="quiet" id="incumbent">Version 3 was the champion.</p>' in text


def test_rendering_is_deterministic(summary: Summary, tmp_path: Path, page: Page) -> None:
    text, _ = render(summary, tmp_path / "elsewhere.html")
    assert text == page[0]


@pytest.mark.parametrize("alter", UNUSUAL)
def test_unusual_comparison_has_a_page(
    summary: Summary, tmp_path: Path, alter: Callable[[Summary], None]
) -> None:
    alter(summary)
    text, found = render(summary, tmp_path / "report.html")
    labels = {model for model, metric in found.cells if metric == "task_loss"}
    assert labels == set(summary["models"])
    assert not re.search(r"\bNone\b|\bnan\b", text)
    has_champion = summary["champion"] is not None
    without_truncation = (no_frontier, one_rank, no_general_ability)
    unmeasured = 'id="unmeasured">Not measured: Passages’ loss, Chat loss, KL divergence;'
    expected = {
        'id="samples"': alter not in (no_answers, no_prompts),
        "base-nf4": alter is not dense,
        "champion</span>": has_champion,
        unmeasured: alter is no_chat,
        "control: full fine-tuning": alter not in (no_control, control_by_lora),
        "truncated to a lower rank": alter not in without_truncation,
        'id="plot-frontier"': alter is not no_general_ability,
    }
    assert {part: part in text for part in expected} == expected
