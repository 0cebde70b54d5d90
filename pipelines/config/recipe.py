"""The recipe: one typed, strict description of a run, read from YAML. Loading it imports no torch.

An unknown key is an error with a suggestion, a value out of range names its rule, and what can be derived is not asked for.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from pipelines.config.error_messages import sentences
from pipelines.config.sections import (
    BaseModelSection,
    ControlSection,
    DataSection,
    EvaluationSection,
    FrontierSection,
    GateSection,
    LaunchSection,
    LoraSection,
    RegistrySection,
    Section,
    TrainingSection,
)
from pipelines.errors import RecipeError

RECIPES = Path(__file__).parents[1] / "recipes"


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Names the run's folder; task_model_hardware reads well."""
    seed: int = 7
    """Draws the split, the order, A, dropout and the samples."""
    base_model: BaseModelSection
    data: DataSection
    lora: LoraSection
    control: ControlSection = ControlSection()
    frontier: FrontierSection = FrontierSection()
    training: TrainingSection
    launch: LaunchSection = LaunchSection()
    evaluation: EvaluationSection = EvaluationSection()
    gate: GateSection = GateSection()
    registry: RegistrySection

    @model_validator(mode="after")
    def _batch_fits(self) -> "Recipe":
        parts = self.launch.processes * self.training.gradient_accumulation_steps
        if self.training.batch_size < parts:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} gives {self.launch.processes} processes × "
                f"{self.training.gradient_accumulation_steps} parts less than one example each; use at least {parts}"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "Recipe":
        warmup, steps = self.training.warmup_steps, self.training.steps
        if warmup >= steps:
            raise ValueError(
                f"training.warmup_steps {warmup} fills all of training.steps {steps}, so that the peak rate is never reached; "
                f"use at most {steps - 1}, or more steps"
            )
        return self

    @model_validator(mode="after")
    def _frontier_has_an_effect(self) -> "Recipe":
        late = [step for step in self.frontier.snapshots if step >= self.training.steps]
        high = [rank for rank in self.frontier.cuts if rank >= max(self.lora.ranks)]
        if late:
            raise ValueError(
                f"frontier.snapshots names step {late[0]} of training.steps {self.training.steps}; use earlier ones"
            )
        if high:
            raise ValueError(
                f"frontier.cuts names rank {high[0]}, and the highest rank is {max(self.lora.ranks)}; use lower ones"
            )
        if self.lora.learning_rate in self.frontier.learning_rates:
            raise ValueError(
                f"frontier.learning_rates repeats lora.learning_rate {self.lora.learning_rate:g}; name others"
            )
        return self

    @model_validator(mode="after")
    def _check_loftq_is_quantized(self) -> "Recipe":
        if self.lora.init == "loftq" and self.base_model.quantization == "none":
            raise ValueError(
                "lora.init 'loftq' has no effect under base_model.quantization 'none', which rounds nothing; use 'nf4', or another init"
            )
        return self

    @model_validator(mode="after")
    def _check_generations(self) -> "Recipe":
        asked, held_out = self.evaluation.generations, self.data.validation_examples
        if asked <= held_out:
            return self
        if "generations" in self.evaluation.model_fields_set:
            raise ValueError(
                f"evaluation.generations {asked} is more than data.validation_examples {held_out}, whose prompts it answers; "
                f"use at most {held_out}, or hold out more"
            )
        return self.model_copy(
            update={"evaluation": self.evaluation.model_copy(update={"generations": held_out})}
        )


def local_path(name: str) -> Path:
    """Return the path that a setting names; where nobody has the home it starts in, as written, where no file is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def load_recipe(path: str | Path, *, ranks: list[int] | None = None) -> Recipe:
    """Read a recipe, from a file or by the name of one in pipelines/recipes.

    Args:
        path: a YAML file, or a bare recipe name.
        ranks: replaces the recipe's ranks when given and not empty.

    Raises:
        RecipeError: the file is missing or malformed, or a setting breaks its rule; every problem is named.
    """
    file = find_recipe(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is no UTF-8 text ({error}); save it as UTF-8") from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"{file} holds {type(values).__name__} where settings by name belong; start from {RECIPES}"
        )
    lora = values.get("lora", {})
    if ranks and isinstance(lora, dict):  # any other section is refused with the rest
        values = {**values, "lora": {**lora, "ranks": ranks}}
    return parse_recipe(values, source=str(file))


def parse_recipe(values: dict[str, Any], *, source: str = "the recipe") -> Recipe:
    """Check plain values; raises RecipeError with a sentence for each problem."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: {'; '.join(sentences(error, Recipe))}") from error


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe, given by path or by the name of one in pipelines/recipes."""
    path = Path(name)
    if path.is_file():
        return path
    named = RECIPES / f"{path.name}.yaml"
    if path.parent == Path() and named.is_file():
        return named
    known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"recipes here: {', '.join(known)}"
    raise RecipeError(f"recipe {str(path)!r} is not there; {hint}")
