"""A base whose weights are divided among processes is refused before anything changes.

Each case has a process group, so it runs in a process of its own: PyTorch keeps a group in a
thread, and a process that is forked later from another thread would wait for it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

CASE = """
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lora_core import LoraConfig, TargetError, inject

store, target = sys.argv[1:]
dist.init_process_group("gloo", store=dist.FileStore(store, 1), rank=0, world_size=1)
model = nn.ModuleDict({"divided": nn.Linear(8, 8), "plain": nn.Linear(8, 8)})
parallelize_module(model["divided"], init_device_mesh("cpu", (1,)), ColwiseParallel())
try:
    inject(model, LoraConfig(r=2, lora_alpha=2, target_modules=(target,)), seed=0)
except TargetError as error:
    print(error)
assert all(type(module) is nn.Linear for module in model.values())
assert torch.is_grad_enabled() and all(one.requires_grad for one in model.parameters())
dist.destroy_process_group()
"""


@pytest.mark.parametrize("target", ["divided", "plain"])
def test_tensor_parallel_base_is_refused(tmp_path: Path, target: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CASE, str(tmp_path / "store"), target],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "divided.weight is divided among processes" in ended.stdout
    assert "tp_plan" in ended.stdout
