"""A recipe computes where its launch config requires, also on a host with GPUs."""

import os

import pytest

from pipelines.orchestration import concurrency
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
