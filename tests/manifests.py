"""Kubernetes manifests in a folder with a kustomization."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]


def written_manifests(folder: Path) -> list[Manifest]:
    """Return the manifests that the kustomization names, as they are written."""
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [one for name in names for one in yaml.safe_load_all((folder / name).read_text())]


def rendered_manifests(folder: Path) -> list[Manifest]:
    """Return the manifests as kustomize renders them; skip the test if it is not installed."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            ended = subprocess.run(
                [*command, str(folder)], capture_output=True, text=True, timeout=60, check=False
            )
            assert ended.returncode == 0, ended.stderr
            return list(yaml.safe_load_all(ended.stdout))
    pytest.skip("neither kustomize nor kubectl is installed")
