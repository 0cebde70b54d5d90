"""The rendered manifests match the Kubernetes schemas, the recipe and the commands they start."""

import copy
import os
import subprocess
from pathlib import Path

import pytest
from manifests import Manifest, rendered_manifests, written_manifests

from pipelines.config.recipe import Recipe, load_recipe
from pipelines.runtime.launcher import GRACE_SECONDS, config_file

FOLDER = Path(__file__).parents[2] / "infra" / "kubernetes"
VERSIONS = ("1.31", "1.34", "1.37")
"""The oldest supported version, and later ones."""


@pytest.fixture(scope="module")
def written() -> list[Manifest]:
    """Return the manifests of the files in the kustomization."""
    return written_manifests(FOLDER)


@pytest.fixture(scope="module")
def rendered() -> list[Manifest]:
    return rendered_manifests(FOLDER)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(FOLDER / "recipe.yaml")


def only(manifests: list[Manifest], kind: str) -> Manifest:
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def container(job: Manifest) -> Manifest:
    [found] = job["spec"]["template"]["spec"]["containers"]
    return found


@pytest.fixture
def job(written: list[Manifest]) -> Manifest:
    return only(written, "Job")


@pytest.mark.parametrize("version", VERSIONS)
def test_rendered_manifests_match_the_schemas(rendered: list[Manifest], version: str) -> None:
    schemas = pytest.importorskip(
        "kubernetes_validate",
        reason="kubernetes-validate, which has the schemas, is not installed",
    )
    assert {manifest["kind"] for manifest in rendered} == {
        "ConfigMap",
        "Job",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "Service",
    }
    for manifest in rendered:
        schemas.validate(manifest, version, strict=True)
    misspelled = copy.deepcopy(only(rendered, "Job"))
    misspelled["spec"]["completion"] = 2
    with pytest.raises(schemas.ValidationError, match="completion"):
        schemas.validate(misspelled, version, strict=True)


def test_objects_that_the_job_refers_to_exist_under_their_rendered_names(
    rendered: list[Manifest],
) -> None:
    job, maps = (
        only(rendered, "Job"),
        {one["metadata"]["name"] for one in rendered if one["kind"] == "ConfigMap"},
    )
    pod = job["spec"]["template"]["spec"]
    settings = {
        one["configMapRef"]["name"] for one in container(job)["envFrom"] if "configMapRef" in one
    }
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert settings | {volumes["recipe"]["configMap"]["name"]} == maps
    assert (
        volumes["runs"]["persistentVolumeClaim"]["claimName"]
        == only(rendered, "PersistentVolumeClaim")["metadata"]["name"]
    )
    assert {mount["name"] for mount in container(job)["volumeMounts"]} == set(volumes)
    assert container(job)["image"] != "lora-pipeline", (
        "kustomize did not insert the full name of the image"
    )
    assert (
        "recipe.yaml"
        in next(one for one in rendered if one["metadata"]["name"].startswith("finetune-recipe"))[
            "data"
        ]
    )


def test_hosts_and_gpus_match_the_recipe(job: Manifest, recipe: Recipe) -> None:
    hosts = job["spec"]["completions"]
    assert hosts == job["spec"]["parallelism"] == recipe.launch.machines
    assert (
        hosts * container(job)["resources"]["limits"]["nvidia.com/gpu"] == recipe.launch.processes
    )
    assert config_file(recipe.launch.config).name.startswith("gpu_")


def test_every_pod_knows_the_address_of_the_first(job: Manifest, written: list[Manifest]) -> None:
    service, pod = only(written, "Service"), job["spec"]["template"]
    name, [port] = service["metadata"]["name"], service["spec"]["ports"]
    assert {
        "name": "LORA_MAIN_ADDRESS",
        "value": f"{job['metadata']['name']}-0.{name}:{port['port']}",
    } in container(job)["env"]
    assert pod["spec"]["subdomain"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    [away] = pod["spec"]["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert away["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    policy = only(written, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]


@pytest.mark.parametrize(
    ("index", "words"),
    [("0", "run /recipe/recipe.yaml"), ("1", "join --machine 1"), ("31", "join --machine 31")],
)
def test_each_pod_starts_the_command_of_its_index(
    job: Manifest, tmp_path: Path, index: str, words: str
) -> None:
    (tmp_path / "lora").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "lora").chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "JOB_COMPLETION_INDEX": index}
    ended = subprocess.run(
        container(job)["args"], env=env, capture_output=True, text=True, timeout=30, check=True
    )
    assert ended.stdout == f"{words}\n"


def test_first_pod_decides_the_job_and_another_pod_may_be_lost(job: Manifest) -> None:
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert pod["restartPolicy"] == "Never", "podFailurePolicy allows no other value"
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["Ignore"]
    assert pod["terminationGracePeriodSeconds"] > GRACE_SECONDS


def test_nothing_runs_as_root_or_writes_to_the_image(job: Manifest) -> None:
    pod, limits = job["spec"]["template"]["spec"], container(job)["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert not pod["automountServiceAccountToken"]
    assert limits == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {
        mount["mountPath"] for mount in container(job)["volumeMounts"] if not mount.get("readOnly")
    }
    assert writable == {"/runs", "/dev/shm", "/home/lora", "/tmp"}
