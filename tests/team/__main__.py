"""Three people share a registry: what each may do, races, kills, secrets and a restore.

    PYTHONPATH=tests python -m team [--quick]

Results are written to build/team.json, and the transcript next to it; a missed goal is an error.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from parity.rows import Row, show_list
from team import races, transcript
from team.team_server import TeamServer, team_server

from lora_core.files import write_json, write_text
from pipelines.runtime.launcher import REPOSITORY

RESULT = REPOSITORY / "build" / "team.json"
RACERS = 20
KILLS = 5
SEED = 1
RESTORE = "tests/infra/test_backup.py"
VERIFICATION = "tests/pipelines/tracking/test_registry_verification.py"
MUTATIONS = 1000


def main() -> int:
    """Measure, write and print everything; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="train nothing, and race with four")
    quick = parser.parse_args().quick
    result = RESULT.with_stem("team_quick") if quick else RESULT
    rows: list[Row] = []
    with TemporaryDirectory() as folder, team_server(Path(folder), in_process=quick) as server:
        os.environ |= {"MLFLOW_TRACKING_URI": server.address, "LORA_RUNS": str(server.runs)}
        server.runs.mkdir()
        try:
            for row in measured(server, quick=quick):
                rows.append(row)
                write_json(result, rows)
        finally:
            write_text(result.with_suffix(".txt"), "\n".join(server.transcript))
    show_list("Team", rows)
    return 0 if all(row["holds"] is not False for row in rows) else 1


def measured(server: TeamServer, *, quick: bool) -> Iterator[Row]:
    """Yield the rows of each part."""
    yield transcript.set_up(server)
    if not quick:
        yield from transcript.training(server)
    yield from transcript.decisions(server)
    yield from races.registrations(server, 4 if quick else RACERS)
    yield from races.killed_promotions(server, 1 if quick else KILLS, SEED)
    yield transcript.secrets(server)
    if not quick:
        yield transcript.holds(
            f"verify: each of {MUTATIONS} mutations of a version is detected",
            passes(VERIFICATION, LORA_TEST_MUTATIONS=str(MUTATIONS)),
        )
        yield transcript.holds(
            "restore: an adapter is pulled from restored databases", passes(RESTORE)
        )


def passes(tests: str, **environment: str) -> bool:
    """Run a file of tests; return whether all of them passed and none was skipped."""
    own = {name: text for name, text in os.environ.items() if not name.startswith("MLFLOW_")}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rs", tests],
        cwd=REPOSITORY,
        env=own | environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    return ended.returncode == 0 and " skipped" not in ended.stdout


if __name__ == "__main__":
    sys.exit(main())
