"""What the sections of a recipe have in common: strict settings, and types with bounds."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
SampleSize = Annotated[int, Field(ge=2)]
"""Number of scored items; a confidence interval needs two."""
LearningRate = Annotated[float, Field(gt=0, lt=1)]


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse duplicates in a list.

    Args:
        values: of a setting.

    Raises:
        ValueError: a value occurs twice.
    """
    if len(set(values)) != len(values):
        raise ValueError(f"has duplicates in {list(values)}; name each once")
    return values


def _as_tuple(value: Any) -> Any:
    """Accept one value as a list of one."""
    return value if isinstance(value, list | tuple) else (value,)


LearningRates = Annotated[
    tuple[LearningRate, ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1),
    AfterValidator(distinct),
]
"""One learning rate, or several."""


class Section(BaseModel):
    """Settings that cannot be changed after loading and reject unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
