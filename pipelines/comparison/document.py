"""The content of summary.json: what was compared, on which base and data, and the decision.

Reports and the registry read nothing else.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pipelines.comparison.differences import Change
from pipelines.comparison.frontier import FrontierPoint, Recommendation
from pipelines.comparison.gate import Verdict
from pipelines.comparison.grid import AdapterSettings, GridSearch
from pipelines.comparison.power import Power
from pipelines.comparison.resampling import Interval
from pipelines.comparison.scores import Scores
from pipelines.config.recipe import Recipe
from pipelines.errors import PipelineError, one_line
from pipelines.runtime.interfaces.results import (
    BaseResult,
    DataResult,
    ServedCheck,
    StageTime,
    TrainResult,
)
from pipelines.runtime.interfaces.values import Values
from pipelines.runtime.interfaces.verified import Verified

SCHEMA_VERSION: Literal[1] = 1


@dataclass(frozen=True)
class Effect(Change):
    """The difference between two models, with its KL divergence."""

    kl: float | None = None
    """Nats per token; None unless both models have distributions."""
    kl_interval: Interval | None = None
    """None for a single chat."""


@dataclass(frozen=True)
class DetectableDrop(Power):
    """What the items of general abilities can detect, together and by benchmark."""

    benchmarks: dict[str, Power]


class TrainedModel(Values):
    """How a compared model was trained."""

    rank: int | None
    """None for full fine-tuning."""
    key: str
    """Key of its training stage."""
    folder: str
    """Folder of its training stage."""
    result: TrainResult
    adapter: AdapterSettings | None = None
    """None for full fine-tuning, and in a summary of an earlier version."""


class Judgment(Values):
    """An adapter's comparison with the control, and its verdict."""

    gain_share: Interval | None
    """Fraction of the control's task gain; None if that is not significant, or without a
    control."""
    beyond_control: Interval | None
    """Change of general abilities minus the control's; None without a control."""
    verdict: Verdict


class ModelSummary(Values):
    """One compared model."""

    scores: Scores
    change: Effect | None = None
    """By training; of the 4-bit base, by quantization; None for the base."""
    total: Effect | None = None
    """Of a trained model, from the base in full precision."""
    power: DetectableDrop | None = None
    """None for the base, and if no benchmark has two items left."""
    training: TrainedModel | None = None
    """None for a base."""
    judgment: Judgment | None = None
    """Of an adapter; None for a base and for the control."""


class ControlSummary(Values):
    """How the control was trained, and how its learning rate was chosen."""

    method: Literal["full", "lora", "none"]
    rates: dict[str, float | None] = Field(default_factory=dict)
    """Learning rate → loss on the tuning examples, None if training diverged; empty for a single
    rate."""
    chosen: float | None = None
    """The control's learning rate; None without a control."""
    words: str
    """The same in a sentence."""


class RegisteredChampion(Values):
    """The champion that was registered before this run."""

    version: str
    adapter_sha256: str
    objection: str | None
    """Why it cannot be compared; None if it can."""
    label: str
    words: str
    """Its comparison, in a sentence."""


class Comparison(Values):
    """The metrics of every model, and the decision."""

    models: dict[str, ModelSummary]
    candidate: str | None
    """The last adapter that is not rejected."""
    champion: str | None
    """The adapter to promote: of those that pass, the one with the largest gain."""
    decision: str
    """The same in a sentence."""
    recommended: Recommendation | None
    """The adapter to use; None if none passes."""
    control: ControlSummary
    registered_champion: RegisteredChampion | None
    """None if there is none to compare with."""
    general_metric: str
    """What general abilities are measured by: choice_probability, or accuracy."""
    frontier: tuple[FrontierPoint, ...]
    """Every scored model, the compared ones first."""

    @property
    def adapters(self) -> dict[str, ModelSummary]:
        """The models with a verdict."""
        return {label: model for label, model in self.models.items() if model.judgment is not None}


class ForwardChecks(Values):
    """How training and scoring of a model agree with its own forward; None without the step."""

    training: Verified | None
    scoring: Verified | None
    served: ServedCheck | None = None
    """How another library scores the exports of an adapter."""


class Registered(Values):
    """What a run registered."""

    tracking_uri: str
    experiment_id: str
    parent_run: str
    runs: dict[str, str]
    """Label → run id."""
    model: str
    """Name of the registered model."""
    versions: dict[str, int]
    """Label → version."""
    aliases: dict[str, int]
    """Alias that is where the comparison puts it, moved now or before → version."""
    page: str = ""
    """Address of MLflow's table of the ranks; empty if no server has it."""


class Summary(Comparison):
    """The content of summary.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Increased when a name or a meaning changes."""
    name: str
    """Of the recipe."""
    key: str
    """Digest of the recipe and of all evaluations."""
    seed: int
    recipe: Recipe
    commit: str
    """Of the code."""
    versions: dict[str, str]
    """Library → version."""
    machine: str
    base: BaseResult
    data: DataResult
    data_warnings: tuple[str, ...] = ()
    """What may be unintended about the data."""
    items: dict[str, str]
    """Label → path of its item records."""
    forward: dict[str, ForwardChecks]
    grid: GridSearch | None = None
    """How the adapters were found; None for a recipe without a grid."""
    stages: tuple[StageTime, ...] = ()
    seconds: float = 0.0
    """Duration of the run."""
    registered: Registered | None = None
    """None before anything is registered."""


def read_summary(path: Path) -> Summary:
    """Read a summary.json.

    Raises:
        PipelineError: it was written by another version of this software, or is not a summary.
    """
    try:
        return Summary.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise PipelineError(
            f"{path} is not a summary of schema version {SCHEMA_VERSION} "
            f"({one_line(error, limit=160)}); run its recipe again, which reuses what was trained"
        ) from error
