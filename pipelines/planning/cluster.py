"""`lora plan` on more GPUs than there are here: what fits, what goes over the wire, and how often to keep a checkpoint. Pure.

All of it is for training in bfloat16 with as many tokens at once on each GPU as the recipe gives a process.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer
from rich.table import Table

from lora_core.budget.checkpoints import (
    FAILURES_PER_GPU_YEAR,
    best_interval_seconds,
    checkpoint_bytes,
    lost_share,
    seconds_between_failures,
)
from lora_core.budget.wire import (
    SHARDINGS,
    Exchange,
    Moved,
    Sharding,
    Traffic,
    seconds_on_wire,
    wire_bytes,
)
from pipelines.errors import PipelineError

GBIT = 100.0
DISK_GB_PER_SECOND = 1.0
GIB = 1024**3
"""A card sold as 24 GB holds 24 GiB."""
LEVELS = ("", "checkpointed_")
"""Without and with gradient checkpointing: how the plan's names of their figures begin."""
METHODS = ("full", "lora", "qlora")
TITLE_WIDTH = 78
"""Columns that a title of two lines needs; a table is as wide at least."""


@dataclass(frozen=True)
class Cluster:
    """Which GPUs a plan is made for; what is left out is not asked about, or has the default that its help names."""

    gpu_gb: Annotated[
        float | None,
        typer.Option(help="Also print which ways of training fit GPUs of this size.", min=1),
    ] = None
    gpus: Annotated[
        int | None,
        typer.Option(help="Also print traffic and checkpoints of a job on so many GPUs.", min=1),
    ] = None
    gbit: Annotated[
        float | None,
        typer.Option(
            help="10⁹ bits a second that each GPU sends; 100.", min=0.001, show_default=False
        ),
    ] = None
    disk_gb_per_second: Annotated[
        float | None,
        typer.Option(
            help="10⁹ bytes a second that one process writes; 1.", min=0.001, show_default=False
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
            help="Of the whole job; with it, checkpoints are counted in steps.",
            min=1e-9,
            show_default=False,
        ),
    ] = None

    def __post_init__(self) -> None:
        alone = {"gbit": self.gpu_gb is None and self.gpus is None}
        alone |= dict.fromkeys(
            ("disk_gb_per_second", "failures_per_gpu_year", "tokens_per_second"), self.gpus is None
        )
        for field in fields(self):
            if getattr(self, field.name) is not None and alone.get(field.name, False):
                option = field.name.replace("_", "-")
                raise PipelineError(
                    f"--{option} {getattr(self, field.name):g} has no effect without --gpus; give the number of GPUs too"
                )

    def seconds(self, sent_bytes: int) -> float:
        """Return how long a GPU sends so many bytes."""
        return seconds_on_wire(sent_bytes, self.gbit or GBIT)


def scaling_table(plan: dict[str, Any], cluster: Cluster, gpu_gb: float) -> Table:
    """Print the first way of sharing that fits, for each method on 1 to 512 GPUs, and what it costs a step to send."""
    ways = {(way["method"], way["processes"], way["sharding"]): way for way in plan["scaling"]}
    counts = sorted({count for _, count, _ in ways})
    title = (
        f"How much must be shared on GPUs of {gpu_gb:g} GB: the first that fits of {', '.join(SHARDINGS)} (8: with the "
        "paged 8-bit AdamW, c: with gradient checkpointing), and the seconds that a step's traffic takes at "
        f"{cluster.gbit or GBIT:g} Gbit/s with nothing beside it"
    )
    table = Table("GPUs", *METHODS, title=title, title_justify="left", min_width=TITLE_WIDTH)
    for count in counts:
        cells = [
            first_that_fits(
                [ways[method, count, sharding] for sharding in SHARDINGS],
                cluster,
                gpu_gb,
                plan["comfortable_share"],
            )
            for method in METHODS
        ]
        table.add_row(str(count), *cells)
    return table


def first_that_fits(
    ways: list[dict[str, Any]], cluster: Cluster, gpu_gb: float, comfortable: float
) -> str:
    """Return the first way that fits as it is, or else the first with checkpointing, and its seconds on the wire."""
    for level in LEVELS:
        for way in ways:
            used, mark = memory_of(way, level, gpu_gb, comfortable)
            if used <= gpu_gb * GIB:
                sent = way[level + "sent_bytes"]
                return f"{way['sharding']}{mark and f' {mark}'}" + (
                    f" {duration(cluster.seconds(sent))}" if sent else ""
                )
    return "×"


