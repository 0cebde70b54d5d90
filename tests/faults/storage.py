"""Damaged checkpoints, and a full disk."""

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
"""Size of a small disk, and its free space: enough for metrics, not for a checkpoint."""
Damage = Callable[[Path, int], None]


def flipped_bit(site: Site, random: Random) -> Outcome:
    """Flip a bit of the newest checkpoint: the one before it is used."""
    return _damaged(site, random, _flip)


def cut_short(site: Site, random: Random) -> Outcome:
    """Truncate a file of the newest checkpoint."""
    return _damaged(site, random, lambda path, at: os.truncate(path, at))


def full_disk(site: Site, random: Random) -> Outcome:
    """Fill the disk before a checkpoint is written; then free space."""
    trial = site.training()
    with _small_disk(trial.stage.folder) as filler:
        trial.stage.begin()
        trial.start()
        done = trial.at_step(2 * EVERY + 1)
        filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - LINES_BYTES))
        since = time.monotonic()
        status, message = trial.ended(), last_line(trial.output())
        done, filled = trial.steps(), "no space left" in message
        kept = bool(trial.checkpoints())
        filler.unlink()
        return trial.resume(
            done=done, since=since, message=message, clear=status != 0 and filled and kept
        )


def _damaged(site: Site, random: Random, damage: Damage) -> Outcome:
    trial = site.training()
    process = trial.start()
    done = trial.at_step(random.randrange(3 * EVERY, 6 * EVERY))
    process.kill()
    since = time.monotonic()
    process.wait()
    assert trial.nothing_left()
    latest_valid, before = trial.checkpoints()[-1], trial.checkpoints()[-2]
    victim = random.choice(sorted(latest_valid.glob("*.safetensors")))
    damage(victim, random.randrange(victim.stat().st_size))
    outcome = trial.resume(done=done, since=since, message="")
    message = next(
        (line for line in trial.output().splitlines() if f"{latest_valid} is damaged" in line), ""
    )
    return Outcome(
        outcome.survived and bool(message) and trial.starts()[-1] == int(before.name[5:]),
        outcome.lost,
        outcome.seconds,
        message,
    )


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """Mount a disk of a few MB on a folder inside a block; yield the path of a filler file.

    Needs root.
    """
    shutil.rmtree(folder)
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield folder / "filler"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def small_disk_objection() -> str | None:
    """Return why a small disk is impossible on this machine; None if it is possible."""
    return None if os.geteuid() == 0 else "a disk of a few MB needs root, to mount it"
