"""From a recipe to its stages: what the outcome of each one depends on, and nothing else.

Imports no torch.
"""

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
from pipelines.runtime.stage import Stage, StageResult, snapshot

SCHEDULING_SETTINGS = {
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "checkpoint_every",
    "checkpoint_time_fraction",
    "checkpoints_kept",
}
"""Training settings that distribute a step over time and memory: they change the result only by
rounding."""
WITHOUT_GENERATIONS = {"generations": 0}
"""A model that only the frontier shows generates no answers: they are slow to write, and nothing
compares them."""
FULL_BASE_INPUTS = ("digests",)
ADAPTER_BASE_INPUTS = ("id", "revision", "digests", "tokenizer_sha256", "template_sha256")
"""What a training's key contains of its base."""


@dataclass(frozen=True)
class PreparedData:
    """The stage that prepared the data, and what it reported."""

    stage: Stage
    result: StageResult


@dataclass(frozen=True)
class Stages:
    """Makes the stages of one recipe in one folder of runs."""

    recipe: Recipe
    root: Path
    folder: Path | None = None
    """Folder of the recipe's file; None if it has none."""

    def base(self) -> Stage:
        """The base model, in Hugging Face format and with a fingerprint."""
        section = self.recipe.base_model
        return base_stage(
            section.id, section.revision, self.root, trust_remote_code=section.trust_remote_code
        )

    def data(self, base: StageResult) -> Stage:
        """The splits, tokenized for this base.

        Raises:
            RecipeError: the examples may be longer than the base's context.
        """
        section = self.recipe.data
        context = base.get("context_tokens")
        if context is not None and section.max_tokens > context:
            raise RecipeError(
                f"data.max_tokens {section.max_tokens} is more than the {context} tokens of the "
                "base's context; use at most that"
            )
        paths = {"base": base["folder"]}
        if section.source == "docstrings":
            identity = sys.version
        elif (source := find(section.source, self.search_folders)) is not None:
            identity = _digest_of(source)
            paths["source"] = str(source.absolute())
        else:
            identity = section.source
        inputs = {
            "data": section.model_dump(mode="json"),
            "source": identity,
            "tokenizer": base["tokenizer_sha256"],
            "template": base["template_sha256"],
            "seed": self.recipe.seed,
            **self._trust(),
        }
        return Stage("data", Path(section.source).stem, inputs, self.root, paths)

    def plan(self, base: StageResult, data: PreparedData) -> Stage:
        """Target modules and memory."""
        recipe = self.recipe
        inputs = {
            "base": base["digests"],
            "data_digest": data.result["digest"],
            "ranks": list(recipe.lora.ranks),
            "lora": recipe.lora.model_dump(mode="json"),
            "quantization": recipe.base_model.quantization,
            "processes": recipe.launch.processes,
            "training": recipe.training.model_dump(mode="json"),
            "seed": recipe.seed,
            **sharding(recipe.launch.config),
            **self._trust(),
        }
        return Stage("plan", recipe.name, inputs, self.root, _base_and_data(base, data))

    def train(self, base: StageResult, data: PreparedData, experiment: Experiment) -> Stage:
        """The training of one experiment.

        The launch config and the number of processes are not part of the key. The key of full
        fine-tuning depends on the base's digest, the data's digest and the budget only, so that
        every recipe with the same control reuses it.
        """
        launch = self.recipe.launch
        training = self.recipe.training
        is_full = experiment.method == "full"
        output = "model/config.json" if is_full else "adapter/adapter_config.json"
        return Stage(
            "train",
            plain_label(experiment.label),
            self._training_inputs(base, data, experiment),
            self.root,
            paths=_base_and_data(base, data),
            options={
                **training.model_dump(mode="json", include=SCHEDULING_SETTINGS),
                "processes": launch.processes,
                "device": sharding(launch.config)["device"],
                "timeout_seconds": launch.timeout_seconds,
                "snapshots": list(experiment.snapshots),
            },
            expects=tuple(f"{snapshot(step)}/{output}" for step in experiment.snapshots),
        )

    def _training_inputs(
        self, base: StageResult, data: PreparedData, experiment: Experiment
    ) -> dict[str, Any]:
        recipe = self.recipe
        is_full = experiment.method == "full"
        names = FULL_BASE_INPUTS if is_full else ADAPTER_BASE_INPUTS
        training = recipe.training.model_dump(mode="json", exclude=SCHEDULING_SETTINGS)
        inputs: dict[str, Any] = {
            "method": experiment.method,
            "base": {name: base[name] for name in names},
            "data_digest": data.result["digest"],
            "quantization": "none" if is_full else recipe.base_model.quantization,
            "learning_rate": experiment.learning_rate,
            "training": training,
            "seed": recipe.seed,
            **self._trust(),
        }
        if experiment.rank is not None:
            lora = recipe.lora.model_dump(mode="json", exclude={"ranks", "learning_rate"})
            inputs |= {"rank": experiment.rank, "lora": lora}
        return inputs

    def tune(self, base: StageResult, data: PreparedData, trained: Stage) -> Stage:
        """The loss that selects a control's learning rate."""
        inputs = {
            "trained": trained.key,
            "quantization": trained.inputs["quantization"],
            "data_digest": data.result["digest"],
            **self._trust(),
        }
        output = "model" if trained.inputs["method"] == "full" else "adapter"
        paths = _base_and_data(base, data) | {output: str(trained.folder / output)}
        return Stage("tune", trained.label, inputs, self.root, paths)

    def truncate(self, trained: Stage, result: StageResult, rank: int) -> Stage:
        """A trained adapter, truncated to a lower rank."""
        inputs = {"adapter": result["adapter_sha256"], "rank": rank}
        paths = {"adapter": str(trained.folder / "adapter")}
        return Stage("cut", f"{trained.label}-to-{rank}", inputs, self.root, paths)

    def evaluate(self, base: StageResult, data: PreparedData, model: EvaluatedModel) -> Stage:
        """The scores of one model."""
        recipe = self.recipe
        settings = recipe.evaluation.model_dump(mode="json")
        files = evaluation_files(settings, self.search_folders)
        inputs: dict[str, Any] = {
            "base": base["digests"],
            "tokenizer": base["tokenizer_sha256"],
            "template": base["template_sha256"],
            "trained": model.weights,
            "quantization": "nf4" if model.quantized else "none",
            "data_digest": data.result["digest"],
            "evaluation": settings if model.is_complete else settings | WITHOUT_GENERATIONS,
            "files": {name: _digest_of(path) for name, path in files.items()},
            "seed": recipe.seed,
            **self._trust(),
        }
        if recipe.evaluation.lm_eval is not None:
            inputs["lm_eval"] = _version_of("lm_eval")
        paths = _base_and_data(base, data) | self._search_paths()
        if model.output is not None:
            paths[model.output] = model.folder
        return Stage("evaluate", plain_label(model.label), inputs, self.root, paths)

    def _trust(self) -> dict[str, bool]:
        """Return the input of stages that may run the base's code; nothing if they must not."""
        return {"trust_remote_code": True} if self.recipe.base_model.trust_remote_code else {}

    @property
    def search_folders(self) -> list[Path]:
        """Where to search for files that the recipe names."""
        return folders(self._search_paths())

    def _search_paths(self) -> dict[str, str]:
        paths = {}
        if self.folder is not None:
            paths["recipe"] = str(self.folder.absolute())
        paths["here"] = str(Path.cwd().absolute())
        return paths


