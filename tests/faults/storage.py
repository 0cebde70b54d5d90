"""Checkpoints that come to harm, and a disk that is full."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from faults.trial import EVERY, Outcome, Site, last_line

DISK, LINES_BYTES = "4m", 64 << 10
"""Size of a small disk, and what is left of it: room for lines of metrics, and none for a checkpoint."""
Harm = Callable[[Path, int], None]


def flipped_bit(site: Site, random: Random) -> Outcome:
    """Flip a bit of the newest checkpoint: the one before it is used."""
    return _damaged(site, random, _flip)


def cut_short(site: Site, random: Random) -> Outcome:
    """Cut a file of the newest checkpoint short."""
    return _damaged(site, random, lambda path, at: os.truncate(path, at))


def full_disk(site: Site, random: Random) -> Outcome:
    """Let the disk be full when a checkpoint is to be written; then make room."""
    trial = site.training()
    with _small_disk(trial.stage.folder) as filler:
        trial.stage.begin()
        trial.begin()
        done = trial.at_step(2 * EVERY + 1)
        filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - LINES_BYTES))
        since = time.monotonic()
        status, said = trial.ended(), last_line(trial.said())
        done, filled = trial.steps(), "no space left" in said
        kept = bool(trial.checkpoints())
        filler.unlink()
        return trial.go_on(done=done, since=since, said=said, clear=status != 0 and filled and kept)


def _damaged(site: Site, random: Random, harm: Harm) -> Outcome:
    trial = site.training()
    process = trial.begin()
    done = trial.at_step(random.randrange(3 * EVERY, 6 * EVERY))
    process.kill()
    since = time.monotonic()
    process.wait()
    assert trial.nothing_left()
    latest_valid, before = trial.checkpoints()[-1], trial.checkpoints()[-2]
    victim = random.choice(sorted(latest_valid.glob("*.safetensors")))
    harm(victim, random.randrange(victim.stat().st_size))
    outcome = trial.go_on(done=done, since=since, said="")
    said = next(
        (line for line in trial.said().splitlines() if f"{latest_valid} is damaged" in line), ""
    )
    return Outcome(
        outcome.survived and bool(said) and trial.starts()[-1] == int(before.name[5:]),
        outcome.lost,
        outcome.seconds,
        said,
    )


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """Put a disk of a few MB under a folder for the length of a block; yield where a file may fill it. Needs root."""
    shutil.rmtree(folder)
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield folder / "filler"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def small_disk_objection() -> str | None:
    """Say why there can be no small disk here; None where there can."""
    return None if os.geteuid() == 0 else "a disk of a few MB needs root, to mount it"
