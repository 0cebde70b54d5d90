"""The plan of a lora section on the tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pipelines.config.sections import LoraSection
from pipelines.planning.plan import plan
from pipelines.runtime.sharding import sharding


@pytest.fixture
def planned(tiny_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
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
    ) -> dict[str, Any]:
        section = LoraSection(**{"ranks": (4,), "alpha": 8, **lora})
        inputs = {
            "ranks": list(section.ranks),
            "lora": section.model_dump(mode="json"),
            "quantization": quantization,
            "training": {
                "steps": 2,
                "batch_size": 2,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": gradient_checkpointing,
            },
            "processes": processes,
            "seed": 7,
        }
        paths = {"base": str(tiny_folder), "data": str(tmp_path)}
        return plan(tmp_path, inputs | sharding(config), paths)[0]

    return make
