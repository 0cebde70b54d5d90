"""From a recipe to its stages: what the outcome of each one depends on, and nothing else.

Imports no torch.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_core.files import sha256_of_file
from pipelines.config.experiments import EvaluatedModel, Experiment
from pipelines.config.recipe import Recipe
from pipelines.config.sections import LoraSettings, OptimizationSettings, SchedulingSettings
from pipelines.errors import RecipeError
from pipelines.models.base_model import files_digest, identify
from pipelines.models.processor import identify_processor
from pipelines.models.tokenizer_facts import TokenizerFacts
from pipelines.paths import evaluation_files, folders
from pipelines.runtime.interfaces.inputs import (
    AdapterInputs,
    BaseInputs,
    CheckInputs,
    CutInputs,
    DataInputs,
    EvaluateInputs,
    PlanInputs,
    ProcessorInputs,
    StagePaths,
    TrainInputs,
    TrainOptions,
    TuneInputs,
)
from pipelines.runtime.interfaces.kinds import (
    BASE,
    CHECK,
    CUT,
    DATA,
    EVALUATE,
    PLAN,
    PROCESSOR,
    TRAIN,
    TUNE,
)
from pipelines.runtime.interfaces.plan_result import PlanResult
from pipelines.runtime.interfaces.results import (
    BaseResult,
    CheckResult,
    CutResult,
    DataResult,
    EvaluateResult,
    ProcessorResult,
    TrainResult,
    TuneResult,
)
from pipelines.runtime.interfaces.values import narrowed
from pipelines.runtime.sharding import launch_facts
from pipelines.runtime.stage import Stage, snapshot
from pipelines.workflow.named_sources import NamedSources

RESCORED = 8
"""Held-out examples on which the exports of an adapter are scored again."""
BaseStage = Stage[BaseInputs, BaseResult]
ProcessorStage = Stage[ProcessorInputs, ProcessorResult]
DataStage = Stage[DataInputs, DataResult]
CheckStage = Stage[CheckInputs, CheckResult]
PlanStage = Stage[PlanInputs, PlanResult]
TrainStage = Stage[TrainInputs, TrainResult]
TuneStage = Stage[TuneInputs, TuneResult]
CutStage = Stage[CutInputs, CutResult]
EvaluateStage = Stage[EvaluateInputs, EvaluateResult]


@dataclass(frozen=True)
class PreparedData:
    """The stage that prepared the data, and what it reported."""

    stage: DataStage
    result: DataResult


@dataclass(frozen=True)
class Stages:
    """Makes the stages of one recipe in one folder of runs."""

    recipe: Recipe
    root: Path
    folder: Path | None = None
    """Folder of the recipe's file; None if it has none."""

    def of(self, recipe: Recipe) -> "Stages":
        """Return the same for another recipe."""
        return replace(self, recipe=recipe)

    def base(self) -> BaseStage:
        """The base model, in Hugging Face format and with a fingerprint."""
        section = self.recipe.base_model
        return base_stage(
            section.id, section.revision, self.root, trust_remote_code=section.trust_remote_code
        )

    def processor(self) -> ProcessorStage | None:
        """The speed of this host's CPU in bfloat16; None if it has no units for it."""
        inputs = identify_processor()
        if not inputs.units:
            return None
        return Stage(PROCESSOR, "-".join(inputs.units), inputs, self.root)

    def data(self, base: TokenizerFacts) -> DataStage:
        """The splits, tokenized for this base.

        Raises:
            RecipeError: the examples may be longer than the base's context.
        """
        section = self.recipe.data
        context = base.context_tokens
        if context is not None and section.max_tokens > context:
            raise RecipeError(
                f"data.max_tokens {section.max_tokens} is more than the {context} tokens of the "
                "base's context; use at most that"
            )
        named = NamedSources.of(section, self.search_folders)
        inputs = DataInputs(
            data=section,
            sources=named.identities,
            tokenizer=base.tokenizer_sha256,
            template=base.template_sha256,
            seed=self.recipe.seed,
            trust_remote_code=self._is_trusted,
        )
        paths = StagePaths(base=base.folder, sources=named.paths)
        return Stage(DATA, section.label, inputs, self.root, paths)

    def check(self, base: TokenizerFacts, data: PreparedData) -> CheckStage:
        """What the training data share with the evaluation."""
        settings = self.recipe.evaluation
        files = evaluation_files(settings, self.search_folders)
        lm_eval = settings.lm_eval
        names = [*settings.probes]
        if lm_eval is not None and lm_eval.include_path is not None:
            names.append(lm_eval.include_path)
        inputs = CheckInputs(
            data_digest=data.result.digest,
            general=settings.general,
            items_per_benchmark=settings.items_per_benchmark,
            probes=settings.probes,
            files={name: content_digest(files[name]) for name in names if name in files},
            seed=self.recipe.seed,
            lm_eval=lm_eval,
            lm_eval_version=None if lm_eval is None else _version_of("lm_eval"),
            trust_remote_code=self._is_trusted,
        )
        recipe_folder, here = self._search_paths()
        paths = _base_and_data(base, data, recipe=recipe_folder, here=here)
        return Stage(CHECK, self.recipe.name, inputs, self.root, paths)

    def plan(self, base: BaseResult, data: PreparedData) -> PlanStage:
        """Target modules and memory."""
        recipe = self.recipe
        inputs = PlanInputs(
            base_digests=base.digests,
            data_digest=data.result.digest,
            lora=recipe.lora,
            quantization=recipe.base_model.quantization,
            training=recipe.training,
            launch=launch_facts(recipe.launch.config),
            processes=recipe.launch.processes,
            seed=recipe.seed,
            trust_remote_code=self._is_trusted,
        )
        return Stage(PLAN, recipe.name, inputs, self.root, _base_and_data(base, data))

    def train(
        self,
        base: BaseResult,
        data: PreparedData,
        experiment: Experiment,
        first_steps: int | None = None,
    ) -> TrainStage:
        """The training of one experiment.

        The launch config and the number of processes are not part of the key.

        Args:
            base: what the base's stage reported.
            data: the prepared data.
            experiment: what is trained.
            first_steps: steps of a trial, which is the beginning of the training; None for all.
        """
        launch = self.recipe.launch
        snapshots = experiment.snapshots if first_steps is None else ()
        scheduling = narrowed(self.recipe.training, SchedulingSettings)
        is_full = experiment.method == "full"
        output = "model/config.json" if is_full else "adapter/adapter_config.json"
        return Stage(
            TRAIN,
            plain_label(experiment.label)
            + ("" if first_steps is None else f"-{first_steps}-steps"),
            self._training_inputs(base, data, experiment, first_steps),
            self.root,
            paths=_base_and_data(base, data),
            options=TrainOptions(
                **scheduling.model_dump(),
                processes=launch.processes,
                device=launch_facts(launch.config).device,
                timeout_seconds=launch.timeout_seconds,
                snapshots=snapshots,
            ),
            expects=tuple(f"{snapshot(step)}/{output}" for step in snapshots),
        )

    def _training_inputs(
        self,
        base: BaseResult,
        data: PreparedData,
        experiment: Experiment,
        first_steps: int | None,
    ) -> TrainInputs:
        recipe = self.recipe
        adapter = None
        if experiment.rank is not None:
            lora = narrowed(recipe.lora, LoraSettings)
            if experiment.target_modules is not None:
                lora = lora.model_copy(update={"target_modules": experiment.target_modules})
            adapter = AdapterInputs(
                rank=experiment.rank,
                lora=lora,
                base_id=base.id,
                base_revision=base.revision,
                tokenizer_sha256=base.tokenizer_sha256,
                template_sha256=data.result.template_sha256,
                end_tokens=data.result.end_tokens,
            )
        return TrainInputs(
            base_digests=base.digests,
            data_digest=data.result.digest,
            quantization="none" if adapter is None else recipe.base_model.quantization,
            learning_rate=experiment.learning_rate,
            training=narrowed(recipe.training, OptimizationSettings),
            seed=recipe.seed,
            adapter=adapter,
            first_steps=first_steps,
            trust_remote_code=self._is_trusted,
        )

    def tune(self, base: BaseResult, data: PreparedData, trained: TrainStage) -> TuneStage:
        """The loss that selects a control's learning rate, or adapters of a grid."""
        inputs = TuneInputs(
            trained=trained.key,
            quantization=trained.inputs.quantization,
            data_digest=data.result.digest,
            trust_remote_code=self._is_trusted,
        )
        output = "model" if trained.inputs.method == "full" else "adapter"
        paths = _base_and_data(base, data, **{output: str(trained.folder / output)})
        return Stage(TUNE, trained.label, inputs, self.root, paths)

    def truncate(self, trained: TrainStage, result: TrainResult, rank: int) -> CutStage:
        """A trained adapter, truncated to a lower rank."""
        inputs = CutInputs(adapter=str(result.saved.adapter_sha256), rank=rank)
        paths = StagePaths(adapter=str(trained.folder / "adapter"))
        return Stage(CUT, f"{trained.label}-to-{rank}", inputs, self.root, paths)

    def evaluate(
        self, base: BaseResult, data: PreparedData, model: EvaluatedModel
    ) -> EvaluateStage:
        """The scores of one model.

        A model that only the frontier shows generates no answers: they are slow to write, and
        nothing compares them.
        """
        settings = self.recipe.evaluation
        files = evaluation_files(settings, self.search_folders)
        inputs = EvaluateInputs(
            base_digests=base.digests,
            tokenizer=base.tokenizer_sha256,
            template=data.result.template_sha256,
            trained=model.weights,
            quantization="nf4" if model.quantized else "none",
            data_digest=data.result.digest,
            evaluation=settings,
            generations=settings.generations if model.is_complete else 0,
            rescored=RESCORED if model.is_complete and model.output == "adapter" else 0,
            end_tokens=data.result.end_tokens,
            files={name: content_digest(path) for name, path in files.items()},
            seed=self.recipe.seed,
            lm_eval=None if settings.lm_eval is None else _version_of("lm_eval"),
            trust_remote_code=self._is_trusted,
        )
        outputs = {} if model.output is None else {model.output: model.folder}
        recipe_folder, here = self._search_paths()
        paths = _base_and_data(base, data, recipe=recipe_folder, here=here, **outputs)
        return Stage(EVALUATE, plain_label(model.label), inputs, self.root, paths)

    @property
    def _is_trusted(self) -> bool:
        """Whether stages may run the base's own code."""
        return self.recipe.base_model.trust_remote_code

    @property
    def search_folders(self) -> list[Path]:
        """Where to search for files that the recipe names."""
        return folders(*self._search_paths())

    def _search_paths(self) -> tuple[str | None, str]:
        recipe = None if self.folder is None else str(self.folder.absolute())
        return recipe, str(Path.cwd().absolute())


def group_by_base(stages: Sequence[EvaluateStage], at_once: int) -> list[list[EvaluateStage]]:
    """Distribute evaluations over processes.

    Each process loads one base once, and all end at about the same time; the longest come first.
    """
    by_base: dict[tuple[Path, str], list[EvaluateStage]] = defaultdict(list)
    for stage in stages:
        by_base[stage.paths.weights, stage.inputs.quantization].append(stage)
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
) -> BaseStage:
    """Return the stage of a base model, for a recipe or for an adapter that was trained on it."""
    identity = identify(model_id, revision, trust_remote_code=trust_remote_code)
    label = model_id.rpartition("/")[2].replace(":", "-")
    return Stage(BASE, label, BaseInputs(base=identity), root)


def _base_and_data(base: TokenizerFacts, data: PreparedData, **others: str | None) -> StagePaths:
    paths = {"base": base.folder, "data": str(data.stage.folder), **others}
    return StagePaths.model_validate(paths)


def content_digest(path: Path) -> str:
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
