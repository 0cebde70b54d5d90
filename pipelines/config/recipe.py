"""The recipe: a typed, strict description of a run, read from YAML. Loading it imports no torch.

An unknown key is an error with a suggestion, a value out of range names its rule, and what can be
derived is not a setting.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from pipelines.config.data_section import DataSection
from pipelines.config.error_messages import sentences
from pipelines.config.experiments_section import (
    ExperimentsSection,
    check_grid,
    with_values_of_grid,
)
from pipelines.config.fields import Section
from pipelines.config.sections import (
    BaseModelSection,
    ControlSection,
    EvaluationSection,
    FrontierSection,
    GateSection,
    LaunchSection,
    LoraSection,
    RegistrySection,
    TrainingSection,
)
from pipelines.config.step_rules import check_early_stopping, check_steps
from pipelines.config.yaml_loading import read_yaml
from pipelines.errors import RecipeError, without_credentials

RECIPES = Path(__file__).parents[1] / "recipes"


class Recipe(Section):
    """All settings of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    """Name of the run's folder; task_model_hardware is a good pattern."""
    seed: int = 7
    """Seeds the split, the order of examples, the initialization of A, dropout and the samples."""
    base_model: BaseModelSection
    data: DataSection
    lora: LoraSection
    experiments: ExperimentsSection = ExperimentsSection()
    control: ControlSection = ControlSection()
    frontier: FrontierSection = FrontierSection()
    training: TrainingSection
    launch: LaunchSection = LaunchSection()
    evaluation: EvaluationSection = EvaluationSection()
    gate: GateSection = GateSection()
    registry: RegistrySection

    @model_validator(mode="before")
    @classmethod
    def _fill_from_grid(cls, values: Any) -> Any:
        return with_values_of_grid(values)

    @model_validator(mode="after")
    def _check_grid(self) -> "Recipe":
        check_grid(self.experiments, self.lora, self.frontier, self.gate)
        return self

    @model_validator(mode="after")
    def _check_batch_size(self) -> "Recipe":
        processes = self.launch.processes
        steps = self.training.gradient_accumulation_steps
        if self.training.batch_size < processes * steps:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} gives {processes} processes × "
                f"{steps} micro-batches less than one example each; use at least "
                f"{processes * steps}"
            )
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> "Recipe":
        check_early_stopping(self.training, self.frontier)
        if self.training.steps is not None:
            check_steps(self.training, self.frontier, self.experiments)
        return self

    @model_validator(mode="after")
    def _check_frontier(self) -> "Recipe":
        highest = max(self.lora.ranks)
        high = [rank for rank in self.frontier.cuts if rank >= highest]
        if high:
            raise ValueError(
                f"frontier.cuts names rank {high[0]}, and the highest rank is {highest}; use lower "
                "ones"
            )
        if self.lora.learning_rate in self.frontier.learning_rates:
            raise ValueError(
                "frontier.learning_rates repeats lora.learning_rate "
                f"{self.lora.learning_rate:g}; name others"
            )
        return self

    @model_validator(mode="after")
    def _check_loftq_is_quantized(self) -> "Recipe":
        if self.lora.init == "loftq" and self.base_model.quantization == "none":
            raise ValueError(
                "lora.init 'loftq' has no effect with base_model.quantization 'none', which rounds "
                "nothing; use 'nf4', or another init"
            )
        return self

    @model_validator(mode="after")
    def _check_generations(self) -> "Recipe":
        generations = self.evaluation.generations
        held_out = self.data.validation_examples
        if generations <= held_out:
            return self
        if "generations" in self.evaluation.model_fields_set:
            raise ValueError(
                f"evaluation.generations {generations} is more than data.validation_examples "
                f"{held_out}, whose prompts it answers; use at most {held_out}, or hold out more"
            )
        evaluation = self.evaluation.model_copy(update={"generations": held_out})
        return self.model_copy(update={"evaluation": evaluation})


def local_path(name: str) -> Path:
    """Return the path that a setting names, with `~` expanded if that home directory exists."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def load_recipe(
    path: str | Path,
    *,
    ranks: list[int] | None = None,
    steps: int | None = None,
    data: str | None = None,
    promote: str | None = None,
) -> Recipe:
    """Read a recipe, from a file or by the name of one in pipelines/recipes.

    Args:
        path: a YAML file, or a bare recipe name.
        ranks: replaces the recipe's ranks when given and not empty.
        steps: replaces training.steps or training.epochs when given and not 0.
        promote: replaces registry.promote when given and not empty.
        data: replaces the recipe's data.source when given and not empty.

    Raises:
        RecipeError: the file is missing or malformed, or a setting breaks its rule; the
            message lists every problem.
    """
    file = find_recipe(path)
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{file} contains {type(values).__name__} instead of settings by name; start from an "
            f"example in {RECIPES}"
        )
    lora = values.get("lora", {})
    if lora is None and isinstance(values.get("experiments"), dict):
        lora = {}  # the grid has all of it
    if ranks and isinstance(lora, dict):  # validation rejects any other section
        values = {**values, "lora": {**lora, "ranks": ranks}}
        if isinstance(values.get("experiments"), dict) and "ranks" in values["experiments"]:
            values["experiments"] = {**values["experiments"], "ranks": ranks}
    if steps:
        values = _with_setting(values, "training", "steps", steps, instead_of="epochs")
    if promote:
        values = _with_setting(values, "registry", "promote", promote)
    if data:
        values = _with_source(values, data)
    return parse_recipe(values, source=str(file))


def _with_setting(
    values: dict[str, Any], section: str, key: str, value: Any, instead_of: str = ""
) -> dict[str, Any]:
    """Return a recipe's values with another setting, which may replace an alternative."""
    settings = values.get(section, {})
    if not isinstance(settings, dict):  # validation rejects it
        return values
    others = {name: one for name, one in settings.items() if name != instead_of}
    return {**values, section: {**others, key: value}}


def _with_source(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a recipe's values with another data source."""
    section = values.get("data", {})
    if not isinstance(section, dict):  # validation rejects it
        return values
    if section.get("sources"):
        raise RecipeError(
            f"data {source!r} would replace the several sources of data.sources; give the recipe "
            "one data.source"
        )
    return {**values, "data": {**section, "source": source}}


def parse_recipe(values: dict[str, Any], *, source: str = "the recipe") -> Recipe:
    """Validate plain values; raise RecipeError with a sentence for each problem.

    Args:
        values: sections and settings, as YAML has them.
        source: of the values, in the message.

    Raises:
        RecipeError: a setting is unknown or breaks its rule; the message has every problem. Or it
            contains a password, which every output of a run would show.
    """
    for key, text in _texts(values):
        if without_credentials(text) != text:
            raise RecipeError(
                f"{source}: {key} contains a password or a token, which summary, report and "
                "registry would show; remove it, and set the variables of the client, such as "
                "AWS_SECRET_ACCESS_KEY or HF_TOKEN, or download the file"
            )
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: {'; '.join(sentences(error, Recipe))}") from error


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the setting and the text of every text in plain values."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value, key)


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe, given by path or by the name of one in pipelines/recipes.

    Args:
        name: of a file, or of a recipe without its ending.

    Raises:
        RecipeError: there is none; the message suggests one.
    """
    path = Path(name)
    if path.is_file():
        return path
    named = RECIPES / f"{path.name}.yaml"
    if path.parent == Path() and named.is_file():
        return named
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"recipes here: {', '.join(known)}"
    raise RecipeError(f"recipe {str(path)!r} does not exist; {hint}")
