"""A recipe computes where its launch config says, also on a host that has GPUs."""

import os

import pytest

from pipelines.orchestration import concurrency
from pipelines.runtime.sharding import keep_to_device


@pytest.mark.parametrize(
    ("config", "names"),
    [("cpu_zero2", ["cpu:node-a"]), ("gpu_zero2", ["gpu:node-a:0", "gpu:node-a:1"])],
)
def test_a_launch_for_the_cpu_sees_no_gpu_and_holds_no_slot_of_one(
    monkeypatch: pytest.MonkeyPatch, config: str, names: list[str]
) -> None:
    monkeypatch.setattr(concurrency, "gethostname", lambda: "node-a")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    keep_to_device(config)
    assert (os.environ["CUDA_VISIBLE_DEVICES"] == "") == config.startswith("cpu")
    assert concurrency.slot_names(2) == names
