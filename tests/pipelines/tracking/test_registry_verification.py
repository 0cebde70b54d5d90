"""Verification of a version: its verdict is recomputed, and every mutation is detected."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from consistent_comparison import CHAMPION, consistent
from registered import configure_store, register

mlflow = pytest.importorskip("mlflow")
from pipelines.tracking import decisions  # noqa: E402
from pipelines.tracking.bundle_verification import (  # noqa: E402
    VersionBundle,
    download_bundle,
    verify_bundle,
)
from pipelines.tracking.evidence_files import ITEMS, SUMMARY, read_evidence  # noqa: E402
from pipelines.tracking.open_decision import Grounds  # noqa: E402
from pipelines.tracking.recomputation import recompute  # noqa: E402
from pipelines.tracking.references import Reference  # noqa: E402
from pipelines.tracking.version_files import (  # noqa: E402
    DOWNLOAD_NOTE,
    EVIDENCE,
    EVIDENCE_TAG,
    document_tags,
)

pytestmark = pytest.mark.server
MUTATIONS = int(os.environ.get("LORA_TEST_MUTATIONS", "200"))
"""LORA_TEST_MUTATIONS=1000 tries more."""
NAME = "verified"
NOT_VERIFIED = {"author", "flow_run"}
"""Tags of the process that registered a version, which follow from nothing."""
SCORED = ("scores", "change", "total", "judgment", "power")


@pytest.fixture(scope="module")
def bundle(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VersionBundle]:
    """What the registry stores of the version that passed; its alias has moved four times."""
    folder = tmp_path_factory.mktemp("verified")
    summary = consistent(folder, NAME)
    summary["recipe"]["registry"]["promote"] = "propose"
    summary["registered_champion"] |= {"version": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        configure_store(runs)
        register(summary, runs)
        grounds = Grounds("it passes")
        decisions.promote(Reference(NAME, alias="proposed"), grounds, runs)
        client = mlflow.MlflowClient()
        yield download_bundle(client, Reference(NAME, alias="champion"), folder / "download")


@dataclass(frozen=True)
class Mutation:
    """A copy of the bundle that is changed in one place."""

    random: Random
    bundle: VersionBundle

    def any_byte(self) -> VersionBundle:
        """Flip one bit of one file."""
        path = self.random.choice(self._files())
        content = bytearray(path.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        return self.bundle

    def any_file(self) -> VersionBundle:
        """Add, remove or truncate a file."""
        path = self.random.choice(self._files())
        kind = self.random.choice(["add", "remove", "truncate"])
        if kind == "add":
            (path.parent / "added.json").write_text("{}")
        elif kind == "remove":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1])
        return self.bundle

    def any_tag(self) -> VersionBundle:
        """Change or remove one tag of the version."""
        tags = dict(self.bundle.tags)
        name = self.random.choice(sorted(tags.keys() - NOT_VERIFIED))
        value = tags.pop(name)
        if self.random.random() < 0.7:
            tags[name] = f"{value}0"
        return replace(self.bundle, tags=tags)

    def any_alias(self) -> VersionBundle:
        """Move an alias away, remove it, or add one."""
        aliases = dict(self.bundle.aliases)
        kind = self.random.choice(["move", "remove", "add"])
        alias = self.random.choice(sorted(aliases))
        if kind == "move":
            aliases[alias] = "99"
        elif kind == "remove":
            del aliases[alias]
        else:
            aliases[f"new{self.random.randrange(100)}"] = self.bundle.version
        return replace(self.bundle, aliases=aliases)

    def any_entry(self) -> VersionBundle:
        """Change or remove one entry of the log, or the digest of the last one."""
        tags = dict(self.bundle.model_tags)
        name = self.random.choice([tag for tag in sorted(tags) if tag.startswith("lora.mov")])
        if self.random.random() < 0.3:
            del tags[name]
        else:
            entry = json.loads(tags[name])
            field = self.random.choice(["time", "user", "reason", "flow_run"])
            entry[field] += "0"
            tags[name] = json.dumps(entry)
        return replace(self.bundle, model_tags=tags)

    def any_item(self) -> VersionBundle:
        """Change the result of one item, and forge the digest of the records."""
        path = self.bundle.folder / EVIDENCE / ITEMS
        items = json.loads(path.read_text())
        label = self.random.choice(sorted(items))
        kinds = ["task"] if label == CHAMPION else ["task", "general", "text", "generation"]
        kind = self.random.choice(kinds)
        record = self.random.choice([one for one in items[label] if one["kind"] == kind])
        change = self.random.choice([-1, 1]) * self.random.uniform(1e-5, 0.1)
        if label == CHAMPION:
            change *= 1e5  # only a sentence with three decimals contains its gain
        if kind == "general":
            record["log_likelihoods"][self.random.randrange(2)] += change
        elif kind == "generation":
            record["metrics"]["chrf"] += change
        else:
            record["nll"] += change
        path.write_text(json.dumps(items))
        return self._forged()

    def any_score(self) -> VersionBundle:
        """Change one metric, interval or verdict of the summary, and forge its digest."""
        path = self.bundle.folder / EVIDENCE / SUMMARY
        summary = json.loads(path.read_text())
        label = self.random.choice(sorted(summary["models"]))
        model = summary["models"][label]
        part = self.random.choice([name for name in SCORED if model[name] is not None])
        places = list(_numbers(model[part]))
        parent, key = self.random.choice(places)
        if isinstance(parent[key], int):
            parent[key] += 1
        else:
            parent[key] += self.random.choice([-1, 1]) * 10 ** self.random.uniform(-6, -1)
        path.write_text(json.dumps(summary))
        return self._forged()

    def _files(self) -> list[Path]:
        """Return the files of the version; MLflow adds a note to each download."""
        found = self.bundle.folder.rglob("*")
        return sorted(path for path in found if path.is_file() and path.name != DOWNLOAD_NOTE)

    def _forged(self) -> VersionBundle:
        """Return the bundle with the digest of the evidence as it is now."""
        digest = document_tags(self.bundle.folder)[EVIDENCE_TAG]
        return replace(self.bundle, tags={**self.bundle.tags, EVIDENCE_TAG: digest})


def _numbers(values: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the place of each number that follows from the records."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        if isinstance(value, dict | list):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield values, key


KINDS: tuple[Callable[[Mutation], VersionBundle], ...] = (
    Mutation.any_byte,
    Mutation.any_file,
    Mutation.any_tag,
    Mutation.any_alias,
    Mutation.any_entry,
    Mutation.any_item,
    Mutation.any_score,
)


def test_version_as_registered_is_intact(bundle: VersionBundle) -> None:
    report = verify_bundle(bundle)
    assert {check.name: check.problems for check in report.checks if check.problems} == {}
    assert [check.status for check in report.checks] == ["ok"] * 6
    assert bundle.tags["verdict"] == "pass"
    files = {path.relative_to(bundle.folder).as_posix() for path in bundle.folder.rglob("*.*")}
    assert (bundle.folder / "MLmodel").is_file()
    assert files == {
        "README.md",
        "adapter_model.safetensors",
        "bom.cdx.json",
        "evidence/items.json",
        "evidence/summary.json",
    }


def test_every_mutation_is_detected(bundle: VersionBundle, tmp_path: Path) -> None:
    missed = []
    for seed in range(MUTATIONS):
        folder = tmp_path / "copy"
        shutil.copytree(bundle.folder, folder)
        mutate = KINDS[seed % len(KINDS)]
        changed = mutate(Mutation(Random(seed), replace(bundle, folder=folder)))
        if verify_bundle(changed).is_intact:
            missed.append((seed, mutate.__name__))
        shutil.rmtree(folder)
    assert missed == []


def test_verdict_is_the_same_on_another_processor(bundle: VersionBundle) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipelines.tracking.evidence_files import read_evidence\n"
        "from pipelines.tracking.recomputation import recompute\n"
        "print(recompute(read_evidence(Path(sys.argv[1]))).model_dump_json())\n"
        "assert 'torch' not in sys.modules"
    )
    oldest = {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(bundle.folder / EVIDENCE)]
    ended = subprocess.run(
        command, env={**os.environ, **oldest}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    here = recompute(read_evidence(bundle.folder / EVIDENCE))
    assert json.loads(ended.stdout) == here.plain()


def test_version_without_evidence_is_verified_as_far_as_possible(
    bundle: VersionBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    shutil.rmtree(folder / EVIDENCE)
    tags = {name: value for name, value in bundle.tags.items() if name != EVIDENCE_TAG}
    report = verify_bundle(replace(bundle, folder=folder, tags=tags))
    assert report.is_intact
    assert {check.name for check in report.checks if check.skipped} == {"verdict", "tags"}
