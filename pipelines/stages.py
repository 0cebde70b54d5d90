"""From a recipe to its stages: what each one's outcome depends on, and nothing else. Imports no torch."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.files import sha256_of_file
from pipelines.base_model import files_digest, identify
from pipelines.recipe import Recipe, local_path
from pipelines.sharding import sharding
from pipelines.stage import Stage, digest


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

    def train(self, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], rank: int | None) -> Stage:
        """An adapter of `rank`, or the control for None."""
        recipe, (data_stage, data_figures) = self.recipe, data
        rate = recipe.control.learning_rate[0] if rank is None else recipe.lora.learning_rate
        known = ("id", "revision", "digests", "tokenizer_sha256", "template_sha256")
        inputs: dict[str, Any] = {
            "method": "full" if rank is None else "lora",
            "base": {name: base[name] for name in known},
            "data_digest": data_figures["digest"],
            "quantization": "none" if rank is None else recipe.base_model.quantization,
            "learning_rate": rate,
            "training": recipe.training.model_dump(mode="json"),
            "processes": recipe.launch.processes,
            "launch": recipe.launch.config,
            "seed": recipe.seed,
        }
        if rank is not None:
            inputs |= {"rank": rank, "lora": recipe.lora.model_dump(mode="json", exclude={"ranks", "learning_rate"})}
        paths = {"base": base["folder"], "data": str(data_stage.folder)}
        return Stage("train", "control" if rank is None else f"rank-{rank}", inputs, self.root, paths)

    def evaluate(self, label: str, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], trained: Stage | None) -> Stage:
        """The scores of one model: a base when nothing was trained, else what `trained` left."""
        recipe, (data_stage, data_figures) = self.recipe, data
        full_precision = label in ("base", "control")
        inputs = {
            "base": base["digests"],
            "tokenizer": base["tokenizer_sha256"],
            "trained": trained.key if trained is not None else None,
            "quantization": "none" if full_precision else recipe.base_model.quantization,
            "data_digest": data_figures["digest"],
            "evaluation": recipe.evaluation.model_dump(mode="json"),
            "seed": recipe.seed,
        }
        paths = {"base": base["folder"], "data": str(data_stage.folder)}
        if trained is not None:
            output = "model" if label == "control" else "adapter"
            paths[output] = str(trained.folder / output)
        return Stage("evaluate", label, inputs, self.root, paths)


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
