"""From a recipe to its stages: what each one's outcome depends on, and nothing else. Imports no torch."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.files import sha256_of_file
from pipelines.arms import Arm, Subject
from pipelines.base_model import files_digest, identify
from pipelines.recipe import Recipe, local_path
from pipelines.sharding import sharding
from pipelines.stage import Stage, digest, snapshot

SHORT = {"generations": 0, "chat_prompts": 0, "passages": 0}
"""What a model that only the frontier shows is not asked."""


@dataclass(frozen=True)
class Stages:
    """Makes the stages of one recipe under one folder of runs."""

    recipe: Recipe
    root: Path

    def base(self) -> Stage:
        """The base model, in Hugging Face format and fingerprinted."""
        return base_stage(self.recipe.base_model.id, self.recipe.base_model.revision, self.root)

    def data(self, base: dict[str, Any]) -> Stage:
        """The two splits, tokenised for this base."""
        section = self.recipe.data
        inputs = {
            "data": section.model_dump(mode="json"),
            "source": _source_identity(section.source),
            "tokenizer": base["tokenizer_sha256"],
            "template": base["template_sha256"],
            "seed": self.recipe.seed,
        }
        return Stage("data", Path(section.source).stem, inputs, self.root, {"base": base["folder"]})

    def plan(self, base: dict[str, Any], data: tuple[Stage, dict[str, Any]]) -> Stage:
        """Targets and budgets."""
        recipe, (data_stage, data_figures) = self.recipe, data
        inputs = {
            "base": base["digests"],
            "data_digest": data_figures["digest"],
            "ranks": list(recipe.lora.ranks),
            "lora": recipe.lora.model_dump(mode="json"),
            "quantization": recipe.base_model.quantization,
            "processes": recipe.launch.processes,
            "training": recipe.training.model_dump(mode="json"),
            "seed": recipe.seed,
            **sharding(recipe.launch.config),
        }
        return Stage("plan", recipe.name, inputs, self.root, {"base": base["folder"], "data": str(data_stage.folder)})

    def train(self, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], arm: Arm) -> Stage:
        """One arm's training; a control is named by its weights' digest alone, so that every recipe that needs it finds it."""
        recipe, (data_stage, data_figures) = self.recipe, data
        known = ("digests",) if arm.method == "full" else ("id", "revision", "digests", "tokenizer_sha256", "template_sha256")
        inputs: dict[str, Any] = {
            "method": arm.method,
            "base": {name: base[name] for name in known},
            "data_digest": data_figures["digest"],
            "quantization": "none" if arm.method == "full" else recipe.base_model.quantization,
            "learning_rate": arm.learning_rate,
            "training": recipe.training.model_dump(mode="json", exclude={"checkpoint_every"}),
            "processes": recipe.launch.processes,
            "launch": recipe.launch.config,
            "seed": recipe.seed,
        }
        if arm.rank is not None:
            inputs |= {"rank": arm.rank, "lora": recipe.lora.model_dump(mode="json", exclude={"ranks", "learning_rate"})}
        output = "model/config.json" if arm.method == "full" else "adapter/adapter_config.json"
        return Stage(
            "train",
            plain_label(arm.label),
            inputs,
            self.root,
            paths={"base": base["folder"], "data": str(data_stage.folder)},
            options={"checkpoint_every": recipe.training.checkpoint_every, "snapshots": list(arm.snapshots)},
            expects=tuple(f"{snapshot(step)}/{output}" for step in arm.snapshots),
        )

    def tune(self, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], trained: Stage) -> Stage:
        """The loss by which a control's rate is chosen."""
        inputs = {"trained": trained.key, "quantization": trained.inputs["quantization"], "data_digest": data[1]["digest"]}
        output = "model" if trained.inputs["method"] == "full" else "adapter"
        paths = {"base": base["folder"], "data": str(data[0].folder), output: str(trained.folder / output)}
        return Stage("tune", trained.label, inputs, self.root, paths)

    def cut(self, trained: Stage, figures: dict[str, Any], rank: int) -> Stage:
        """A trained adapter at a lower rank."""
        inputs = {"adapter": figures["adapter_sha256"], "rank": rank}
        return Stage("cut", f"{trained.label}-to-{rank}", inputs, self.root, {"adapter": str(trained.folder / "adapter")})

    def evaluate(self, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], subject: Subject) -> Stage:
        """The scores of one model."""
        recipe, (data_stage, data_figures) = self.recipe, data
        inputs = {
            "base": base["digests"],
            "tokenizer": base["tokenizer_sha256"],
            "template": base["template_sha256"],
            "trained": subject.weights,
            "quantization": recipe.base_model.quantization if subject.quantised else "none",
            "data_digest": data_figures["digest"],
            "evaluation": recipe.evaluation.model_dump(mode="json") | ({} if subject.whole else SHORT),
            "probes": {path: _source_identity(path) for path in recipe.evaluation.probes},
            "seed": recipe.seed,
        }
        paths = {"base": base["folder"], "data": str(data_stage.folder)}
        if subject.output is not None:
            paths[subject.output] = subject.folder
        return Stage("evaluate", plain_label(subject.label), inputs, self.root, paths)


def shared_out(stages: Sequence[Stage], at_once: int) -> list[list[Stage]]:
    """Deal evaluations to processes: each loads one base once, and all end at about the same time; the longest come first."""
    groups: dict[tuple[str, str], list[Stage]] = defaultdict(list)
    for stage in stages:
        groups[stage.paths.get("model", stage.paths["base"]), stage.inputs["quantization"]].append(stage)
    parts = []
    for group in groups.values():
        count = max(1, round(at_once * len(group) / len(stages)))
        parts += [group[place::count] for place in range(count)]
    return sorted(parts, key=len, reverse=True)


def plain_label(label: str) -> str:
    """Return a label as part of a folder's name."""
    return label.replace(" ", "-").replace("@", "-step-").replace("→", "-to-")


def base_stage(model_id: str, revision: str | None, root: Path) -> Stage:
    """Return the stage of a base model, whoever asks for it: a recipe, or an adapter that was trained on it."""
    return Stage("base", model_id.rpartition("/")[2].replace(":", "-"), {"base": identify(model_id, revision)}, root)


def _source_identity(source: str) -> str:
    """Return a digest that changes when local data does; a hub id or `docstrings` stands for itself."""
    path = local_path(source)
    if path.is_file():
        return sha256_of_file(path)
    if path.is_dir():
        return files_digest(path)
    return digest([source, sys.version]) if source == "docstrings" else source
