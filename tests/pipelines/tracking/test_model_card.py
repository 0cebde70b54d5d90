"""The model card, read by the hub's own library: what it says stands in the summary, and nothing that the hub refuses."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from summaries import BENCHMARKS, METRICS, UNUSUAL, Summary, build, figures_of_any_scale, no_control

from pipelines.tracking.model_card import card

UNKNOWN_TO_THE_HUB = ("base_model", "datasets")


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


def read(summary: Summary, label: str = "rank-16") -> ModelCard:
    return ModelCard(card(summary, label), ignore_metadata_errors=False)


def test_the_hub_reads_what_was_measured(summary: Summary) -> None:
    data, scores = read(summary).data, summary["models"]["rank-16"]["scores"]
    assert (data.library_name, data.model_name) == ("peft", "tiny-model-rank-16")
    assert data.tags == ["lora", "qlora", "peft"]
    results = {
        (result.dataset_name, result.metric_name): result.metric_value
        for result in data.eval_results
    }
    task = "rows.jsonl, held-out examples"
    assert results[task, "perplexity"] == pytest.approx(
        scores["perplexity"], abs=1e-4
    )  # four decimals are written
    assert all(
        results[task, name] == pytest.approx(scores["generation"][name], abs=1e-4)
        for name in METRICS
    )
    for name in BENCHMARKS:
        assert results[name, "accuracy"] == scores["benchmarks"][name]["accuracy"]
        assert results[name, "choice_probability"] == pytest.approx(
            scores["benchmarks"][name]["choice_probability"], abs=1e-4
        )


def test_the_hub_is_told_only_of_what_it_has(summary: Summary) -> None:
    assert not {key for key in UNKNOWN_TO_THE_HUB if getattr(read(summary).data, key) is not None}
    summary["base"] |= {"id": "Qwen/Qwen2.5-7B-Instruct", "revision": "abc"}
    summary["recipe"]["data"]["source"] = "tatsu-lab/alpaca"
    data = read(summary).data
    assert (data.base_model, data.datasets) == ("Qwen/Qwen2.5-7B-Instruct", ["tatsu-lab/alpaca"])
    assert (
        'from_pretrained("Qwen/Qwen2.5-7B-Instruct", revision="abc", quantization_config=in_4_bits)'
        in read(summary).text
    )


@pytest.mark.parametrize(
    "base",
    [
        "/models/tiny",
        "embedded:SmolLM2-135M-Instruct",
        "models/tiny.gguf/",
        "./models",
        "~/models/tiny",
    ],
)
def test_a_folder_is_no_hub_id(summary: Summary, base: str) -> None:
    summary["base"]["id"] = base
    assert read(summary).data.base_model is None
    assert f"`{base}`" in read(summary).text
    assert ('from_pretrained("/models/tiny"' in read(summary).text) == (base == "/models/tiny")


def test_every_figure_stands_with_its_intervals(summary: Summary) -> None:
    rows = [line for line in read(summary).text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    (general,) = [row for row in rows if row.startswith("| Choice probability")]
    assert general.endswith(
        "| 0.512 | 0.511 | 0.509 | −0.003 (−0.023, +0.017) | −0.013 (−0.033, +0.007) |"
    )
    (divergence,) = [row for row in rows if row.startswith("| KL divergence")]
    assert "| – | 0.050 | 0.050 | – | – |" in divergence


def test_the_verdict_and_its_rules_are_told(summary: Summary) -> None:
    text = read(summary, "rank-4").text
    assert "## Verdict: can't tell" in text
    assert "- learnt enough: **pass** – 70% of the control's gain" in text
    assert "champion" not in text
    assert "put forward as champion" in read(summary).text


def test_how_to_use_it_names_what_can_be_fetched(summary: Summary) -> None:
    assert "lora generate --adapter models:/tiny-model@champion" in read(summary).text
    assert "lora generate --adapter FOLDER" in read(summary, "rank-4").text
    summary["recipe"]["base_model"]["quantization"] = "none"
    assert "BitsAndBytes" not in read(summary).text and read(summary).data.tags == ["lora", "peft"]


def test_the_code_in_it_is_python(summary: Summary) -> None:
    for quantization in ("nf4", "none"):
        summary["recipe"]["base_model"]["quantization"] = quantization
        (code,) = re.findall(r"```python\n(.*?)```", read(summary).text, flags=re.DOTALL)
        names = compile(code, "card", "exec").co_names
        assert "PeftModel" in names and ("BitsAndBytesConfig" in names) == (quantization == "nf4")


def test_without_a_control_the_table_has_no_such_column(summary: Summary) -> None:
    del summary["models"]["control"]
    summary["control"] = {
        "method": "none",
        "rates": {},
        "chosen": None,
        "words": "There is no control.",
    }
    summary["models"]["rank-16"]["power"] = None
    text = read(summary).text
    assert "| Figure | Base | This adapter |" in text
    assert "There is no control." in text


def test_how_to_repeat_it_names_the_recipe_that_is_kept(summary: Summary) -> None:
    assert (
        "save `recipe.yaml` of the MLflow run `tiny_run` as `tiny_run.yaml`" in read(summary).text
    )
    assert "`lora run tiny_run.yaml`" in read(summary).text


@pytest.mark.parametrize("alter", UNUSUAL)
def test_unusual_comparisons_have_cards(summary: Summary, alter: Callable[[Summary], None]) -> None:
    alter(summary)
    rows = [
        line.replace(r"\|", "") for line in read(summary).text.splitlines() if line.startswith("|")
    ]
    assert {row.count("|") for row in rows} == {6 if alter is no_control else 7}
    assert not re.search(r"\bNone\b|\bnan\b", read(summary).text)


def test_odd_names_stay_data(summary: Summary) -> None:
    figures_of_any_scale(summary)
    summary["base"]["id"] = '/models/a "quoted" one'
    assert "\n| my\\|metrics:a<b> |" in read(summary).text
    assert "| 1e+30 | 1e+30 | −1e+30 | −2e+30 (−3e+30, 0.000)" in read(summary).text
    (code,) = re.findall(r"```python\n(.*?)```", read(summary).text, flags=re.DOTALL)
    assert '/models/a "quoted" one' in compile(code, "card", "exec").co_consts


def test_limits_name_answers_without_an_end(summary: Summary) -> None:
    assert "3 of its answers had not ended after 40 tokens." in read(summary).text
    summary["models"]["rank-16"]["scores"]["unfinished_answers"] = 0
    assert "had not ended" not in read(summary).text
