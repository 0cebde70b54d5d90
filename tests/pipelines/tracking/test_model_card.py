"""The model card, read by the Hub's own library: it equals the summary and the Hub accepts it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from summaries import (
    BENCHMARKS,
    METRICS,
    UNUSUAL,
    Summary,
    build,
    figures_of_any_scale,
    no_control,
    parsed,
)

from pipelines.tracking.model_card import card


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    return build(tmp_path)


def read(summary: Summary, label: str = "rank-16") -> ModelCard:
    return ModelCard(card(parsed(summary), label), ignore_metadata_errors=False)


def python_code(summary: Summary) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", read(summary).text, flags=re.DOTALL)
    return str(code)


def table_rows(summary: Summary) -> list[str]:
    return [line for line in read(summary).text.splitlines() if line.startswith("|")]


def test_front_matter_names_library_model_and_tags(summary: Summary) -> None:
    data = read(summary).data
    assert data.library_name == "peft"
    assert data.model_name == "tiny-model-rank-16"
    assert data.tags == ["lora", "qlora", "peft"]


def test_front_matter_has_the_results(summary: Summary) -> None:
    results = {}
    for result in read(summary).data.eval_results:
        results[result.dataset_name, result.metric_name] = result.metric_value
    scores = summary["models"]["rank-16"]["scores"]
    task = "rows.jsonl, held-out examples"
    four_decimals = 1e-4
    perplexity = pytest.approx(scores["perplexity"], abs=four_decimals)
    assert results[task, "perplexity"] == perplexity
    for name in METRICS:
        expected = pytest.approx(scores["generation"][name], abs=four_decimals)
        assert results[task, name] == expected
    for name in BENCHMARKS:
        benchmark = scores["benchmarks"][name]
        assert results[name, "accuracy"] == benchmark["accuracy"]
        expected = pytest.approx(benchmark["choice_probability"], abs=four_decimals)
        assert results[name, "choice_probability"] == expected


def test_front_matter_names_base_and_data_only_if_the_hub_has_them(summary: Summary) -> None:
    data = read(summary).data
    assert data.base_model is None
    assert data.datasets is None
    summary["base"] |= {"id": "Qwen/Qwen2.5-7B-Instruct", "revision": "abc"}
    summary["recipe"]["data"]["source"] = "tatsu-lab/alpaca"
    data = read(summary).data
    assert data.base_model == "Qwen/Qwen2.5-7B-Instruct"
    assert data.datasets == ["tatsu-lab/alpaca"]
    arguments = '"Qwen/Qwen2.5-7B-Instruct", revision="abc", quantization_config=in_4_bits'
    assert f"from_pretrained({arguments})" in read(summary).text


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
def test_folder_is_not_a_hub_id(summary: Summary, base: str) -> None:
    summary["base"]["id"] = base
    found = read(summary)
    assert found.data.base_model is None
    assert f"`{base}`" in found.text
    assert ('from_pretrained("/models/tiny"' in found.text) == (base == "/models/tiny")


def test_every_metric_has_intervals(summary: Summary) -> None:
    rows = table_rows(summary)
    assert len({row.count("|") for row in rows}) == 1
    (general,) = [row for row in rows if row.startswith("| Choice probability")]
    values = "| 0.512 | 0.511 | 0.509 | −0.003 (−0.023, +0.017) | −0.013 (−0.033, +0.007) |"
    assert general.endswith(values)
    (divergence,) = [row for row in rows if row.startswith("| KL divergence")]
    assert "| – | 0.050 | 0.050 | – | – |" in divergence


def test_exports_that_were_scored_again_are_named(summary: Summary) -> None:
    assert "Verified, exports" not in read(summary, "rank-4").text
    formats = [{"name": "peft", "difference": 3e-7}, {"name": "vllm", "reason": "too large"}]
    served = {"library": "PEFT 1", "examples": 8, "noise_floor": 2e-7, "tolerance": 1e-4}
    checks = {"training": None, "scoring": None, "served": {**served, "formats": formats}}
    summary["forward"]["rank-4"] = checks
    expected = (
        "- Verified, exports: served = trained: PEFT 1 on 8 held-out examples: peft 3e-07 nats per "
        "token, vllm not scored (too large); noise floor 2e-07"
    )
    assert expected in read(summary, "rank-4").text


def test_verdict_has_its_rules(summary: Summary) -> None:
    text = read(summary, "rank-4").text
    rule = summary["models"]["rank-4"]["judgment"]["verdict"]["rules"][0]
    assert "## Verdict: can't tell" in text
    assert f"- {rule['name']}: **pass** – 70% of the control's gain" in text
    assert "champion" not in text
    assert "put forward as champion" in read(summary).text


@pytest.mark.parametrize("label", ["rank-16", "rank-4"])
def test_usage_names_the_version_of_the_card(summary: Summary, label: str) -> None:
    text = card(parsed(summary), label, 3)
    assert f"# tiny-model, version 3 ({label})" in text
    assert re.findall(r"models:/\S+", text) == ["models:/tiny-model/3"]
    assert "lora generate --adapter models:/tiny-model/3 " in text


def test_card_without_a_version_names_its_folder(summary: Summary) -> None:
    text = read(summary, "rank-4").text
    assert "lora generate --adapter FOLDER" in text
    assert "models:/" not in text


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_code_and_tags_follow_the_quantization(summary: Summary, quantization: str) -> None:
    summary["recipe"]["base_model"]["quantization"] = quantization
    names = compile(python_code(summary), "card", "exec").co_names
    is_quantized = quantization == "nf4"
    assert "PeftModel" in names
    assert ("BitsAndBytesConfig" in names) == is_quantized
    assert ("BitsAndBytes" in read(summary).text) == is_quantized
    assert ("qlora" in read(summary).data.tags) == is_quantized


def test_table_without_a_control_has_fewer_columns(summary: Summary) -> None:
    del summary["models"]["control"]
    summary["control"] = {
        "method": "none",
        "rates": {},
        "chosen": None,
        "words": "The recipe has no control.",
    }
    summary["models"]["rank-16"]["power"] = None
    text = read(summary).text
    assert "| Metric | Base | This adapter |" in text
    assert "The recipe has no control." in text


def test_instructions_name_the_logged_recipe(summary: Summary) -> None:
    text = read(summary).text
    assert "save `recipe.yaml` of the MLflow run `tiny_run` as `tiny_run.yaml`" in text
    assert "`lora run tiny_run.yaml`" in text


@pytest.mark.parametrize("alter", UNUSUAL)
def test_unusual_comparison_has_a_card(summary: Summary, alter: Callable[[Summary], None]) -> None:
    alter(summary)
    rows = [row.replace(r"\|", "") for row in table_rows(summary)]
    columns = 5 if alter is no_control else 6
    assert {row.count("|") for row in rows} == {columns + 1}
    assert not re.search(r"\bNone\b|\bnan\b", read(summary).text)


def test_odd_names_are_escaped(summary: Summary) -> None:
    figures_of_any_scale(summary)
    summary["base"]["id"] = '/models/a "quoted" one'
    text = read(summary).text
    assert "\n| my\\|metrics:a<b> |" in text
    assert "| 1e+30 | 1e+30 | −1e+30 | −2e+30 (−3e+30, 0.000)" in text
    constants = compile(python_code(summary), "card", "exec").co_consts
    assert '/models/a "quoted" one' in constants


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_method_names_the_targets(summary: Summary, targets: str | list[str]) -> None:
    summary["recipe"]["lora"]["target_modules"] = targets
    line = f"- Method: LoRA of rank 16 over NF4, alpha 32, target_modules {targets}\n"
    assert line in read(summary).text


def test_limits_mention_unfinished_answers(summary: Summary) -> None:
    assert "3 of its answers had not ended after 40 tokens." in read(summary).text
    summary["models"]["rank-16"]["scores"]["unfinished_answers"] = 0
    assert "had not ended" not in read(summary).text
