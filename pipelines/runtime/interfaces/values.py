"""The base class of everything that stages exchange."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

Model = TypeVar("Model", bound=BaseModel)


class Values(BaseModel):
    """Values that cannot be changed and reject unknown names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )

    def plain(self) -> dict[str, Any]:
        """Return plain values, as JSON stores them."""
        return self.model_dump(mode="json")


def narrowed(value: BaseModel, kind: type[Model]) -> Model:
    """Return the part of a model that one of its base classes describes.

    Args:
        value: of a class that extends `kind`.
        kind: the base class.
    """
    return kind.model_validate(value.model_dump(include=set(kind.model_fields)))
