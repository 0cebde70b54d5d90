"""The options of `lora plan` that describe a cluster; cluster_tables.py has its tables.

`lora --help` imports this file, so it imports no library that takes long.
"""

from dataclasses import dataclass, fields
from typing import Annotated

import typer

from lora_core.budget.wire import seconds_on_wire
from pipelines.errors import PipelineError

GBIT = 100.0
DISK_GB_PER_SECOND = 1.0
ONLY_WITH_GPUS = ("disk_gb_per_second", "failures_per_gpu_year", "tokens_per_second")


@dataclass(frozen=True)
class Cluster:
    """The GPUs for which a plan is made; a missing option has the default that its help names."""

    gpu_gb: Annotated[
        float | None,
        typer.Option(help="Also print which configurations fit GPUs of this size.", min=1),
    ] = None
    gpus: Annotated[
        int | None,
        typer.Option(help="Also print traffic and checkpoints of a job on so many GPUs.", min=1),
    ] = None
    gbit: Annotated[
        float | None,
        typer.Option(
            help="10⁹ bits per second that each GPU sends; 100.", min=0.001, show_default=False
        ),
    ] = None
    disk_gb_per_second: Annotated[
        float | None,
        typer.Option(
            help="10⁹ bytes per second that one process writes; 1.", min=0.001, show_default=False
        ),
    ] = None
    failures_per_gpu_year: Annotated[
        float | None,
        typer.Option(
            help="How often a GPU ends a job; 0.173, as in Llama 3's report.",
            min=1e-9,
            show_default=False,
        ),
    ] = None
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            help="Of the complete job; with it, checkpoint intervals are in steps.",
            min=1e-9,
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        without_effect = list(ONLY_WITH_GPUS) if self.gpus is None else []
        if self.gpu_gb is None and self.gpus is None:
            without_effect.append("gbit")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name in without_effect:
                option = field.name.replace("_", "-")
                raise PipelineError(
                    f"--{option} {value:g} has no effect without --gpus; "
                    "give the number of GPUs too"
                )

    def seconds(self, sent_bytes: int) -> float:
        """Return how long a GPU needs to send this many bytes."""
        return seconds_on_wire(sent_bytes, self.gbit or GBIT)
