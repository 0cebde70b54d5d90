"""The numbers of a recipe for new data follow from the data, and its text is a valid recipe."""

from dataclasses import replace

import pytest
import yaml

from pipelines.config.recipe import Recipe, parse_recipe
from pipelines.config.steps import resolve_steps
from pipelines.runtime.interfaces.results import DataResult, LengthHistogram, SourceFacts
from pipelines.workflow.starter_recipe import HostLaunch, StarterRecipe, fit_epochs, fit_lengths

LAUNCH = HostLaunch("cpu_zero2", 2, 2, "2 processes on 2 cores")
DRAFT = StarterRecipe("tickets", "owner/base", "tickets.jsonl", LAUNCH, max_tokens=2048)


def data(examples: int, *, longest: int = 100, rows: int | None = None) -> DataResult:
    """Return a result with as many examples, of which 4 are held out."""
    source = SourceFacts(
        source="tickets.jsonl",
        format="json lines",
        rows=rows or examples,
        schema_name="question/answer",
        used_columns=("question", "answer"),
        unused_columns=("id",),
    )
    return DataResult(
        rows=examples,
        sources=(source,),
        left_out=0,
        cut=0,
        cut_held_out=0,
        train_examples=examples - 4,
        validation_examples=2,
        tuning_examples=2,
        train_tokens=1,
        template_sha256="0",
        supervised_tokens=1,
        lengths=LengthHistogram(median=50, percentile_99=longest - 1, longest=longest),
        digest="",
    )


def load(starter: StarterRecipe) -> Recipe:
    return parse_recipe(yaml.safe_load(starter.text()))


@pytest.mark.parametrize("examples", [6, 17, 100, 1500, 30_000, 1_000_000])
@pytest.mark.parametrize("processes", [1, 3, 8])
def test_every_size_gives_a_valid_recipe(examples: int, processes: int) -> None:
    draft = replace(DRAFT, launch=replace(LAUNCH, processes=processes))
    fitted = fit_lengths(draft, data(examples), 2048)
    recipe = load(fit_epochs(fitted, data(examples)))
    assert recipe.training.batch_size % processes == 0
    assert recipe.data.validation_examples <= examples // 2
    assert recipe.training.batch_size < examples + processes
    steps = resolve_steps(recipe, examples - 4).training.total_steps
    assert steps > recipe.training.warmup_steps


@pytest.mark.parametrize(
    ("longest", "context", "expected"),
    [(100, 2048, 128), (97, 2048, 96), (5, 2048, 32), (5000, 2048, 2048), (5000, None, 5024)],
)
def test_the_maximum_length_fits_the_examples_and_the_context(
    longest: int, context: int | None, expected: int
) -> None:
    assert fit_lengths(DRAFT, data(100, longest=longest), context).max_tokens == expected


@pytest.mark.parametrize(
    ("examples", "expected"), [(6, 2), (12, 4), (30, 8), (400, 20), (9000, 64)]
)
def test_a_twentieth_is_held_out_within_bounds(examples: int, expected: int) -> None:
    assert fit_lengths(DRAFT, data(examples), None).validation_examples == expected


def test_the_number_of_held_out_examples_follows_from_all_rows_and_not_the_sample() -> None:
    assert fit_lengths(DRAFT, data(100, rows=800), None).validation_examples == 40


def test_every_setting_has_a_comment() -> None:
    text = fit_epochs(fit_lengths(DRAFT, data(100), None), data(100)).text()
    settings = [line for line in text.splitlines() if line.strip() and not line.endswith(":")]
    assert all("# " in line for line in settings)
    assert "100 rows, read as question/answer" in text
    assert "columns read: question, answer; not read: id" in text


@pytest.mark.parametrize("text", ["a: b #c.jsonl", "it's\n.jsonl", '"x".jsonl', "日本.jsonl", "no"])
def test_special_characters_of_a_path_are_kept(text: str) -> None:
    assert load(replace(DRAFT, source=text)).data.source == text


def test_a_line_break_in_a_column_name_does_not_end_the_comment() -> None:
    draft = replace(DRAFT, columns_comment="columns read: a\nname: b", source_comment="x\ny: z")
    assert load(draft).name == "tickets"
