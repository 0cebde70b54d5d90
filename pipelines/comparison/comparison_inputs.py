"""The inputs of a comparison, and which models it compares.

    base, base-nf4, control, rank-R     the compared models and their references
    rank-R@STEP, rank-R lr RATE, …      variants, scored for the plot of learning versus forgetting
    champion-VERSION                    the registered champion, scored on the same items

Each model's training is compared with the base on which the model was trained. For an adapter this
is the 4-bit base if there is one, also if the adapter is the control. For a fully fine-tuned
control it is the base in full precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipelines.comparison.control import describe
from pipelines.comparison.divergence import KLDivergence, divergences
from pipelines.comparison.document import ControlSummary
from pipelines.comparison.frontier import FrontierVariant
from pipelines.comparison.grid import AdapterSettings
from pipelines.comparison.records import Records
from pipelines.config.recipe import Recipe
from pipelines.runtime.interfaces.results import TrainResult

BASE = "base"
QUANTIZED_BASE = "base-nf4"
CONTROL = "control"


@dataclass(frozen=True)
class ComparedModel:
    """One trained model."""

    label: str
    """control, or rank-R."""
    rank: int | None
    """None for a control by full fine-tuning."""
    key: str
    """Key of its training stage."""
    folder: str
    """Folder of its training stage."""
    result: TrainResult
    """Of its training stage."""
    adapter: AdapterSettings | None = None
    """None for full fine-tuning, and in a summary of an earlier version."""


@dataclass(frozen=True)
class ComparedChampion:
    """The registered champion."""

    version: str
    adapter_sha256: str
    objection: str | None = None
    """Why there are no records of it on the same items; None if there are."""

    @property
    def label(self) -> str:
        """Return the label of its item records."""
        return f"champion-{self.version}"


@dataclass(frozen=True)
class ComparisonContext:
    """Optional inputs of a comparison."""

    distributions: Mapping[str, Path] = field(default_factory=dict)
    """Label → its distributions.safetensors, if the base has a chat template."""
    rates: Mapping[float, float | None] = field(default_factory=dict)
    """The control's learning rates → loss on the tuning examples, if several were tried; None if
    training diverged."""
    champion: ComparedChampion | None = None
    """Its item records are required, unless one of the adapters is identical."""
    variants: Sequence[FrontierVariant] = ()
    """Models that are scored for the frontier only."""


@dataclass(frozen=True)
class ComparisonInputs:
    """All inputs of a comparison; `items` holds the aligned records of every label."""

    recipe: Recipe
    trained: tuple[ComparedModel, ...]
    items: Mapping[str, Records]
    context: ComparisonContext

    @property
    def adapters(self) -> list[ComparedModel]:
        """Return the models that the gate judges."""
        return [model for model in self.trained if model.label != CONTROL]

    @cached_property
    def control(self) -> ControlSummary:
        """Return how the control was trained."""
        return describe(self.recipe.control, self.context.rates)

    @cached_property
    def champion_here(self) -> ComparedModel | None:
        """Return the adapter whose file is identical to the registered champion's."""
        champion = self.context.champion
        if champion is None:
            return None
        for model in self.adapters:
            if model.result.saved.adapter_sha256 == champion.adapter_sha256:
                return model
        return None

    @cached_property
    def divergences(self) -> dict[tuple[str, str], KLDivergence]:
        """Return the KL divergence of each model and of the 4-bit base from its references."""
        files = self.context.distributions
        pairs = [(BASE, QUANTIZED_BASE)]
        for model in self.trained:
            training_base = self.base_of(self.variant(model))
            pairs.append((BASE, model.label))
            pairs.append((training_base, model.label))
        available = []
        for pair in dict.fromkeys(pairs):
            before, after = pair
            if before in files and after in files:
                available.append(pair)
        return divergences(self.items[BASE], files, available)

    def base_of(self, variant: FrontierVariant) -> str:
        """Return the label of the base on which a model was trained."""
        return QUANTIZED_BASE if variant.method == "lora" and QUANTIZED_BASE in self.items else BASE

    def variant(self, model: ComparedModel) -> FrontierVariant:
        """Return how a compared model was trained, as the frontier describes it."""
        method = "lora"
        learning_rate = self.recipe.lora.learning_rate
        if model.adapter is not None:
            learning_rate = model.adapter.learning_rate
        if model.label == CONTROL:
            assert self.control.chosen is not None, "a control has a learning rate"
            method = self.control.method
            learning_rate = self.control.chosen
        return FrontierVariant(
            label=model.label,
            method=method,
            rank=model.rank,
            step=model.result.saved_step,
            learning_rate=learning_rate,
        )
