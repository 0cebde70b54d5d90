"""Inputs and results of plans, and the plan of a lora section on the tiny model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lora_core.budget.wire import CommunicatedWeights, Exchange
from pipelines.config.sections import LoraSection, TrainingSection
from pipelines.planning.cluster_tables import METHODS
from pipelines.planning.plan import plan
from pipelines.runtime.interfaces.inputs import PlanInputs, StagePaths
from pipelines.runtime.interfaces.plan_result import (
    Communication,
    Configuration,
    PlannedSetup,
    PlanResult,
    RunCost,
)
from pipelines.runtime.sharding import launch_facts

Runs = Mapping[str, Mapping[str, Any]]
GATHERED = 2_000_000_000


@pytest.fixture
def plan_inputs() -> Callable[..., PlanInputs]:
    """Return a function that makes the inputs of a plan from a launch config and changed values."""

    def make(config: str = "cpu_single", **changes: Any) -> PlanInputs:
        defaults: dict[str, Any] = {
            "base_digests": {},
            "data_digest": "",
            "lora": LoraSection(ranks=(4,), alpha=8),
            "quantization": "nf4",
            "training": TrainingSection(steps=2, batch_size=2),
            "launch": launch_facts(config),
            "processes": 1,
            "seed": 7,
        }
        return PlanInputs(**{**defaults, **changes})

    return make


@pytest.fixture
def plan_result() -> Callable[..., PlanResult]:
    """Return a function that makes a plan from the costs of its runs, which are 0 by default.

    It communicates 10⁹ weights without any reuse.
    """
    no_cost = {name: 0 for name in RunCost.model_fields if RunCost.model_fields[name].is_required()}
    weights = CommunicatedWeights(
        plain_bytes=2 * GATHERED,
        trained_bytes=GATHERED,
        first_bytes=GATHERED,
        again_bytes=GATHERED,
        block_bytes=GATHERED,
        persistent_bytes=0,
        shared_numbers=GATHERED // 2,
    )

    def make(runs: Runs, scaling: tuple[Configuration, ...] = ()) -> PlanResult:
        costs = {}
        for label, cost in runs.items():
            costs[label] = RunCost.model_validate({**no_cost, "uncounted": (), "less": (), **cost})
        return PlanResult(
            weights=(),
            targets=(),
            runs=costs,
            setup=PlannedSetup(sharding="ddp", tokens=100, checkpointing=False),
            tokens_of_a_step=100_000.0,
            scaling=scaling,
            comfortable_share=0.9,
            communication=Communication(
                weights=dict.fromkeys(METHODS, weights),
                exchange=Exchange(sharding="ddp", processes=1, reuse_weights=0),
            ),
        )

    return make


@pytest.fixture
def planned(
    tiny_folder: Path, tmp_path: Path, plan_inputs: Callable[..., PlanInputs]
) -> Callable[..., PlanResult]:
    """Return a function from a lora section to its plan on the tiny model and four examples."""
    rows = {"input_ids": [[1] * 20] * 4, "supervised": [[False] * 10 + [True] * 10] * 4}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "train")

    def make(
        config: str = "cpu_single",
        processes: int = 1,
        quantization: str = "nf4",
        *,
        gradient_checkpointing: bool = False,
        **lora: Any,
    ) -> PlanResult:
        inputs = plan_inputs(
            config,
            lora=LoraSection(**{"ranks": (4,), "alpha": 8, **lora}),
            quantization=quantization,
            training=TrainingSection(
                steps=2, batch_size=2, gradient_checkpointing=gradient_checkpointing
            ),
            processes=processes,
        )
        paths = StagePaths(base=str(tiny_folder), data=str(tmp_path))
        return plan(tmp_path, inputs, paths)[0]

    return make
