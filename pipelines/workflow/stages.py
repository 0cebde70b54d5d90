"""From a recipe to its stages: what each one's outcome depends on, and nothing else. Imports no torch."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_core.files import sha256_of_file
from pipelines.config.experiments import EvaluatedModel, Experiment
from pipelines.config.recipe import Recipe
from pipelines.errors import RecipeError
from pipelines.models.base_model import files_digest, identify
from pipelines.paths import evaluation_files, find, folders
from pipelines.runtime.sharding import sharding
from pipelines.runtime.stage import Stage, snapshot

SPREAD = {
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "checkpoint_every",
    "checkpoint_time_fraction",
    "checkpoints_kept",
}
"""Settings of training that say how a step is spread over time and memory: what is learnt is the same but for rounding."""
SHORT = {"generations": 0}
"""What a model that only the frontier shows is not asked: answers, which are slow to write and are judged nowhere."""


@dataclass(frozen=True)
class Stages:
    """Makes the stages of one recipe under one folder of runs."""

    recipe: Recipe
    root: Path
    folder: Path | None = None
    """Where the recipe's file lies; None where it has none."""

    def base(self) -> Stage:
        """The base model, in Hugging Face format and fingerprinted."""
        section = self.recipe.base_model
        return base_stage(
            section.id, section.revision, self.root, trust_remote_code=section.trust_remote_code
        )

    def data(self, base: dict[str, Any]) -> Stage:
        """The splits, tokenised for this base; raises RecipeError where it would be given longer examples than it takes."""
        section, context = self.recipe.data, base.get("context_tokens")
        if context is not None and section.max_tokens > context:
            raise RecipeError(
                f"data.max_tokens {section.max_tokens} is more than the {context} tokens that the base takes; use at most that"
            )
        is_harvested = section.source == "docstrings"
        source = None if is_harvested else find(section.source, self.places)
        inputs = {
            "data": section.model_dump(mode="json"),
            "source": sys.version
            if is_harvested
            else section.source
            if source is None
            else _identity(source),
            "tokenizer": base["tokenizer_sha256"],
            "template": base["template_sha256"],
            "seed": self.recipe.seed,
            **self._trust(),
        }
        paths = {"base": base["folder"]} | (
            {} if source is None else {"source": str(source.absolute())}
        )
        return Stage("data", Path(section.source).stem, inputs, self.root, paths)

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
            **self._trust(),
        }
        return Stage(
            "plan",
            recipe.name,
            inputs,
            self.root,
            {"base": base["folder"], "data": str(data_stage.folder)},
        )

    def train(
        self, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], arm: Experiment
    ) -> Stage:
        """One arm's training, whoever computes it: launch and processes are no part of the key.

        A control by full fine-tuning is named by the base's digest, the data's and the budget alone, so that every recipe that
        needs it finds it.
        """
        recipe, (data_stage, data_figures) = self.recipe, data
        known = (
            ("digests",)
            if arm.method == "full"
            else ("id", "revision", "digests", "tokenizer_sha256", "template_sha256")
        )
        inputs: dict[str, Any] = {
            "method": arm.method,
            "base": {name: base[name] for name in known},
            "data_digest": data_figures["digest"],
            "quantization": "none" if arm.method == "full" else recipe.base_model.quantization,
            "learning_rate": arm.learning_rate,
            "training": recipe.training.model_dump(mode="json", exclude=SPREAD),
            "seed": recipe.seed,
            **self._trust(),
        }
        if arm.rank is not None:
            inputs |= {
                "rank": arm.rank,
                "lora": recipe.lora.model_dump(mode="json", exclude={"ranks", "learning_rate"}),
            }
        output = "model/config.json" if arm.method == "full" else "adapter/adapter_config.json"
        return Stage(
            "train",
            plain_label(arm.label),
            inputs,
            self.root,
            paths={"base": base["folder"], "data": str(data_stage.folder)},
            options={
                **recipe.training.model_dump(mode="json", include=SPREAD),
                "processes": recipe.launch.processes,
                "device": sharding(recipe.launch.config)["device"],
                "timeout_seconds": recipe.launch.timeout_seconds,
                "snapshots": list(arm.snapshots),
            },
            expects=tuple(f"{snapshot(step)}/{output}" for step in arm.snapshots),
        )

    def tune(
        self, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], trained: Stage
    ) -> Stage:
        """The loss by which a control's rate is chosen."""
        inputs = {
            "trained": trained.key,
            "quantization": trained.inputs["quantization"],
            "data_digest": data[1]["digest"],
            **self._trust(),
        }
        output = "model" if trained.inputs["method"] == "full" else "adapter"
        paths = {
            "base": base["folder"],
            "data": str(data[0].folder),
            output: str(trained.folder / output),
        }
        return Stage("tune", trained.label, inputs, self.root, paths)

    def cut(self, trained: Stage, figures: dict[str, Any], rank: int) -> Stage:
        """A trained adapter at a lower rank."""
        inputs = {"adapter": figures["adapter_sha256"], "rank": rank}
        return Stage(
            "cut",
            f"{trained.label}-to-{rank}",
            inputs,
            self.root,
            {"adapter": str(trained.folder / "adapter")},
        )

    def evaluate(
        self, base: dict[str, Any], data: tuple[Stage, dict[str, Any]], subject: EvaluatedModel
    ) -> Stage:
        """The scores of one model."""
        recipe, (data_stage, data_figures) = self.recipe, data
        settings = recipe.evaluation.model_dump(mode="json")
        inputs: dict[str, Any] = {
            "base": base["digests"],
            "tokenizer": base["tokenizer_sha256"],
            "template": base["template_sha256"],
            "trained": subject.weights,
            "quantization": "nf4" if subject.quantized else "none",
            "data_digest": data_figures["digest"],
            "evaluation": settings | ({} if subject.whole else SHORT),
            "files": {
                name: _identity(path)
                for name, path in evaluation_files(settings, self.places).items()
            },
            "seed": recipe.seed,
            **self._trust(),
        }
        if recipe.evaluation.lm_eval is not None:
            inputs["lm_eval"] = _version_of("lm_eval")
        paths = {"base": base["folder"], "data": str(data_stage.folder), **self._places()}
        if subject.output is not None:
            paths[subject.output] = subject.folder
        return Stage("evaluate", plain_label(subject.label), inputs, self.root, paths)

    def _trust(self) -> dict[str, bool]:
        """Return that code of the base may run, for the stages that load it; nothing where it may not."""
        return {"trust_remote_code": True} if self.recipe.base_model.trust_remote_code else {}

    @property
    def places(self) -> list[Path]:
        """Return where files that the recipe names are looked for."""
        return folders(self._places())

    def _places(self) -> dict[str, str]:
        named = {"recipe": self.folder, "here": Path.cwd()}
        return {
            name: str(folder.absolute()) for name, folder in named.items() if folder is not None
        }