def memory_of(
    way: dict[str, Any], level: str, gpu_gb: float, comfortable: float
) -> tuple[int, str]:
    """Return what a way takes of a GPU in bytes, and its mark: 8 where AdamW in 8 bits is taken, c with checkpointing, 8c.

    Args:
        way: of the plan's `scaling`.
        level: one of LEVELS.
        gpu_gb: of the GPU.
        comfortable: the share of it above which full fine-tuning takes the 8 bits; see `pipelines.models.hardware.choose_optimizer`.
    """
    plain, eight_bit = (
        way["checkpointed_bytes" if level else "memory_bytes"],
        way[f"{level}eight_bit_bytes"],
    )
    takes_eight = eight_bit < plain and plain > comfortable * gpu_gb * GIB
    return (eight_bit if takes_eight else plain), "8" * takes_eight + "c" * bool(level)


def traffic_table(plan: dict[str, Any], cluster: Cluster, gpus: int) -> Table:
    """Print what each GPU sends in a step under each way of sharing, and for how long."""
    how = plan["exchanged"]["exchange"]
    again = "with" if how["checkpointing"] else "without"
    title = (
        f"What each of {gpus} GPUs sends in a step of {how['gradient_accumulation_steps']} part{'s' * (how['gradient_accumulation_steps'] > 1)}, {again} gradient "
        f"checkpointing, and seconds at {cluster.gbit or GBIT:g} Gbit/s with nothing beside it"
    )
    table = Table("sharing", *METHODS, title=title, title_justify="left")
    for sharding in SHARDINGS:
        sent = [traffic_on(plan, method, sharding, gpus) for method in METHODS]
        table.add_row(sharding, *(_sent(one, cluster) for one in sent))
    return table


def traffic_on(plan: dict[str, Any], method: str, sharding: Sharding, gpus: int) -> Traffic:
    """Return what each GPU sends in a step."""
    figures = plan["exchanged"]
    return wire_bytes(
        Moved(**figures["weights"][method]),
        Exchange(sharding=sharding, processes=gpus, **figures["exchange"]),
    )


def checkpoints_table(plan: dict[str, Any], cluster: Cluster, gpus: int) -> Table:
    """Print the size of each run's checkpoint and how often to write one, by Young's and Daly's rule."""
    rate = cluster.failures_per_gpu_year or FAILURES_PER_GPU_YEAR
    between, disk = (
        seconds_between_failures(rate, gpus),
        cluster.disk_gb_per_second or DISK_GB_PER_SECOND,
    )
    title = (
        f"Checkpoints of trained weights and Adam's means in float32: {gpus} GPUs fail every {duration(between)} "
        f"({rate:g} times a year each), and one process writes {disk:g} GB/s"
    )
    table = Table(
        "run",
        "size",
        "written in",
        "write every",
        "time lost",
        title=title,
        title_justify="left",
        min_width=TITLE_WIDTH,
    )
    for label, run in plan["runs"].items():
        size = checkpoint_bytes(run["trained_weights"])
        written = size / (disk * 1e9)
        interval = best_interval_seconds(written, between)
        every = interval_words(interval, plan["tokens_of_a_step"], cluster.tokens_per_second)
        table.add_row(
            label,
            _bytes(size),
            duration(written),
            every,
            f"{lost_share(interval, written, between):.3%}",
        )
    return table


def interval_words(seconds: float, tokens_of_a_step: float, tokens_per_second: float | None) -> str:
    """Say an interval in steps where their time is known, and else in time; at least one step."""
    if tokens_per_second is None:
        return duration(seconds)
    steps = max(1, round(seconds * tokens_per_second / tokens_of_a_step))
    return f"{steps:,} step{'s' * (steps > 1)} ({duration(steps * tokens_of_a_step / tokens_per_second)})"


def duration(seconds: float) -> str:
    """Say a time in the unit in which it is a small number."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _sent(traffic: Traffic, cluster: Cluster) -> str:
    host = f" (+ {_bytes(traffic.host_bytes)} to the host)" if traffic.host_bytes else ""
    return f"{_bytes(traffic.wire_bytes)}, {duration(cluster.seconds(traffic.wire_bytes))}{host}"


def _bytes(size: int) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9)):
        if size >= length:
            return f"{size / length:.3g} {unit}"
    return f"{size / 1e6:.3g} MB"
