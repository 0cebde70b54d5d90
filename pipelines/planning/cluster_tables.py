"""`lora plan` for a cluster: what fits, network traffic, and checkpoint intervals. Pure.

All numbers are for training in bfloat16 with as many tokens per micro-batch as the recipe gives a
process.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from rich.table import Table

from lora_core.budget.checkpoints import (
    FAILURES_PER_GPU_YEAR,
    best_interval_seconds,
    checkpoint_bytes,
    lost_fraction,
    seconds_between_failures,
)
from lora_core.budget.wire import SHARDINGS, Sharding, Traffic, wire_bytes
from pipelines.planning.cluster import DISK_GB_PER_SECOND, GBIT, Cluster
from pipelines.reporting.formats import duration, short_size
from pipelines.runtime.interfaces.plan_result import Configuration, PlanResult, TrainingMethod

GIB = 1024**3
"""A GPU sold as 24 GB has 24 GiB."""
LEVELS = (False, True)
"""Without and with gradient checkpointing, in the order in which they are tried."""
METHODS: tuple[TrainingMethod, ...] = get_args(TrainingMethod)
TITLE_WIDTH = 78
"""Columns needed for a title of two lines; the minimum width of a table."""


def scaling_table(plan: PlanResult, cluster: Cluster, gpu_gb: float) -> Table:
    """Return the first sharding that fits, for each method on 1 to 512 GPUs, and its traffic.

    Args:
        plan: has memory and traffic of each configuration.
        cluster: has the speed of the network.
        gpu_gb: memory of a GPU in GiB, as GPUs are sold.
    """
    configurations = {(one.method, one.processes, one.sharding): one for one in plan.scaling}
    counts = sorted({count for _, count, _ in configurations})
    title = (
        f"Sharding needed on GPUs of {gpu_gb:g} GB: "
        f"the first that fits of {', '.join(SHARDINGS)} "
        "(8: with the paged 8-bit AdamW, c: with gradient checkpointing), "
        f"and the seconds of a step's traffic at {cluster.gbit or GBIT:g} Gbit/s without overlap"
    )
    table = Table("GPUs", *METHODS, title=title, title_justify="left", min_width=TITLE_WIDTH)
    for count in counts:
        cells = []
        for method in METHODS:
            shardings = [configurations[method, count, sharding] for sharding in SHARDINGS]
            cells.append(first_that_fits(shardings, cluster, gpu_gb, plan.comfortable_share))
        table.add_row(str(count), *cells)
    return table


def first_that_fits(
    configurations: Sequence[Configuration], cluster: Cluster, gpu_gb: float, comfortable: float
) -> str:
    """Return the first configuration that fits, with checkpointing if needed, and its traffic.

    Args:
        configurations: entries of the plan's `scaling`.
        cluster: the GPUs.
        gpu_gb: memory of a GPU.
        comfortable: see `memory_of`.
    """
    for checkpointing in LEVELS:
        for configuration in configurations:
            used, mark = memory_of(configuration, gpu_gb, comfortable, checkpointing=checkpointing)
            if used > gpu_gb * GIB:
                continue
            words: list[str] = [configuration.sharding]
            if mark:
                words.append(mark)
            sent = configuration.cost(checkpointing=checkpointing).sent_bytes
            if sent:
                words.append(duration(cluster.seconds(sent)))
            return " ".join(words)
    return "×"


def memory_of(
    configuration: Configuration, gpu_gb: float, comfortable: float, *, checkpointing: bool
) -> tuple[int, str]:
    """Return the memory of a configuration in bytes, and its mark: 8, c, 8c or nothing.

    8 means with AdamW in 8 bits, c with gradient checkpointing.

    Args:
        configuration: an entry of the plan's `scaling`.
        gpu_gb: memory of a GPU.
        comfortable: the fraction of it above which full fine-tuning uses the 8 bits; see
            `pipelines.models.hardware.choose_optimizer`.
        checkpointing: with gradient checkpointing.
    """
    cost = configuration.cost(checkpointing=checkpointing)
    mark = "c" if checkpointing else ""
    is_tight = cost.memory_bytes > comfortable * gpu_gb * GIB
    if is_tight and cost.eight_bit_bytes < cost.memory_bytes:
        return cost.eight_bit_bytes, f"8{mark}"
    return cost.memory_bytes, mark


def traffic_table(plan: PlanResult, cluster: Cluster, gpus: int) -> Table:
    """Return what each GPU sends in a step under each sharding, and for how long.

    Args:
        plan: has the communicated weights of each method.
        cluster: has the speed of the network.
        gpus: number of processes, one on each GPU.
    """
    exchange = plan.communication.exchange
    micro_batches = _plural(exchange.gradient_accumulation_steps, "micro-batch", "micro-batches")
    checkpointing = "with" if exchange.checkpointing else "without"
    title = (
        f"What each of {gpus} GPUs sends in a step of {micro_batches}, "
        f"{checkpointing} gradient checkpointing, "
        f"and the seconds at {cluster.gbit or GBIT:g} Gbit/s without overlap"
    )
    table = Table("sharding", *METHODS, title=title, title_justify="left")
    for sharding in SHARDINGS:
        cells = []
        for method in METHODS:
            traffic = traffic_on(plan, method, sharding, gpus)
            cells.append(_format_traffic(traffic, cluster))
        table.add_row(sharding, *cells)
    return table


def traffic_on(plan: PlanResult, method: TrainingMethod, sharding: Sharding, gpus: int) -> Traffic:
    """Return what each GPU sends in a step.

    Args:
        plan: has the communicated weights of each method.
        method: of training.
        sharding: of the weights, gradients and optimizer state.
        gpus: number of processes, one on each GPU.
    """
    communication = plan.communication
    exchange = replace(communication.exchange, sharding=sharding, processes=gpus)
    return wire_bytes(communication.weights[method], exchange)


def checkpoints_table(plan: PlanResult, cluster: Cluster, gpus: int) -> Table:
    """Return each run's checkpoint size and best write interval, by Young's and Daly's formula.

    Args:
        plan: has the trained weights of each run.
        cluster: has the speed of the disk and how often a GPU fails.
        gpus: number of processes, one on each GPU.
    """
    failures = cluster.failures_per_gpu_year or FAILURES_PER_GPU_YEAR
    between_failures = seconds_between_failures(failures, gpus)
    disk = cluster.disk_gb_per_second or DISK_GB_PER_SECOND
    title = (
        "Checkpoints of trained weights and Adam's moments in float32: "
        f"{gpus} GPUs fail every {duration(between_failures)} ({failures:g} times a year each), "
        f"and one process writes {disk:g} GB/s"
    )
    columns = ("run", "size", "write time", "write every", "time lost")
    table = Table(*columns, title=title, title_justify="left", min_width=TITLE_WIDTH)
    for label, run in plan.runs.items():
        size = checkpoint_bytes(run.trained_weights)
        write_seconds = size / (disk * 1e9)
        interval = best_interval_seconds(write_seconds, between_failures)
        lost = lost_fraction(interval, write_seconds, between_failures)
        table.add_row(
            label,
            short_size(size),
            duration(write_seconds),
            interval_words(interval, plan.tokens_of_a_step, cluster.tokens_per_second),
            f"{lost:.3%}",
        )
    return table


def interval_words(seconds: float, tokens_of_a_step: float, tokens_per_second: float | None) -> str:
    """Return an interval in steps, at least one, if their time is known, and else as a duration.

    Args:
        seconds: between two checkpoints.
        tokens_of_a_step: mean, over all processes.
        tokens_per_second: of the complete job; None if it is not known.
    """
    if tokens_per_second is None:
        return duration(seconds)
    steps = max(1, round(seconds * tokens_per_second / tokens_of_a_step))
    rounded_seconds = steps * tokens_of_a_step / tokens_per_second
    return f"{_plural(steps, 'step', 'steps')} ({duration(rounded_seconds)})"


def _plural(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def _format_traffic(traffic: Traffic, cluster: Cluster) -> str:
    size = short_size(traffic.wire_bytes)
    time = duration(cluster.seconds(traffic.wire_bytes))
    if not traffic.host_bytes:
        return f"{size}, {time}"
    return f"{size}, {time} (+ {short_size(traffic.host_bytes)} to the host)"
