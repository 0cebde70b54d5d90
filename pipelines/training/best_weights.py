"""The weights with the lowest held-out loss, on disk next to the checkpoints.

    <stage>/checkpoints/best/step-00010/adapter    or model, as they are saved at the end

Each improvement is saved in the folder of its step. A run that resumes from a checkpoint also
resumes from the weights that were the best ones at that checkpoint, so these stay until no
checkpoint needs them.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_core import LoraConfig
from lora_core.files import atomic_folder
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.training.checkpoint import checkpoint_folders, folder_name
from pipelines.training.engine import Engine
from pipelines.training.output import output_folder, write_trained

BEST = "best"


@dataclass(frozen=True)
class BestWeights:
    """The folder of the best weights of one run."""

    folder: Path
    """best/ in the folder of the checkpoints."""

    def save(
        self, engine: Engine, config: LoraConfig | None, inputs: TrainInputs, step: int
    ) -> None:
        """Save the weights after `step` steps. A collective: every rank calls it."""
        write_trained(engine, config, inputs, self.of_step(step))

    def of_step(self, step: int) -> Path:
        """Return the folder of the weights after `step` steps."""
        return self.folder / folder_name(step)

    def remove_all_but(self, steps: Iterable[int]) -> None:
        """Remove the weights of all other steps."""
        kept = {folder_name(step) for step in steps}
        for folder in checkpoint_folders(self.folder):
            if folder.name not in kept:
                shutil.rmtree(folder)

    def publish(self, step: int, parent: Path, config: LoraConfig | None) -> None:
        """Copy the weights after `step` steps into the stage's folder.

        They are copied, not moved: a run that is killed before its result is written resumes from
        a checkpoint, which needs them.

        Args:
            step: number of steps after which the weights were saved.
            parent: folder of the stage.
            config: the adapter's; None for full fine-tuning.
        """
        name = output_folder(config)
        with atomic_folder(parent / name) as temporary:
            shutil.copytree(self.of_step(step) / name, temporary, dirs_exist_ok=True)
