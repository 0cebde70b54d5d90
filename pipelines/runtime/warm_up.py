"""Compile, once at setup, the operator that DeepSpeed uses on CPUs.

    python -m pipelines.runtime.warm_up

Otherwise the first run would spend a minute on it, and two ranks that compile at the same time
would wait for each other.
"""

import os
import sys
from pathlib import Path

from pipelines.runtime.launcher import WITHOUT_GPUS


def main() -> None:
    """Compile for CPU launch configs, which a host with GPUs may use too."""
    os.environ.update(WITHOUT_GPUS)
    tools = str(Path(sys.executable).parent)  # ninja
    os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")])
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":  # neither CUDA nor another device that DeepSpeed prefers
        accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    main()
