"""Where the stages of a recipe compute, and on how many cores."""

import os

import pytest

from pipelines.orchestration import concurrency
from pipelines.runtime.launcher import threads_each
from pipelines.runtime.sharding import hide_gpus_if_on_cpu


@pytest.mark.parametrize(
    ("config", "names"),
    [("cpu_zero2", ["cpu:node-a"]), ("gpu_zero2", ["gpu:node-a:0", "gpu:node-a:1"])],
)
def test_a_cpu_launch_config_hides_the_gpus_and_holds_no_gpu_slot(
    monkeypatch: pytest.MonkeyPatch, config: str, names: list[str]
) -> None:
    monkeypatch.setattr(concurrency, "gethostname", lambda: "node-a")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    hide_gpus_if_on_cpu(config)
    assert (os.environ["CUDA_VISIBLE_DEVICES"] == "") == config.startswith("cpu")
    assert concurrency.slot_names(2) == names


def test_the_cores_are_divided_and_the_user_may_limit_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for limit, processes, expected in (
        ("", 1, 8),
        ("", 3, 2),
        ("4", 1, 4),
        ("4", 2, 2),
        ("1", 2, 1),
        ("64", 1, 8),
        ("4,2", 1, 4),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
        assert threads_each(processes) == expected
