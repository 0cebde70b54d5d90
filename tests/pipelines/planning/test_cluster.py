"""Memory, traffic and checkpoints of a plan on a cluster of GPUs."""

from collections.abc import Callable
from itertools import product
from typing import Annotated, Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from lora_core.budget.wire import SHARDINGS, Sharding
from pipelines.cli import with_options
from pipelines.errors import PipelineError
from pipelines.planning.cluster import Cluster
from pipelines.planning.cluster_tables import (
    METHODS,
    checkpoints_table,
    first_that_fits,
    interval_words,
    scaling_table,
    traffic_on,
    traffic_table,
)
from pipelines.runtime.interfaces.plan_result import (
    Configuration,
    ConfigurationCost,
    PlanResult,
    TrainingMethod,
)

GIB = 1024**3


def configuration(
    sharding: Sharding,
    gib: float,
    checkpointed: float,
    eight_bit: float | None = None,
    *,
    method: TrainingMethod = "full",
    processes: int = 1,
) -> Configuration:
    """Return an entry of the plan's `scaling`; sizes are in GiB."""
    eight_bit = eight_bit or gib
    return Configuration(
        method=method,
        sharding=sharding,
        processes=processes,
        without_checkpointing=ConfigurationCost(
            memory_bytes=round(gib * GIB),
            eight_bit_bytes=round(eight_bit * GIB),
            sent_bytes=12_500_000_000,
        ),
        with_checkpointing=ConfigurationCost(
            memory_bytes=round(checkpointed * GIB),
            eight_bit_bytes=round(eight_bit / gib * checkpointed * GIB),
            sent_bytes=25_000_000_000,
        ),
    )


@pytest.fixture
def plan(plan_result: Callable[..., PlanResult]) -> PlanResult:
    """Return a plan for 1, 2 and 512 GPUs."""
    runs = {"rank-4": {"trained_weights": 10_000_000}, "control": {"trained_weights": 10**9}}
    scaling = []
    for method, processes, sharding in product(METHODS, (1, 2, 512), SHARDINGS):
        gib = 100 / processes
        one = configuration(sharding, gib, gib / 2, method=method, processes=processes)
        scaling.append(one)
    return plan_result(runs, tuple(scaling))


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize(
    ("gpu_gb", "expected"),
    [
        (48, "ddp 1 s"),
        (42, "ddp 8 1 s"),
        (26, "ddp 8 1 s"),
        (24, "zero2 1 s"),
        (15, "ddp 8c 2 s"),
        (12, "zero1 c 2 s"),
        (4, "×"),
    ],
)
def test_the_first_configuration_that_fits(gpu_gb: float, expected: str) -> None:
    """First without and then with checkpointing, in 8 bits if training uses them.

    The seconds are those of the bits at 100 Gbit/s.
    """
    configurations = [
        configuration("ddp", 40, 20, eight_bit=26),
        configuration("zero1", 30, 12),
        configuration("zero2", 20, 10),
        configuration("zero3", 16, 8),
    ]
    assert first_that_fits(configurations, Cluster(gpu_gb=gpu_gb), gpu_gb, 0.9) == expected


def test_twice_the_bandwidth_is_half_the_time() -> None:
    cluster = Cluster(gpu_gb=1, gbit=200)
    assert first_that_fits([configuration("ddp", 1, 1)], cluster, 1, 0.9) == "ddp 0.5 s"


def test_each_number_of_gpus_has_a_row(plan: PlanResult) -> None:
    lines = printed(scaling_table(plan, Cluster(gpu_gb=80), 80)).splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["1", "2", "512"]
    assert "ddp c" in rows[0]


def test_traffic_follows_the_formula(plan: PlanResult) -> None:
    """Each of 64 ranks sends 63/64 of 2 GB twice to gather, and once to scatter the gradient."""
    assert traffic_on(plan, "full", "zero3", 64).wire_bytes == 3 * 2_000_000_000 * 63 // 64
    text = printed(traffic_table(plan, Cluster(gpus=64, gbit=100), 64))
    assert "5.91\u00a0GB, 0.47 s" in text
    assert "62.5\u00a0MB to the host" in text


def test_the_checkpoint_interval_is_a_duration_or_steps(plan: PlanResult) -> None:
    """1.2e10 bytes in 12 s, and a failure every 33 days of 64 GPUs.

    √(2 · 12 s · 33 d) = 138 min, or 827 steps of 10 s.
    """
    in_time = printed(checkpoints_table(plan, Cluster(gpus=64), 64))
    in_steps = printed(checkpoints_table(plan, Cluster(gpus=64, tokens_per_second=10_000), 64))
    assert "12.0\u00a0GB" in in_time
    assert "2 h 18 min" in in_time
    assert "827 steps" in in_steps


def test_a_faster_disk_and_more_failures_both_reduce_the_interval(plan: PlanResult) -> None:
    cluster = Cluster(gpus=64, disk_gb_per_second=4, failures_per_gpu_year=0.692)
    text = printed(checkpoints_table(plan, cluster, 64))
    assert "34 min 28 s" in text  # 138 min / √4 / √4


def test_an_interval_is_at_least_one_step() -> None:
    assert interval_words(0.1, 1000, 10) == "1 step (1 min 40 s)"


@pytest.mark.parametrize(
    "option", ["gbit", "disk_gb_per_second", "failures_per_gpu_year", "tokens_per_second"]
)
def test_an_option_without_effect_is_rejected(option: str) -> None:
    message = f"--{option.replace('_', '-')} 2 has no effect without --gpus"
    with pytest.raises(PipelineError, match=message):
        Cluster(**{option: 2})
    Cluster(gpus=8, **{option: 2})


def test_a_command_takes_the_fields_of_a_dataclass_as_options() -> None:
    app = typer.Typer()
    calls = []

    @app.command()
    @with_options("cluster", Cluster)
    def plan(
        recipe: Annotated[str, typer.Argument()],
        cluster: Cluster,
        rank: Annotated[list[int], typer.Option()] = [],  # noqa: B006
    ) -> None:
        calls.append((recipe, cluster, rank))

    arguments = ["mine", "--gpu-gb", "80", "--rank", "4", "--gpus", "64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert calls == [("mine", Cluster(gpu_gb=80.0, gpus=64), [4])]
    assert CliRunner().invoke(app, ["mine", "--gpus", "0"]).exit_code == 2
