"""Backup and restore of both servers' databases and MLflow's files: an adapter is pulled after."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from composed import (
    BIN,
    MLFLOW_ADMIN,
    SECRETS,
    SERVERS,
    Postgres,
    answers,
    postgres_server,
    service,
    until,
)
from mlflow_accounts import logged_in
from registered import WEIGHTS, SmallVersions

from lora_core.files import sha256_of_file

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("psycopg2", reason="psycopg2, which MLflow needs for Postgres, is missing")
from pipelines.tracking.pulled import PullRequest, pull  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.slow]
COUNT = "SELECT count(*) FROM block_type"


@dataclass(frozen=True)
class Site:
    """Both databases with content, and MLflow's files."""

    postgres: Postgres
    folder: Path
    backup: Path
    sha256: str

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    def run(self, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return run_script(self.postgres, script, *arguments)


def run_script(
    postgres: Postgres, script: str, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", str(SERVERS / script), *arguments],
        env=postgres.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def upgrade_prefect(postgres: Postgres, folder: Path) -> None:
    """Create Prefect's tables, and a row."""
    uri = f"postgresql+asyncpg://prefect@127.0.0.1:{postgres.port}/prefect"
    env = {
        **os.environ,
        "PGPASSWORD": SECRETS["POSTGRES_PREFECT_PASSWORD"],
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": uri,
    }
    command = [str(BIN / "prefect"), "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=240)
    row = "INSERT INTO block_type (name, slug) VALUES ('kept', 'kept')"
    postgres.psql("--dbname=prefect", f"--command={row}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with postgres_server() as postgres, pytest.MonkeyPatch.context() as patch:
        upgrade_prefect(postgres, folder)
        with (
            service("mlflow", postgres, folder) as address,
            logged_in(MLFLOW_ADMIN, SECRETS["MLFLOW_ADMIN_PASSWORD"]),
        ):
            until(lambda: answers(f"{address}/health"))
            patch.setenv("MLFLOW_TRACKING_URI", address)
            mlflow.set_tracking_uri(address)
            SmallVersions(folder, folder / "trained").add("kept", "one")
        sha256 = sha256_of_file(folder / "trained" / "kept" / "one" / "adapter" / WEIGHTS)
        ended = run_script(
            postgres, "backup.sh", str(folder / "backups"), str(folder / "artifacts")
        )
        assert ended.returncode == 0, ended.stderr
        yield Site(postgres, folder, Path(ended.stdout.strip()), sha256)
    mlflow.set_tracking_uri(None)


def test_backup_is_complete_and_private(site: Site) -> None:
    names = {path.name for path in site.backup.iterdir()}
    dumps = {"prefect.dump", "mlflow.dump", "mlflow_accounts.dump"}
    assert names == dumps | {"artifacts.tar", "SHA256SUMS"}
    assert [path.name for path in site.backup.parent.iterdir()] == [site.backup.name]
    for path in [site.backup, *site.backup.iterdir()]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_backup_of_an_absent_server_leaves_nothing(site: Site, tmp_path: Path) -> None:
    absent = Postgres(9)
    ended = run_script(absent, "backup.sh", str(tmp_path))
    assert ended.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_restore_refuses_what_has_content(site: Site, tmp_path: Path) -> None:
    ended = site.run("restore.sh", str(site.backup), str(tmp_path / "new"))
    assert ended.returncode == 2
    assert "the database prefect has" in ended.stderr
    assert not (tmp_path / "new").exists()


def test_restore_refuses_a_damaged_backup(site: Site, tmp_path: Path) -> None:
    copy = shutil.copytree(site.backup, tmp_path / "copy")
    dump = copy / "mlflow.dump"
    content = bytearray(dump.read_bytes())
    content[len(content) // 2] ^= 1
    dump.write_bytes(content)
    ended = site.run("restore.sh", str(copy), str(tmp_path / "new"))
    assert (ended.returncode, "is not complete" in ended.stderr) == (2, True)


def test_adapter_is_pulled_after_a_restore(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = site.postgres.psql("--dbname=prefect", "--tuples-only", f"--command={COUNT}").stdout
    site.postgres.drop_databases()
    shutil.rmtree(site.artifacts)
    site.postgres.create_databases()
    ended = site.run("restore.sh", str(site.backup), str(site.artifacts))
    assert ended.returncode == 0, ended.stderr
    after = site.postgres.psql("--dbname=prefect", "--tuples-only", f"--command={COUNT}").stdout
    assert after == before
    owners = site.postgres.psql(
        "--dbname=prefect",
        "--tuples-only",
        "--no-align",
        "--command=SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'",
    )
    assert owners.stdout.split() == ["prefect"]
    with (
        service("mlflow", site.postgres, site.folder) as address,
        logged_in(MLFLOW_ADMIN, SECRETS["MLFLOW_ADMIN_PASSWORD"]),
    ):
        until(lambda: answers(f"{address}/health"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        pulled = pull(PullRequest("kept/1", tmp_path, "peft", lambda base: None), tmp_path)
    assert sha256_of_file(Path(pulled.folder) / WEIGHTS) == site.sha256
