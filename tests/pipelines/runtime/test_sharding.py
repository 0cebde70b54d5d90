"""What launch configs mean, and which combinations with a recipe are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_recipe

from pipelines.config.recipe import Recipe, parse_recipe
from pipelines.errors import RecipeError
from pipelines.runtime.launcher import CONFIGS
from pipelines.runtime.sharding import check_launch, launch_facts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu_single", {"device": "cpu", "sharding": "ddp"}),
        (
            "cpu_zero2",
            {
                "device": "cpu",
                "sharding": "zero2",
                "bucket_weights": 50_000_000,
                "reduces_to_owner": False,
            },
        ),
        ("gpu_zero2", {"device": "gpu", "sharding": "zero2", "bucket_weights": 50_000_000}),
        (
            "gpu_zero3",
            {"sharding": "zero3", "persistent_weights": 100_000, "reuse_weights": 1_000_000_000},
        ),
        ("gpu_zero3_offload", {"device": "gpu", "sharding": "zero3_offload"}),
        # On a CPU, host and process share one memory.
        ("cpu_zero3_offload", {"device": "cpu", "sharding": "zero3"}),
    ],
)
def test_sharding_of_the_included_launch_configs(name: str, expected: dict[str, Any]) -> None:
    assert launch_facts(name).plain().items() >= expected.items()


def config(folder: Path, deepspeed: dict[str, Any] | None = None, **settings: Any) -> str:
    """Save an accelerate config, and DeepSpeed's config if given; return its path."""
    if deepspeed is not None:
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
        section = {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            **settings.pop("deepspeed_config", {}),
        }
        settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": section, **settings}
    (folder / "launch.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "launch.yaml")


def recipe(launch: str, processes: int = 2, **changes: Any) -> Recipe:
    settings = {"config": launch, "processes": processes}
    return parse_recipe(tiny_recipe(Path("model"), Path("pairs.jsonl"), launch=settings, **changes))


def test_a_zero_stage_in_the_keys_of_accelerate(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        distributed_type="DEEPSPEED",
        deepspeed_config={"zero_stage": 3, "offload_optimizer_device": "cpu"},
    )
    assert launch_facts(path).sharding == "zero3_offload"


def test_gradients_that_are_reduced_to_their_owner_only(tmp_path: Path) -> None:
    path = config(
        tmp_path, {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}}
    )
    assert launch_facts(path).reduces_to_owner


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="distributed_type XLA"):
        launch_facts(config(tmp_path, distributed_type="XLA"))


def test_a_missing_deepspeed_config_is_refused(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        distributed_type="DEEPSPEED",
        deepspeed_config={"deepspeed_config_file": "infra/zero9.json"},
    )
    with pytest.raises(RecipeError, match=r"'infra/zero9\.json', and there is no"):
        launch_facts(path)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_included_configs_are_accepted(name: str, quantization: str) -> None:
    processes = 1 if name.endswith("single") else 2
    check_launch(recipe(name, processes, base_model={"quantization": quantization}))


FSDP = {"distributed_type": "FSDP"}
STAGE3 = {"zero_optimization": {"stage": 3}}
INIT = {"deepspeed_config": {"zero3_init_flag": True}}
DENSE = {"base_model": {"quantization": "none"}}
REFUSED: list[tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any], str]] = [
    (
        None,
        {"distributed_type": "NO", "use_cpu": True},
        {},
        "starts one process, but launch.processes is 2; use cpu_ddp",
    ),
    (None, {"distributed_type": "MULTI_CPU", "use_cpu": True}, {}, "distributed_type MULTI_CPU"),
    (
        None,
        {**FSDP, "use_cpu": True},
        {},
        "silently replaces with DDP, so that nothing would be sharded; use cpu_zero3",
    ),
    (None, FSDP, {}, "nf4 codes are bytes among floating-point weights; use gpu_zero3"),
    (None, FSDP, DENSE, "not gathered when checkpoints and adapters are saved"),
    (STAGE3, INIT, {}, "4-bit codes are computed from complete weights"),
    (STAGE3, INIT, DENSE, "which has no effect: each rank loads the complete base"),
    ({**STAGE3, "bf16": {"enabled": True}}, {"use_cpu": True}, {}, "forces bf16 on a CPU"),
    (
        STAGE3,
        {"use_cpu": True, "mixed_precision": "fp16"},
        {},
        "forces mixed_precision fp16 on a CPU",
    ),
    (
        {"zero_optimization": {"stage": 0}},
        {},
        {},
        "stage 0, which shards nothing and would not clip gradients; use gpu_ddp",
    ),
    (
        {**STAGE3, "gradient_accumulation_steps": 2},
        {},
        {},
        "gradient_accumulation_steps to 2, but training.gradient_accumulation_steps is 1",
    ),
    ({**STAGE3, "optimizer": {"type": "Adam"}}, {}, {}, "DeepSpeed's own optimizer"),
]


@pytest.mark.parametrize(
    ("deepspeed", "settings", "changes", "message"), REFUSED, ids=[row[-1] for row in REFUSED]
)
def test_an_impossible_combination_is_refused_with_the_reason(
    tmp_path: Path,
    deepspeed: dict[str, Any] | None,
    settings: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_launch(recipe(config(tmp_path, deepspeed, **settings), **changes))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"launch.config '{tmp_path / 'launch.yaml'}' ")


@pytest.mark.parametrize(
    ("deepspeed", "settings"),
    [
        (
            {**STAGE3, "bf16": {"enabled": "auto"}, "gradient_accumulation_steps": "auto"},
            {"use_cpu": True},
        ),
        ({**STAGE3, "bf16": {"enabled": True}}, {"use_cpu": False}),
        ({**STAGE3, "gradient_accumulation_steps": 1}, {}),
    ],
)
def test_a_working_combination_is_accepted(
    tmp_path: Path, deepspeed: dict[str, Any], settings: dict[str, Any]
) -> None:
    check_launch(recipe(config(tmp_path, deepspeed, **settings)))


def test_all_reasons_are_reported_at_once(tmp_path: Path) -> None:
    path = config(tmp_path, {**STAGE3, "optimizer": {}, "gradient_accumulation_steps": 8})
    with pytest.raises(RecipeError, match="is 1; set the first to 'auto'; and defines"):
        check_launch(recipe(path))
