"""Complete runs on tiny bases of several families report transformers' own losses.

The reference loads base, adapter (with PEFT) and data from the run's folders, and shares no code
with the scorer.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import lora, shared_prefect_server
from datasets import load_from_disk
from families.configs import tiny_config
from families.measure import built
from peft import PeftModel
from tiny import VOCABULARY, save_pairs, save_tiny_model, tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    ),  # PEFT's
]
NATS = 2e-4
"""Per token, in float32, of models whose weights are large."""
FAMILIES = ["gemma3_text", "gemma3", "mistral", "granite", "gpt_oss", "qwen3_moe", "lfm2"]
SLOW = {"lfm2"}
CONTROLLED = {"gemma3", "gpt_oss"}
"""Families with full fine-tuning: weights without a gradient must not end a run at its first
checkpoint."""
LAUNCHES = {"lfm2": {"config": "cpu_zero2", "processes": 2}}
"""Reads one example at a time, under an engine."""
EXPERTS = {"gpt_oss": [], "qwen3_moe": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@dataclass(frozen=True)
class FinishedRun:
    """A completed run on a tiny base."""

    family: str
    folder: Path
    summary: dict[str, Any]


def save_family(name: str, folder: Path) -> Path:
    """Save a tiny base of a family, with the tiny tokenizer."""
    save_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for file in (
        *folder.glob("*.safetensors"),
        folder / "config.json",
        folder / "generation_config.json",
    ):
        file.unlink(missing_ok=True)
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    if name == "gemma3":
        text = tiny_config("gemma3_text", vocab_size=VOCABULARY, **ends)
        config = tiny_config(name, text_config=text.to_dict())
    else:
        config = tiny_config(name, vocab_size=VOCABULARY, **ends)
    built(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with shared_prefect_server(tmp_path_factory.mktemp("server") / "prefect") as url:
        yield url


@pytest.fixture(scope="module", params=FAMILIES)
def finished(
    request: pytest.FixtureRequest, server: str, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """Run the pipeline on a tiny base of a family."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    save_family(name, folder / "model")
    save_pairs(folder / "pairs.jsonl")
    recipe = tiny_recipe(
        folder / "model",
        folder / "pairs.jsonl",
        base_model={"quantization": "none"},
        control={} if name in CONTROLLED else {"method": "none"},
        lora={"ranks": [2], "target_parameters": EXPERTS.get(name, [])},
        training={"steps": 4},
        launch={"evaluations_at_once": 1, **LAUNCHES.get(name, {})},
        evaluation={"items_per_benchmark": 2, "passages": 2, "chat_prompts": 2},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    ended = lora(folder, "run", "tiny.yaml", PREFECT_API_URL=server)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((folder / "runs" / "pairs_tiny_cpu" / "summary.json").read_text())
    return FinishedRun(name, folder, summary)


def test_reported_losses_equal_those_of_the_models_own_forward(
    finished: FinishedRun,
) -> None:
    folder, summary = finished.folder, finished.summary
    for label, load in loaders(folder, summary).items():
        reported = [record for record in items(summary, label) if record["kind"] == "task"]
        own = own_losses(load(), next((folder / "runs" / "data").glob("*")) / "validation")
        differences = [
            abs(record["nll"] - loss) / record["tokens"]
            for record, loss in zip(reported, own, strict=True)
        ]
        assert max(differences) < NATS, (finished.family, label)


def test_a_run_reports_the_forward_path_of_its_models(
    finished: FinishedRun,
) -> None:
    path = "one by one" if finished.family in SLOW else "packed"
    for label, ways in finished.summary["forward"].items():
        checks = [ways[way] for way in ("training", "scoring") if ways[way] is not None]
        assert {check["path"] for check in checks} == {path}, label
        for check in checks:
            assert check["loss_difference"] <= check["loss_tolerance"]
    runs = finished.folder / "runs"
    page = (runs / "pairs_tiny_cpu" / "report.html").read_text()
    assert "matches the model&#39;s own forward" in page
    card = next((runs / "mlartifacts").rglob("README.md")).read_text()
    assert "Verified, training" in card
    assert "Verified, scoring" in card


def items(summary: dict[str, Any], label: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(summary["items"][label]).read_text().splitlines()]


def loaders(folder: Path, summary: dict[str, Any]) -> dict[str, Callable[[], PreTrainedModel]]:
    """Return functions that load each scored model with transformers and PEFT only."""
    trained = {
        label: Path(model["training"]["folder"])
        for label, model in summary["models"].items()
        if model["training"] is not None
    }

    def plain(path: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        ).eval()

    models = {
        "base": lambda: plain(folder / "model"),
        "rank-2": lambda: PeftModel.from_pretrained(
            plain(folder / "model"), trained["rank-2"] / "adapter"
        ).eval(),
    }
    if "control" in trained:
        models["control"] = lambda: plain(trained["control"] / "model")
    return models


@torch.no_grad()
def own_losses(model: PreTrainedModel, validation: Path) -> list[float]:
    """Return the summed loss of each held-out example, one forward pass per example."""
    losses = []
    for example in load_from_disk(str(validation)):
        ids = torch.tensor([example["input_ids"]])
        supervised = torch.tensor(example["supervised"])[1:]
        log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
        likelihoods = log_probabilities.gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-float(likelihoods[supervised].sum()))
    return losses


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "'bert' is an encoder"),
        ("bart", "'bart' is an encoder-decoder"),
        ("t5", "'t5' is an encoder-decoder"),
    ],
)
def test_a_model_that_is_not_causal_is_rejected_in_one_sentence(
    tmp_path: Path, name: str, message: str
) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": name}))
    save_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(tiny_recipe(tmp_path / "model", tmp_path / "pairs.jsonl"))
    )
    ended = lora(tmp_path, "plan", "tiny.yaml")
    output = " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode == 2
    assert message in output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["base"]


def test_a_plan_prints_the_forward_path_and_the_weights_that_are_not_adapted(
    tmp_path: Path,
) -> None:
    save_family("gpt_oss", tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(tiny_recipe(tmp_path / "model", tmp_path / "pairs.jsonl"))
    )
    ended = lora(tmp_path, "plan", "tiny.yaml")
    output = " ".join(ended.stdout.split())
    assert ended.returncode == 0, ended.stderr
    assert "fast path (packed) matches the model's own forward" in output
    [experts] = [line for line in ended.stdout.splitlines() if "experts.gate_up_proj " in line]
    assert "dense" in experts and " no " in experts
    [queries] = [line for line in ended.stdout.splitlines() if "q_proj.weight" in line]
    assert "nf4" in queries and " yes " in queries


def test_a_base_without_the_packed_path_is_rejected_under_zero3(
    tmp_path: Path,
) -> None:
    save_family("lfm2", tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl")
    recipe = tiny_recipe(
        tmp_path / "model", tmp_path / "pairs.jsonl", launch={"config": "cpu_zero3", "processes": 2}
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    ended = lora(tmp_path, "plan", "tiny.yaml")
    output = " ".join((ended.stdout + ended.stderr).split())
    assert ended.returncode == 2
    assert "is read one example at a time" in output
    assert "use ddp, zero1 or zero2" in output
