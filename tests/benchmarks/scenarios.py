"""The tasks of the training benchmark, which differ in base, length and method."""

import json
import sysconfig
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from contestants import WORK, run, threads
from rows import Row

from pipelines.config.experiments import control_experiments, rank_experiments
from pipelines.config.recipe import parse_recipe
from pipelines.paths import runs_root
from pipelines.runtime.launcher import ensure_result
from pipelines.workflow.stages import PreparedData, Stages
from pipelines.workflow.training_dtype import resolve_dtype

RANK = 16
DOCSTRINGS = {"source": "docstrings", "max_source_characters": 250, "max_tokens": 320}
LONG_CHARACTERS = 3000
"""Of Python source, about 900 tokens."""
LONG_ROWS = 120
LONG_FILE = WORK / "long.jsonl"
LONG = {"source": str(LONG_FILE), "max_tokens": 1024, "validation_examples": 8}
Values = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """One training task, and how it differs from the main one."""

    name: str
    data: Values = field(default_factory=lambda: DOCSTRINGS)
    quantization: str = "nf4"
    lora: Values = field(default_factory=dict)
    batch_size: int = 8
    checkpointing: bool = False
    full: bool = False
    """Full fine-tuning instead of an adapter."""
    least_ratio: float = 1.0
    """Goal for our speed relative to each competitor's."""


MAIN = Scenario("QLoRA")
FULL = Scenario("full fine-tuning", quantization="none", full=True, least_ratio=2.0)
OTHERS = (
    FULL,
    Scenario("LoRA over a dense base", quantization="none"),
    Scenario("DoRA", lora={"use_dora": True}),
    Scenario("1,024 tokens", data=LONG, batch_size=2),
    Scenario("1,024 tokens, checkpointing", data=LONG, batch_size=2, checkpointing=True),
)


def prepare(scenario: Scenario, base_id: str, *, batch_size: int | None = None) -> Row:
    """Prepare base and data if needed; return the task of all contestants.

    Args:
        scenario: what is trained.
        base_id: of the model.
        batch_size: instead of the scenario's.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    if scenario.data is LONG and not LONG_FILE.exists():
        lines = [json.dumps({"text": text}) + "\n" for text in long_texts()]
        LONG_FILE.write_text("".join(lines), encoding="utf-8")
    recipe = parse_recipe(
        {
            "name": "bench",
            "base_model": {"id": base_id, "quantization": scenario.quantization},
            "data": scenario.data,
            "lora": {"ranks": [RANK], "alpha": 2 * RANK, "learning_rate": 1e-3, **scenario.lora},
            "control": {"learning_rate": 5e-5},
            "training": {
                "steps": 20,  # each contestant decays its learning rate over the steps it takes
                "batch_size": batch_size or scenario.batch_size,
                "warmup_steps": 0,
                "max_grad_norm": 1e9,  # never clips
            },
            "launch": {"config": "cpu_single", "processes": 1},
            "registry": {"model": "bench"},
        }
    )
    stages = Stages(recipe, runs_root())
    recipe = resolve_dtype(recipe, stages, partial(ensure_result, threads=threads()))
    stages = Stages(recipe, runs_root())
    base = ensure_result(stages.base(), threads=threads())
    data_stage = stages.data(base)
    data = PreparedData(data_stage, ensure_result(data_stage, threads=threads()))
    experiments = control_experiments(recipe) if scenario.full else rank_experiments(recipe)
    training = stages.train(base, data, experiments[0])
    task = {
        "inputs": training.inputs.plain(),
        "paths": training.paths.plain() | {"adapter": str(WORK / "adapter")},
        "checkpointing": scenario.checkpointing,
    }
    if not scenario.full:
        run("adapter", {**task, "steps": 1})
    return task


def long_texts() -> list[str]:
    """Return parts of the interpreter's own library, each of `LONG_CHARACTERS`."""
    texts = []
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        starts = range(0, len(text) - LONG_CHARACTERS, LONG_CHARACTERS)
        texts += [text[start : start + LONG_CHARACTERS] for start in starts]
    step = max(1, len(texts) // LONG_ROWS)
    return texts[::step][:LONG_ROWS]
