"""Compile, once, the operator that DeepSpeed uses on CPUs.

    python -m pipelines.runtime.warm_up

At setup, the first run would otherwise spend a minute on it. Under another HOME, it is compiled
before the ranks start: PyTorch protects a build by a file that remains if the process is killed,
and every later rank would wait for that file without a limit.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock

from pipelines.runtime import launcher
from pipelines.runtime.child import die_with_parent
from pipelines.runtime.processes import running_processes

OPERATOR = "deepspeed_shm_comm"
BUILD_LOCK = "lock"
"""PyTorch's file in the build folder; it exists during a build."""
OWN_LOCK = "lora-pipeline.lock"
"""The kernel releases this lock if its process is killed."""


def main() -> None:
    """Compile for CPU launch configs, which a host with GPUs may use too."""
    os.environ.update(launcher.WITHOUT_GPUS)
    os.environ[launcher.EXTENSIONS] = str(launcher.extensions_folder())
    tools = str(Path(sys.executable).parent)  # ninja
    os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")])
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":  # neither CUDA nor another device that DeepSpeed prefers
        accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)


def ensure_compiled() -> None:
    """Compile the operator in one process unless it is there; a failure is left to the ranks."""
    root = launcher.extensions_folder()
    if _is_compiled(root):
        return
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / OWN_LOCK):
        for folder in _build_folders(root):
            if not _is_being_built(folder):
                (folder / BUILD_LOCK).unlink(missing_ok=True)
        if _is_compiled(root):
            return
        subprocess.run(
            [sys.executable, "-m", "pipelines.runtime.warm_up"],
            env={**os.environ, "PYTHONPATH": str(launcher.REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # one system call, takes no lock
            check=False,
        )


def _build_folders(root: Path) -> list[Path]:
    """Return the operator's folders, one for each kind of PyTorch that built it."""
    return [*root.glob(OPERATOR), *root.glob(f"*/{OPERATOR}")]


def _is_compiled(root: Path) -> bool:
    for folder in _build_folders(root):
        if (folder / f"{OPERATOR}.so").is_file() and not (folder / BUILD_LOCK).exists():
            return True
    return False


def _is_being_built(folder: Path) -> bool:
    """Return whether a compiler works in a folder."""
    for process in running_processes():
        with suppress(psutil.Error):
            if Path(process.cwd()) == folder.resolve():
                return True
    return False


if __name__ == "__main__":
    main()
