"""What one comparison holds against what.

    base, base-nf4, control, rank-R     the models that are judged, and what they are held against
    rank-R@STEP, rank-R lr RATE, …      variants, scored for the picture of learning against forgetting
    champion-VERSION                    the registered champion, scored on the same items

Each model's training is held against the base it was trained on: an adapter's against the 4-bit base where there is one,
and a control's as well where it is an adapter itself; a fully fine-tuned control's against the base in full precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.comparison.control import describe
from pipelines.comparison.divergence import Divergence, divergences
from pipelines.comparison.frontier import Variant
from pipelines.comparison.records import Records
from pipelines.config.recipe import Recipe

BASE, QUANTIZED_BASE, CONTROL = "base", "base-nf4", "control"


@dataclass(frozen=True)
class Trained:
    """One trained model."""

    label: str
    """control, or rank-R."""
    rank: int | None
    """None for a control by full fine-tuning."""
    key: str
    """Its training stage's key."""
    folder: str
    """Its training stage's folder."""
    figures: Mapping[str, Any]
    """What training reported."""


@dataclass(frozen=True)
class Incumbent:
    """The registered champion."""

    version: str
    adapter_sha256: str
    objection: str | None = None
    """Why its answers on the same items are not to be had; None where they are."""

    @property
    def label(self) -> str:
        """Return the name of its item records."""
        return f"champion-{self.version}"


@dataclass(frozen=True)
class Beside:
    """What a comparison may have beside the models that are judged."""

    distributions: Mapping[str, Path] = field(default_factory=dict)
    """Label → its distributions.safetensors, where the base has a chat template."""
    rates: Mapping[float, float | None] = field(default_factory=dict)
    """The control's learning rates → loss on the examples kept for that, where several were tried; None where it diverged."""
    incumbent: Incumbent | None = None
    """Its items are needed, unless an adapter is the same byte for byte."""
    variants: Sequence[Variant] = ()
    """Models that are scored for the picture."""


@dataclass(frozen=True)
class Case:
    """All that is compared: items are those of every label, aligned."""

    recipe: Recipe
    trained: tuple[Trained, ...]
    items: Mapping[str, Records]
    beside: Beside

    @property
    def adapters(self) -> list[Trained]:
        """Return what is judged."""
        return [model for model in self.trained if model.label != CONTROL]

    @cached_property
    def control(self) -> dict[str, Any]:
        """Return how the control was trained."""
        return describe(self.recipe.control, self.beside.rates)

    @cached_property
    def twin(self) -> Trained | None:
        """Return the adapter that is the registered champion, byte for byte."""
        known = self.beside.incumbent
        return next(
            (
                model
                for model in self.adapters
                if known and model.figures["adapter_sha256"] == known.adapter_sha256
            ),
            None,
        )

    @cached_property
    def divergences(self) -> dict[tuple[str, str], Divergence]:
        """Return the KL divergence of every judged model, and of the base in 4 bits, from what it is held against."""
        pairs = [
            (BASE, label) for label in (QUANTIZED_BASE, *(model.label for model in self.trained))
        ]
        pairs += [(self.base_of(self.variant(model)), model.label) for model in self.trained]
        files = self.beside.distributions
        return divergences(
            self.items[BASE],
            files,
            [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(files)],
        )

    def base_of(self, variant: Variant) -> str:
        """Return the label of what a model was trained on."""
        return QUANTIZED_BASE if variant.method == "lora" and QUANTIZED_BASE in self.items else BASE

    def variant(self, model: Trained) -> Variant:
        """Return how a judged model was trained, in the terms of those that are scored for the picture."""
        steps = self.recipe.training.steps
        if model.label == CONTROL:
            return Variant(
                CONTROL, self.control["method"], model.rank, steps, self.control["chosen"]
            )
        return Variant(model.label, "lora", model.rank, steps, self.recipe.lora.learning_rate)