def group_by_base(stages: Sequence[Stage], at_once: int) -> list[list[Stage]]:
    """Distribute evaluations over processes.

    Each process loads one base once, and all end at about the same time; the longest come first.
    """
    by_base: dict[tuple[str, str], list[Stage]] = defaultdict(list)
    for stage in stages:
        model = stage.paths.get("model", stage.paths["base"])
        by_base[model, stage.inputs["quantization"]].append(stage)
    groups = []
    for group in by_base.values():
        count = max(1, round(at_once * len(group) / len(stages)))
        groups += [group[index::count] for index in range(count)]
    return sorted(groups, key=len, reverse=True)


def plain_label(label: str) -> str:
    """Return a label as part of a folder's name."""
    return label.replace(" ", "-").replace("@", "-step-").replace("→", "-to-")


def base_stage(
    model_id: str, revision: str | None, root: Path, *, trust_remote_code: bool = False
) -> Stage:
    """Return the stage of a base model, for a recipe or for an adapter that was trained on it."""
    identity = identify(model_id, revision, trust_remote_code=trust_remote_code)
    return Stage("base", model_id.rpartition("/")[2].replace(":", "-"), {"base": identity}, root)


def _base_and_data(base: StageResult, data: PreparedData) -> dict[str, str]:
    return {"base": base["folder"], "data": str(data.stage.folder)}


def _digest_of(path: Path) -> str:
    """Return a digest of a file's content, or of all files in a folder."""
    return sha256_of_file(path) if path.is_file() else files_digest(path)


def _version_of(module: str) -> str:
    """Return the version of an optional dependency.

    Only stages that need it have it in their key.
    """
    try:
        return version(module)
    except PackageNotFoundError:
        return "none"
