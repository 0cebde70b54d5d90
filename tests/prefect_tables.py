"""A Prefect database with its tables, created once and copied for the servers of the tests.

To create them takes a server as long as everything else at its start.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

DATABASE = "prefect.db"


def add_tables(home: Path) -> None:
    """Give a PREFECT_HOME a database with empty tables, unless it has a database.

    Args:
        home: created if it does not exist.
    """
    home.mkdir(parents=True, exist_ok=True)
    if not (home / DATABASE).exists():
        shutil.copyfile(_database(), home / DATABASE)


def _database() -> Path:
    """Return the database of this user and version of Prefect; the first call creates it."""
    parent = Path(tempfile.gettempdir()) / f"lora-tests-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    created = parent / f"prefect-{version('prefect')}.db"
    with FileLock(parent / "lock"):
        if not created.exists():
            with tempfile.TemporaryDirectory(dir=parent) as home:
                _create(Path(home))
                (Path(home) / DATABASE).rename(created)
    return created


def _create(home: Path) -> None:
    subprocess.run(
        [str(Path(sys.executable).with_name("prefect")), "server", "database", "upgrade", "--yes"],
        env={**os.environ, "PREFECT_HOME": str(home)},
        check=True,
        capture_output=True,
        timeout=300,
    )
