"""Training on several hosts: the first host runs the recipe, the others join each training.

    <stage>/call.json
    {"attempt": "…", "config": "cpu_zero2", "processes": 2, "machines": 2, "count": 17}

The first host writes this call for hosts into the stage's folder, which every host sees under the
same path. It increases the count every second and deletes the file when the training has ended. A
joining host starts its own ranks once per attempt, and only if the count increases; otherwise the
first host has died. All hosts find the first one by LORA_MAIN_ADDRESS; the backend's own variables
(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) select the network. Imports no torch.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from lora_core.files import write_json
from pipelines.config.sections import LaunchSection
from pipelines.console import Watch
from pipelines.errors import PipelineError
from pipelines.runtime import launcher
from pipelines.runtime.interfaces.inputs import TrainInputs
from pipelines.runtime.interfaces.results import TrainResult
from pipelines.runtime.interfaces.values import Values
from pipelines.runtime.monitor import StallMonitor
from pipelines.runtime.sharding import LaunchConfig
from pipelines.runtime.stage import Stage
from pipelines.runtime.warm_up import ensure_compiled

CALL = "call.json"
MAIN_ADDRESS = "LORA_MAIN_ADDRESS"
POLL_SECONDS = 0.5
"""Between two checks for calls."""
COUNT_SECONDS = 1
"""Between two increments of the count."""
GONE_SECONDS = 60
"""Without an increment for this long, the first host counts as gone."""
BACKEND_SECONDS = 30
"""How much longer the run waits than its ranks wait for each other, since their own error is more
specific."""


class Call(Values):
    """The first host's call to others, in the stage's folder."""

    attempt: str
    """Identifies the training among those that were started in the folder."""
    config: str
    """accelerate config of the launch."""
    processes: int
    """Ranks on all hosts together."""
    machines: int
    count: int = 0
    """Rises as long as the first host lives."""


def train(
    stage: Stage[TrainInputs, TrainResult],
    settings: LaunchSection,
    *,
    watch: Watch | None,
    report: Callable[[str], None],
) -> TrainResult:
    """Train on this host and those that join it.

    Args:
        stage: a training.
        settings: the launch section of the recipe.
        watch: called with each new row of metrics.
        report: called with each note and each stall.

    Raises:
        StageError: see `launcher.run_child`.
        PipelineError: see `calling_hosts`.
    """
    abort_after = settings.timeout_seconds + BACKEND_SECONDS
    stall_monitor = StallMonitor(settings.stall_seconds, abort_after, report)
    threads = launcher.threads_each(settings.processes // settings.machines)
    _prepare_engine(settings.config)
    with calling_hosts(settings, stage.begin()) as arguments:
        argv = launcher.accelerate_argv(
            settings.config, settings.processes, stage.folder, arguments
        )
        return launcher.run_child(
            [stage], argv, threads=threads, watch=watch, stall_monitor=stall_monitor
        )[0]


def _prepare_engine(config: str) -> None:
    """Compile what the engine of a launch config needs on this host."""
    launch = LaunchConfig.read(config)
    if launch.on_cpu and launch.deepspeed:
        ensure_compiled()


@contextmanager
def calling_hosts(settings: LaunchSection, folder: Path) -> Iterator[Sequence[str]]:
    """Call other hosts to a training during a block; yield this host's launcher arguments.

    Args:
        settings: launch config, and numbers of processes and hosts.
        folder: of the stage, which all hosts can read.

    Raises:
        PipelineError: there are other hosts, but LORA_MAIN_ADDRESS does not name this one.
    """
    if settings.machines == 1:
        yield launcher.SINGLE_HOST
        return
    call = Call(
        attempt=uuid4().hex,
        config=settings.config,
        processes=settings.processes,
        machines=settings.machines,
    )
    arguments = host_arguments(call, 0)
    path = folder / CALL
    is_over = threading.Event()
    counting = threading.Thread(target=_count, args=(path, call, is_over), daemon=True)
    counting.start()
    try:
        yield arguments
    finally:
        is_over.set()
        counting.join()
        path.unlink(missing_ok=True)


def _count(path: Path, call: Call, is_over: threading.Event) -> None:
    for count in itertools.count():
        write_json(path, call.model_copy(update={"count": count}).plain())
        if is_over.wait(COUNT_SECONDS):
            return


def host_arguments(call: Call, machine: int) -> list[str]:
    """Return a host's rank among the hosts, as arguments of accelerate's launcher.

    Args:
        call: of the first host.
        machine: index of this host, 0 for the first.

    Raises:
        PipelineError: LORA_MAIN_ADDRESS is not a host and a port.
    """
    address = os.environ.get(MAIN_ADDRESS)
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit():
        raise PipelineError(
            f"{MAIN_ADDRESS} is {address!r}; set it on each of the {call.machines} hosts to "
            "the name or address of the first and a free port there, such as node-a:29500"
        )
    arguments = ["--num_machines", str(call.machines), "--machine_rank", str(machine)]
    arguments += ["--main_process_ip", host, "--main_process_port", port]
    return [*arguments, "--deepspeed_multinode_launcher", "standard"]


def _nothing_held(ranks: int) -> AbstractContextManager[None]:
    """Hold nothing, where no Prefect server has slots."""
    return nullcontext()


@dataclass
class JoiningHost:
    """A host that joins the trainings of the first host."""

    machine: int
    root: Path
    """Folder of all runs, the same as on the first host."""
    report: Callable[[str], None]
    hold: Callable[[int], AbstractContextManager[None]] = _nothing_held
    """Holds this host for a number of ranks, so that no other run trains on it meanwhile."""
    _counts: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Attempt → its last known count, and when the count reached it."""
    _joined: set[str] = field(default_factory=set)
    """Attempts that this host has joined."""

    def serve(self, until: Callable[[], bool] = lambda: False) -> None:
        """Join every training until `until` returns True or this process ends."""
        self.report(f"machine {self.machine} waits for trainings under {self.root}")
        while not until():
            for folder, call in open_calls(self.root):
                if self._is_new(call) and self.is_counting(call):
                    self._joined.add(call.attempt)
                    self.join(folder, call)
            time.sleep(POLL_SECONDS)

    def _is_new(self, call: Call) -> bool:
        return call.attempt not in self._joined and self.machine < call.machines

    def is_counting(self, call: Call) -> bool:
        """Return whether the count has increased since this host first read the call."""
        first_count, _ = self._counts.setdefault(call.attempt, (call.count, time.monotonic()))
        return call.count != first_count

    def is_over(self, folder: Path, attempt: str) -> bool:
        """Return whether a call was deleted or replaced, or stopped counting GONE_SECONDS ago.

        Args:
            folder: of the stage.
            attempt: identifies the call.
        """
        count = self._current_count(folder, attempt)
        if count is None:
            return True
        last_count, since = self._counts[attempt]
        if count != last_count:
            self._counts[attempt] = count, time.monotonic()
            return False
        return time.monotonic() - since > GONE_SECONDS

    def _current_count(self, folder: Path, attempt: str) -> int | None:
        for other, call in open_calls(self.root):
            if other == folder and call.attempt == attempt:
                return call.count
        return None

    def join(self, folder: Path, call: Call) -> int:
        """Run this host's ranks until the training ends; return their exit status.

        Args:
            folder: of the stage; gets this host's log.
            call: of the first host.
        """
        argv = launcher.accelerate_argv(
            call.config, call.processes, folder, host_arguments(call, self.machine)
        )
        self.report(f"joining {folder.name}")
        ranks = call.processes // call.machines
        _prepare_engine(call.config)
        with self.hold(ranks), (folder / f"log-{self.machine}.txt").open("ab") as log:
            status = launcher.run_joined_ranks(
                argv,
                log,
                threads=launcher.threads_each(ranks),
                on_cpu=LaunchConfig.read(call.config).on_cpu,
                until=lambda: self.is_over(folder, call.attempt),
            )
        self.report(f"{folder.name} ended with status {status}")
        return status


def open_calls(root: Path) -> list[tuple[Path, Call]]:
    """Return the folders of the trainings that wait for hosts, with their calls."""
    found = []
    for path in sorted(root.glob(f"train/*/{CALL}")):
        try:
            found.append((path.parent, Call.model_validate_json(path.read_text())))
        except (OSError, ValueError):  # it was deleted, or is being written
            continue
    return found
