"""The rendered servers for Kubernetes match the schemas, the compose file and the programs."""

from collections.abc import Iterator
from typing import Any

import pytest
from composed import COMPOSE, SERVERS
from manifests import Manifest, rendered_manifests, written_manifests

VERSIONS = ("1.31", "1.34", "1.37")


@pytest.fixture(scope="module")
def rendered() -> list[Manifest]:
    return rendered_manifests(SERVERS)


@pytest.fixture(scope="module")
def written() -> list[Manifest]:
    return written_manifests(SERVERS)


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Yield the name and the pod of each workload."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield manifest["metadata"]["name"], spec["template"]["spec"]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def pod_of(manifests: list[Manifest], name: str) -> Manifest:
    return dict(pods(manifests))[name]


def variables(container: Manifest) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_rendered_manifests_match_the_schemas(rendered: list[Manifest], version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="it has the schemas")
    assert {"StatefulSet", "Deployment", "CronJob", "Ingress", "NetworkPolicy"} <= {
        manifest["kind"] for manifest in rendered
    }
    for manifest in rendered:
        schemas.validate(manifest, version, strict=True)


def test_images_are_those_of_the_compose_file(rendered: list[Manifest]) -> None:
    images = {one["image"] for _, pod in pods(rendered) for one in containers(pod)}
    compose = {service["image"] for service in COMPOSE["services"].values()}
    registry = "registry.example.com/"
    assert {image.removeprefix(registry) for image in images} == {
        image for image in compose if "caddy" not in image
    }


def test_objects_that_pods_refer_to_exist(rendered: list[Manifest]) -> None:
    names: dict[str, set[str]] = {}
    for manifest in rendered:
        names.setdefault(manifest["kind"], set()).add(manifest["metadata"]["name"])
    claimed = set()
    for _, pod in pods(rendered):
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"]
            if "persistentVolumeClaim" in volume:
                claimed.add(volume["persistentVolumeClaim"]["claimName"])
        for container in containers(pod):
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in names["ConfigMap"]
    assert claimed == names["PersistentVolumeClaim"]
    assert {"postgres", "prefect", "mlflow"} <= names["Service"]


def test_secrets_are_keys_of_one_secret_and_never_values(written: list[Manifest]) -> None:
    for name, pod in pods(written):
        for container in containers(pod):
            for variable, value in variables(container).items():
                if any(word in variable for word in ("PASSWORD", "AUTH_STRING", "KEY", "TOKEN")):
                    assert value["secretKeyRef"]["name"] == "lora-servers", (name, variable)


@pytest.mark.parametrize(("name", "server"), [("prefect", "prefect"), ("mlflow", "mlflow")])
def test_servers_have_the_settings_of_the_compose_file(
    written: list[Manifest], name: str, server: str
) -> None:
    [container] = containers(pod_of(written, name))
    found = variables(container)
    described = COMPOSE["services"][server]["environment"]
    same = {key for key in described if key.startswith(("PREFECT_", "MLFLOW_"))}
    for key in same - {"PREFECT_SERVER_UI_API_URL", "MLFLOW_S3_ENDPOINT_URL"}:
        if not str(described[key]).startswith("${"):
            assert found[key] == described[key], key
        else:
            assert "secretKeyRef" in found[key], key
    assert container["command"][0] == COMPOSE["services"][server]["command"][0]


def test_allowed_hosts_are_the_service_and_the_ingress(written: list[Manifest]) -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    lines = (SERVERS / "settings.env").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    allowed = settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    [ingress] = [one for one in written if one["kind"] == "Ingress"]
    [mlflow, prefect] = [rule["host"] for rule in ingress["spec"]["rules"]]
    assert ingress["spec"]["tls"][0]["hosts"] == [mlflow, prefect]
    for host in (mlflow, "mlflow:5000"):
        assert is_allowed_host_header(allowed, host)
    assert not is_allowed_host_header(allowed, "elsewhere.example.com")
    assert settings["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == f"https://{mlflow}"
    assert settings["PREFECT_SERVER_UI_API_URL"] == f"https://{prefect}/api"


def test_worker_polls_the_pool_that_was_created(written: list[Manifest]) -> None:
    pool, worker = containers(pod_of(written, "lora-worker"))
    assert pool["command"][:3] == ["prefect", "work-pool", "create"]
    assert worker["args"] == COMPOSE["services"]["worker"]["command"]
    name = worker["args"][worker["args"].index("--pool") + 1]
    kind = worker["args"][worker["args"].index("--type") + 1]
    assert pool["command"][3:] == [name, "--type", kind, "--overwrite"]


def test_only_servers_and_backup_reach_the_databases(written: list[Manifest]) -> None:
    [policy] = [one for one in written if one["kind"] == "NetworkPolicy"]
    [rule] = policy["spec"]["ingress"]
    [selected] = rule["from"][0]["podSelector"]["matchExpressions"]
    users = set()
    for name, pod in pods(written):
        for container in containers(pod):
            if "PGPASSWORD" in variables(container):
                users.add(name)
    assert set(selected["values"]) == users == {"prefect", "mlflow", "lora-backup"}


def test_nothing_runs_as_root_or_writes_to_the_image(written: list[Manifest]) -> None:
    for name, pod in pods(written):
        assert pod["securityContext"]["runAsNonRoot"], name
        assert not pod["automountServiceAccountToken"], name
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            volumes = {volume["name"] for volume in pod["volumes"]} | {"data"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
