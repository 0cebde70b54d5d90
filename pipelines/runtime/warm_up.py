"""Do once, at set-up, what would otherwise stop the first run: compile the operator that DeepSpeed uses on CPUs.

    python -m pipelines.runtime.warm_up

Two ranks that compile at a time would wait for each other; and a run should not spend a minute on a compiler.
"""

import os
import sys
from pathlib import Path

from pipelines.runtime.launcher import WITHOUT_GPUS


def main() -> None:
    """Compile for the launches on the CPU, which a host with GPUs may run as well."""
    os.environ.update(WITHOUT_GPUS)
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )  # ninja
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":  # neither CUDA nor another that DeepSpeed would prefer
        accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    main()
