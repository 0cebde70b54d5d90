"""Let a command take the fields of a dataclass as options, so that what belongs together is one argument."""

import inspect
from collections.abc import Callable
from typing import Any


def with_options(name: str, options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces the argument `name` of a typer command by the fields of a dataclass.

    Args:
        name: of the argument, which gets an instance.
        options: a dataclass whose fields are annotated as typer's options and have defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        fields = inspect.signature(options, eval_str=True).parameters

        def call(**values: Any) -> None:
            chosen = options(**{field: values.pop(field) for field in fields})
            command(**values, **{name: chosen})

        flat = [parameter for parameter in own.values() if parameter.name != name] + list(fields.values())
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in flat]
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
        vars(call)["__signature__"] = inspect.Signature(keyword_only)
        return call

    return decorate