def group_by_base(stages: Sequence[Stage], at_once: int) -> list[list[Stage]]:
    """Deal evaluations to processes: each loads one base once, and all end at about the same time; the longest come first."""
    groups: dict[tuple[str, str], list[Stage]] = defaultdict(list)
    for stage in stages:
        groups[stage.paths.get("model", stage.paths["base"]), stage.inputs["quantization"]].append(
            stage
        )
    parts = []
    for group in groups.values():
        count = max(1, round(at_once * len(group) / len(stages)))
        parts += [group[place::count] for place in range(count)]
    return sorted(parts, key=len, reverse=True)


def plain_label(label: str) -> str:
    """Return a label as part of a folder's name."""
    return label.replace(" ", "-").replace("@", "-step-").replace("→", "-to-")


def base_stage(
    model_id: str, revision: str | None, root: Path, *, trust_remote_code: bool = False
) -> Stage:
    """Return the stage of a base model, whoever asks for it: a recipe, or an adapter that was trained on it."""
    identity = identify(model_id, revision, trust_remote_code=trust_remote_code)
    return Stage("base", model_id.rpartition("/")[2].replace(":", "-"), {"base": identity}, root)


def _identity(path: Path) -> str:
    """Return a digest that changes with what a file holds, or with a folder's files."""
    return sha256_of_file(path) if path.is_file() else files_digest(path)


def _version_of(module: str) -> str:
    """Return the version of an extra; it stands in no key where nothing asks for it."""
    try:
        return version(module)
    except PackageNotFoundError:
        return "none"
