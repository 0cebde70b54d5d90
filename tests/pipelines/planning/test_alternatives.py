"""A plan lists recipe changes that need less memory, and the cost of up to 512 GPUs."""

from collections.abc import Callable
from itertools import product

import pytest

from lora_core.budget.setup import METHODS
from lora_core.budget.wire import SHARDINGS
from pipelines.planning.fitting import what_would_fit
from pipelines.runtime.interfaces.plan_result import PlanResult

Planned = Callable[..., PlanResult]


def test_a_plan_lists_single_changes_that_need_less_memory(planned: Planned) -> None:
    run = planned(config="gpu_ddp").runs["rank-4"]
    less = {change.setting: change for change in run.less}
    assert set(less) == {
        "training.gradient_checkpointing",
        "training.gradient_accumulation_steps",
        "data.max_tokens",
    }
    checkpointing = less["training.gradient_checkpointing"]
    assert checkpointing.value is True
    assert checkpointing.memory_bytes == run.other_checkpointing_bytes
    assert less["training.gradient_accumulation_steps"].value == 2
    assert less["data.max_tokens"].value == 10
    assert all(change.memory_bytes < run.memory_bytes for change in run.less)


def test_a_plan_lists_launches_that_shard_more(planned: Planned) -> None:
    less = planned(config="gpu_zero1", processes=2, quantization="none").runs["control"].less
    launches = {}
    for change in less:
        if change.setting == "launch.config":
            launches[change.value] = change.memory_bytes
    assert set(launches) <= {"gpu_zero2", "gpu_zero3", "gpu_zero3_offload"}
    zero2 = planned(config="gpu_zero2", processes=2, quantization="none").runs["control"]
    assert launches["gpu_zero2"] == zero2.memory_bytes


def test_offloading_is_not_suggested_on_a_cpu(planned: Planned) -> None:
    less = planned(config="cpu_zero1", processes=2).runs["control"].less
    assert "cpu_zero3_offload" not in {change.value for change in less}


def test_ddp_on_two_ranks_sends_half_of_the_float32_gradient_twice(planned: Planned) -> None:
    runs = planned(config="cpu_ddp", processes=2).runs
    for run in runs.values():
        assert run.sent_bytes == 4 * run.trained_weights


def test_a_single_process_sends_nothing(planned: Planned) -> None:
    assert planned().runs["control"].sent_bytes == 0


def test_scaling_has_every_configuration_on_up_to_512_gpus(planned: Planned) -> None:
    configurations = [(one.method, one.sharding, one.processes) for one in planned().scaling]
    counts = [2**power for power in range(10)]
    assert configurations == list(product(METHODS, SHARDINGS, counts))


def test_only_full_fine_tuning_under_ddp_can_use_the_8_bit_optimizer(planned: Planned) -> None:
    result = planned()
    trained = result.runs["control"].trained_weights
    saved = (4 - 1 - 4 / 256) * 2 * trained  # two moments
    for configuration in result.scaling:
        cost = configuration.without_checkpointing
        difference = cost.memory_bytes - cost.eight_bit_bytes
        if (configuration.method, configuration.sharding) != ("full", "ddp"):
            assert difference == 0
        elif configuration.processes == 2:
            assert difference == pytest.approx(saved, abs=1)
            assert cost.sent_bytes == 4 * trained  # gradients of float32 masters


def test_the_advice_after_running_out_of_memory_quotes_the_plan(planned: Planned) -> None:
    advice = what_would_fit(planned(config="gpu_ddp"), "rank-4 lr 0.001")
    assert advice.startswith("rank-4 was expected to need 1.07\u00a0GB in each process")
    assert "training.gradient_checkpointing: true (" in advice
    assert "training.gradient_accumulation_steps: 2 (" in advice
    assert "data.max_tokens: 10 (" in advice
