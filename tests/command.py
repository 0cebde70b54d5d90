"""The command line, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

LORA = [str(Path(sys.executable).parent / "lora")]


def lora(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a folder, as a user does."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "LORA_RUNS": str(folder / "runs"),
        **environment,
    }
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        if name not in environment:
            env.pop(name, None)
    return subprocess.run(
        [*LORA, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
