"""Several hosts that train together: one runs the recipe, the others join each training that it begins. Imports no torch.

    <stage>/call.json    {"attempt": "…", "config": "cpu_zero2", "processes": 2, "machines": 2, "count": 17}

The first host writes the call into the stage's folder, which all hosts see under the same path, counts on in it as long as it
lives, and takes it away when the training has ended. Whoever joins answers each call that counts once, with the ranks that
are its own; one that stands still was left by a host that is gone. All name the first host by
LORA_MAIN_ADDRESS; the backend's own variables (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) choose the network.
"""

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from lora_core.files import write_json
from pipelines.config.sections import LaunchSection
from pipelines.console import Watch
from pipelines.errors import PipelineError
from pipelines.runtime import launcher
from pipelines.runtime.sharding import Launch
from pipelines.runtime.stage import Stage

CALL = "call.json"
MAIN_ADDRESS = "LORA_MAIN_ADDRESS"
POLL_SECONDS, COUNT_SECONDS, GONE_SECONDS = 0.5, 1, 60
"""Between looks for calls; between counts in one; and without a count until its host is taken for gone."""
BACKEND_SECONDS = 30
"""How much longer the run waits than its ranks for each other, whose own error says more."""
Call = dict[str, Any]


def train(
    stage: Stage, settings: LaunchSection, watch: Watch | None, print_status: Callable[[str], None]
) -> dict[str, Any]:
    """Train on this host and those that join it; return the figures.

    Raises:
        StageError: see `launcher.run_child`.
        PipelineError: see `calling`.
    """
    stall_monitor = launcher.StallMonitor(
        settings.stall_seconds, settings.timeout_seconds + BACKEND_SECONDS, print_status
    )
    with calling(settings, stage.begin()) as place:
        argv = launcher.accelerate_argv(settings.config, settings.processes, stage.folder, place)
        threads = launcher.threads_each(settings.processes // settings.machines)
        return launcher.run_child(
            stage, argv, threads=threads, watch=watch, stall_monitor=stall_monitor
        )


@contextmanager
def calling(settings: LaunchSection, folder: Path) -> Iterator[Sequence[str]]:
    """Call the other hosts to a training for the length of a block; yield this host's place among them.

    Raises:
        PipelineError: there are other hosts, and LORA_MAIN_ADDRESS does not say how they find this one.
    """
    if settings.machines == 1:
        yield launcher.ALONE
        return
    path, over = folder / CALL, threading.Event()
    call = {
        "attempt": uuid4().hex,
        "config": settings.config,
        "processes": settings.processes,
        "machines": settings.machines,
    }
    place = place_of(call, 0)
    counting = threading.Thread(target=_count_on, args=(path, call, over), daemon=True)
    counting.start()
    try:
        yield place
    finally:
        over.set()
        counting.join()
        path.unlink(missing_ok=True)


def _count_on(path: Path, call: Call, over: threading.Event) -> None:
    for count in itertools.count():
        write_json(path, {**call, "count": count})
        if over.wait(COUNT_SECONDS):
            return


def place_of(call: Call, machine: int) -> list[str]:
    """Return a host's place among others, in the words of accelerate's launcher."""
    host, _, port = os.environ.get(MAIN_ADDRESS, "").rpartition(":")
    if not host or not port.isdigit():
        raise PipelineError(
            f"{MAIN_ADDRESS} is {os.environ.get(MAIN_ADDRESS)!r}; set it on each of the {call['machines']} hosts to the name or address "
            "of the first and a free port there, such as node-a:29500"
        )
    named = {
        "--num_machines": str(call["machines"]),
        "--machine_rank": str(machine),
        "--main_process_ip": host,
        "--main_process_port": port,
        "--deepspeed_multinode_launcher": "standard",
    }
    return [word for pair in named.items() for word in pair]


@dataclass
class Joined:
    """A host that joins what the first one begins."""

    machine: int
    root: Path
    """Folder of all runs, the same as the first host's."""
    report: Callable[[str], None]
    _counts: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Attempt → the last count seen in it, and when that was new."""
    _answered: set[str] = field(default_factory=set)

    def serve(self, until: Callable[[], bool] = lambda: False) -> None:
        """Answer every call until `until` holds, or this process is ended."""
        self.report(f"machine {self.machine} waits for trainings under {self.root}")
        while not until():
            for folder, call in calls(self.root):
                if (
                    call["attempt"] not in self._answered
                    and self.machine < call["machines"]
                    and self.counts_on(call)
                ):
                    self._answered.add(call["attempt"])
                    self.answer(folder, call)
            time.sleep(POLL_SECONDS)

    def counts_on(self, call: Call) -> bool:
        """Tell whether a call has counted since it was first seen."""
        first = self._counts.setdefault(call["attempt"], (call["count"], time.monotonic()))
        return bool(call["count"] != first[0])

    def is_over(self, folder: Path, attempt: str) -> bool:
        """Tell whether a call was taken away, or another stands in its place, or nobody has counted on in it for a while."""
        own = next(
            (
                call
                for place, call in calls(self.root)
                if place == folder and call["attempt"] == attempt
            ),
            None,
        )
        if own is None:
            return True
        count, since = self._counts[attempt]
        if own["count"] != count:
            self._counts[attempt] = own["count"], time.monotonic()
            return False
        return time.monotonic() - since > GONE_SECONDS

    def answer(self, folder: Path, call: Call) -> int:
        """Train this host's ranks to their end; return the status."""
        argv = launcher.accelerate_argv(
            call["config"], call["processes"], folder, place_of(call, self.machine)
        )
        self.report(f"joining {folder.name}")
        with (folder / f"log-{self.machine}.txt").open("ab") as log:
            status = launcher.run_beside(
                argv,
                log,
                threads=launcher.threads_each(call["processes"] // call["machines"]),
                on_cpu=Launch.read(call["config"]).on_cpu,
                until=lambda: self.is_over(folder, call["attempt"]),
            )
        self.report(f"{folder.name} ended with status {status}")
        return status


def calls(root: Path) -> list[tuple[Path, Call]]:
    """Return the trainings that wait for hosts, with their folders."""
    found = []
    for path in sorted(root.glob(f"train/*/{CALL}")):
        try:
            found.append((path.parent, json.loads(path.read_text())))
        except (OSError, ValueError):  # it was taken away, or is being written
            continue
    return found
