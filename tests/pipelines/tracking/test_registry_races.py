"""Concurrent registrations on a real MLflow server: one version per digest, no lost champion."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
from registered import WEIGHTS, copied, write_adapter
from summaries import Summary, parsed

from pipelines.errors import RegistryError

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking import lease  # noqa: E402
from pipelines.tracking.lease import Lease, hold_lease, live_leases  # noqa: E402
from pipelines.tracking.model_versions import ensure_model, register_adapters  # noqa: E402
from pipelines.tracking.runs import configure_mlflow_client, experiment_id  # noqa: E402

pytestmark = pytest.mark.server
PROCESSES = 20


@pytest.fixture(scope="module")
def server(start_server: Callable[[], str]) -> str:
    return start_server()


@pytest.fixture(autouse=True)
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the server, to which all threads are connected."""
    configure_mlflow_client()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    mlflow.set_tracking_uri(server)
    mlflow.set_registry_uri(server)
    yield mlflow.MlflowClient()


def one_adapter(comparison: Summary, content: str) -> Summary:
    """Return the comparison with rank 16 only, with its own weights."""
    found = copied(comparison) | {"key": content.ljust(64, "k")}
    for label in ("rank-4", "rank-64"):
        del found["models"][label]
    training = found["models"]["rank-16"]["training"]
    training["folder"] = f"{training['folder']}-{content}"
    folder = Path(training["folder"]) / "adapter"
    training["result"]["saved"]["adapter_sha256"] = write_adapter(folder, content)
    return found


def register(comparison: Summary) -> dict[str, int]:
    """Log the adapter's files and register it, as a run does; return the aliases."""
    client = mlflow.MlflowClient()
    ensure_model(client, comparison["recipe"]["registry"]["model"], "")
    experiment = experiment_id(client, comparison["name"], Path())
    run = client.create_run(experiment).info.run_id
    folder = Path(comparison["models"]["rank-16"]["training"]["folder"]) / "adapter"
    client.log_artifacts(run, str(folder), "adapter")
    return register_adapters(client, parsed(comparison), {"rank-16": run})[1]


def attempt(action: Callable[[], dict[str, int]], barrier: Barrier) -> str:
    """Return the outcome of a registration that starts with the others."""
    barrier.wait()
    try:
        return "champion" if "champion" in action() else "no alias"
    except RegistryError as error:
        return str(error)


def race(comparisons: list[Summary]) -> list[str]:
    """Register comparisons at the same time; return the outcomes."""
    barrier = Barrier(len(comparisons))
    with ThreadPoolExecutor(len(comparisons)) as pool:
        futures = []
        for one in comparisons:
            futures.append(pool.submit(attempt, lambda one=one: register(one), barrier))
        return [future.result() for future in futures]


def digests(client: Any, name: str) -> list[str]:
    found = client.search_model_versions(f"name = '{name}'")
    return sorted(version.tags["adapter_sha256"] for version in found)


def digest(comparison: Summary) -> str:
    return str(comparison["models"]["rank-16"]["training"]["result"]["saved"]["adapter_sha256"])


def test_twenty_registrations_give_one_complete_version_per_digest(
    client: Any, comparison: Summary, tmp_path: Path
) -> None:
    name = comparison["name"]
    comparisons = [one_adapter(comparison, f"weights {one}") for one in range(PROCESSES)]
    outcomes = race(comparisons)
    assert digests(client, name) == sorted(map(digest, comparisons))
    # all were compared with no champion: the first one becomes it, the others do not
    assert outcomes.count("champion") == 1
    refused = [outcome for outcome in outcomes if "was compared with none" in outcome]
    assert len(refused) == PROCESSES - 1
    assert not live_leases(client, name)
    for version in client.search_model_versions(f"name = '{name}'"):
        assert version.tags["verdict"] == "pass"
        uri = f"models:/{name}/{version.version}"
        folder = Path(
            mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / version.version))
        )
        assert (folder / WEIGHTS).read_text().startswith("weights ")
        assert (folder / "README.md").is_file()


def test_identical_bytes_are_registered_once(client: Any, comparison: Summary) -> None:
    one = one_adapter(comparison, "same")
    assert race([one] * 4) == ["champion"] * 4
    assert digests(client, comparison["name"]) == [digest(one)]


def test_no_race_promotes_over_a_champion_that_was_not_compared(
    client: Any, comparison: Summary
) -> None:
    for index in range(6):
        found = copied(comparison)
        found["recipe"]["registry"]["model"] = f"{comparison['name']}-{index}"
        pair = [one_adapter(found, f"{index} {side}") for side in ("left", "right")]
        outcomes = race(pair)
        assert outcomes.count("champion") == 1
        champion = client.get_model_version_by_alias(f"{comparison['name']}-{index}", "champion")
        winner = pair[outcomes.index("champion")]
        assert champion.tags["adapter_sha256"] == digest(winner)


def test_lease_is_held_by_one_at_a_time(client: Any) -> None:
    client.create_registered_model("leased")
    inside: list[str] = []
    overlaps = []

    def work(index: int) -> None:
        with hold_lease(mlflow.MlflowClient(), "leased"):
            overlaps.extend(inside)
            inside.append(str(index))
            time.sleep(0.02)
            inside.remove(str(index))

    threads = [Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []
    assert not live_leases(client, "leased")


def test_lease_of_a_killed_process_expires(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client.create_registered_model("abandoned")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.2)
    killed = Lease(client, "abandoned")
    killed.write()
    with (
        pytest.raises(RegistryError, match="has registered in abandoned for"),
        hold_lease(client, "abandoned"),
    ):
        pass
    time.sleep(1)
    with hold_lease(client, "abandoned") as held:
        held.renew()
        with pytest.raises(RegistryError, match="expired after 1 s"):
            killed.renew()
