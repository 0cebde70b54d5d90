"""Two hosts on one machine: network namespaces, connected by a cable that can be pulled.

    node-a 10.77.0.1 ──── cable ──── 10.77.0.2 node-b

Needs root and iproute2.
"""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.runtime.launcher import REPOSITORY
from pipelines.runtime.stage import Stage

NODES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
CABLE = "cable"
PORT = 29511
RUN_TRAINING = Path(__file__).with_name("run_training.py")


def objection() -> str | None:
    """Return why two hosts are impossible on this machine; None if they are possible."""
    if os.geteuid() != 0:
        return "two hosts need root, to make network namespaces"
    if shutil.which("ip") is None:
        return "two hosts need iproute2"
    made = subprocess.run(["ip", "netns", "add", "node-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "node-probe"], capture_output=True, check=False)
    return (
        None
        if made.returncode == 0
        else f"this machine cannot create a network namespace ({made.stderr.decode().strip()})"
    )


@dataclass(frozen=True)
class TwoHosts:
    """Both hosts; they share their files."""

    runs: Path

    def start(self, node: str, *argv: str) -> "subprocess.Popen[str]":
        """Start a command on a host."""
        environment = {
            **os.environ,
            "LORA_RUNS": str(self.runs),
            "LORA_MAIN_ADDRESS": f"{NODES['node-a']}:{PORT}",
            "GLOO_SOCKET_IFNAME": CABLE,
            "PYTHONPATH": str(REPOSITORY),
        }
        named = [
            "ip",
            "netns",
            "exec",
            node,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {node} && exec "$@"',
            node,
        ]
        return subprocess.Popen(
            [*named, *argv],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def train(self, stage_file: Path) -> "subprocess.Popen[str]":
        """Start a training on the first host, as a run does."""
        return self.start("node-a", sys.executable, str(RUN_TRAINING), str(stage_file))

    def join(self) -> "subprocess.Popen[str]":
        """Start `lora join` on the second host."""
        return self.start(
            "node-b", str(Path(sys.executable).parent / "lora"), "join", "--machine", "1"
        )

    def pull_cable(self) -> None:
        """Block all traffic; neither side is notified."""
        ip("netns", "exec", "node-a", "ip", "link", "set", CABLE, "down")

    def plug_cable(self) -> None:
        """Allow all traffic again."""
        ip("netns", "exec", "node-a", "ip", "link", "set", CABLE, "up")


@contextmanager
def two_hosts(runs: Path) -> Iterator[TwoHosts]:
    """Create both hosts; remove them at the end of the block."""
    remove()
    try:
        for node in NODES:
            ip("netns", "add", node)
        ip("link", "add", "cable-a", "type", "veth", "peer", "name", "cable-b")
        for node, address in NODES.items():
            end = f"cable-{node[-1]}"
            ip("link", "set", end, "netns", node)
            for command in (
                f"link set {end} name {CABLE}",
                f"addr add {address}/24 dev {CABLE}",
                f"link set {CABLE} up",
                "link set lo up",
            ):
                ip("-n", node, *command.split())
        yield TwoHosts(runs)
    finally:
        remove()


def remove() -> None:
    """Remove both hosts and the processes that still run on them."""
    for node in NODES:
        found = subprocess.run(
            ["ip", "netns", "pids", node], capture_output=True, text=True, check=False
        ).stdout.split()
        subprocess.run(["kill", "-9", *found], capture_output=True, check=False) if found else None
        subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)


def ip(*words: str) -> None:
    """Run iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def processes_on(node: str) -> list[str]:
    """Return the ids of the processes on a host."""
    return subprocess.run(
        ["ip", "netns", "pids", node], capture_output=True, text=True, check=False
    ).stdout.split()


def pickled(stage: Stage, settings: object, path: Path) -> Path:
    """Write a stage and its launch settings for the process that trains it."""
    path.write_bytes(pickle.dumps((stage, settings)))
    return path
