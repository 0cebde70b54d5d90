"""Start the ranks of a training on this host as `accelerate launch` does, but fork them.

    python -m pipelines.runtime.local_ranks ARGUMENTS OF accelerate launch

A rank that is started as a command imports torch, transformers and DeepSpeed for several seconds of
CPU time; a forked one has them already. accelerate parses the arguments and decides on the
environment, and torchrun's variables are the same, so the ranks do not see a difference.

    launcher ── fork ──▶ rank 0, rank 1, …
        └── TCPStore, through which the ranks find each other

Used where no GPU is visible, since a process that has initialized a GPU library must not be forked,
and one host trains.
"""

import os
import runpy
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command,
    launch_command_parser,
)
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipelines.runtime.child import die_with_parent

HOST = "127.0.0.1"
GRACE_SECONDS = 30
"""Time between SIGTERM and SIGKILL for the other ranks once one has failed, as in torchrun."""
POLL_SECONDS = 0.1
PORT_DIGITS = 5
"""Each rank reads as many bytes from the pipe that it shares with the others."""
FAILED = 1
"""Exit status if a rank failed."""


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one training."""

    processes: int
    """0 if the process itself trains, without a process group."""
    environment: dict[str, str]
    """Of every rank, without its number and the port."""
    program: str
    """Module or file that is run as `__main__`."""
    is_module: bool
    arguments: tuple[str, ...]


def read_group(parsed: Namespace) -> RankGroup | None:
    """Return what accelerate's launcher would start, or None for what is left to it.

    Args:
        parsed: the arguments of the launcher; completed from its config.
    """
    _, defaults, is_precision_configured = _validate_launch_command(parsed)
    if parsed.tpu or parsed.use_megatron_lm or parsed.mpirun_hostfile:
        return None
    if parsed.use_deepspeed:
        # accelerate refuses values for these fields in DeepSpeed's own config.
        fields = list(defaults.deepspeed_config)
        fields += ["mixed_precision"] if is_precision_configured else []
        parsed.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(parsed)
    elif parsed.multi_gpu or parsed.use_fsdp:
        environment = prepare_multi_gpu_env(parsed)
    else:
        _, environment = prepare_simple_launcher_cmd_env(parsed)
        return _group(parsed, 0, environment)
    return _group(parsed, int(parsed.num_processes), environment)


def _group(parsed: Namespace, processes: int, environment: Mapping[str, str]) -> RankGroup:
    return RankGroup(
        processes=processes,
        environment=dict(environment),
        program=parsed.training_script,
        is_module=bool(parsed.module),
        arguments=tuple(parsed.training_script_args),
    )


def rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank of a single host."""
    count = str(processes)
    return {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "ROLE_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_NAME": "default",
        "LOCAL_WORLD_SIZE": count,
        "WORLD_SIZE": count,
        "ROLE_WORLD_SIZE": count,
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


@dataclass
class RankProcesses:
    """The forked ranks, and how they ended."""

    running: dict[int, int] = field(default_factory=dict)
    """Process id → rank."""
    failed: list[str] = field(default_factory=list)
    """How each failed rank ended, in the order of time."""

    def wait(self) -> int:
        """Wait for all ranks; once one fails, end the others. Return the exit status."""
        deadline: float | None = None
        while self.running:
            pid, status = os.waitpid(-1, 0 if deadline is None else os.WNOHANG)
            if pid:
                self._record(pid, os.waitstatus_to_exitcode(status))
            elif deadline is not None and time.monotonic() >= deadline:
                self._signal(signal.SIGKILL)
            else:
                time.sleep(POLL_SECONDS)
            if self.failed and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
                self._signal(signal.SIGTERM)
        return FAILED if self.failed else 0

    def _record(self, pid: int, status: int) -> None:
        rank = self.running.pop(pid)
        if status == 0:
            return
        how = f"with status {status}"
        if status < 0:
            how = f"by {signal.Signals(-status).name}"
        self.failed.append(f"rank {rank} (process {pid}) ended {how}")
        if len(self.failed) == 1:  # the others are ended because of it
            print(self.failed[0], file=sys.stderr, flush=True)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.running:
            os.kill(pid, number)  # not yet waited for, so the id is still its own


def run_group(group: RankGroup) -> int | None:
    """Fork the ranks and wait for them.

    Returns:
        in a rank None, after its environment was set; in the launcher the exit status.
    """
    ranks = RankProcesses()
    launcher = os.getpid()
    read, write = os.pipe()
    for rank in range(group.processes):
        pid = os.fork()
        if pid == 0:
            os.close(write)
            die_with_parent(parent=launcher)
            _become_rank(rank, group.processes, read)
            return None
        ranks.running[pid] = rank
    os.close(read)
    # It has threads, so it is created after the ranks were forked.
    store = TCPStore(
        HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=GRACE_SECONDS)
    )
    os.write(write, f"{store.port:0{PORT_DIGITS}d}".encode() * group.processes)
    os.close(write)
    return ranks.wait()


def _become_rank(rank: int, processes: int, read: int) -> None:
    """Wait for the port of the store, and set the variables of the rank."""
    port = os.read(read, PORT_DIGITS)
    os.close(read)
    if len(port) < PORT_DIGITS:
        raise RuntimeError(f"rank {rank} got no port: its launcher has ended")
    os.environ.update(rank_variables(rank, processes, int(port)))


def _run_program(group: RankGroup) -> None:
    """Run the program as `python` does."""
    sys.argv = [group.program, *group.arguments]
    if group.is_module:
        sys.modules.pop(group.program, None)  # it is executed again, as `__main__`
        runpy.run_module(group.program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(group.program, run_name="__main__")


def main() -> None:
    """Run the ranks that the arguments describe, and exit with status 1 if one fails."""
    parsed = launch_command_parser().parse_args(sys.argv[1:])
    group = read_group(parsed)
    if group is None:
        launch_command(parsed)
        return
    os.environ.update(group.environment)
    if group.processes:
        status = run_group(group)
        if status is not None:
            sys.exit(status)
    _run_program(group)


if __name__ == "__main__":
    main()
