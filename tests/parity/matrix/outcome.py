"""How one check of one case ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from lora_core import LoraError


class Ending(Enum):
    """How a check ends."""

    PASSED = "passed"
    REFUSED = "refused"
    """This library raised a LoraError and changed nothing."""
    REFERENCE_REFUSED = "PEFT refuses"
    """PEFT raised, so there is nothing to compare with."""
    ANNOUNCED = "announced"
    """PEFT computes something else with our file, and our save warned that it does."""
    REFERENCE_DIFFERS = "PEFT contradicts itself"
    """PEFT's own result differs from its result a step earlier, such as before its merge."""
    WRONG = "wrong"
    CRASHED = "crash"
    """This library raised another error than a LoraError."""
    ABSENT = "not applicable"


@dataclass(frozen=True)
class Outcome:
    """The result of one check of one case."""

    case: str
    kind: str
    check: str
    ending: Ending
    detail: str = ""


class ReferenceRefuses(Exception):
    """PEFT raised."""


class ReferenceDiffers(Exception):
    """PEFT contradicts itself."""


class Announced(Exception):
    """A difference that our save announced with a warning."""


class Absent(Exception):
    """The check does not apply to the case."""


class Wrong(Exception):
    """A result differs from its reference."""


ENDINGS: dict[type[Exception], Ending] = {
    ReferenceRefuses: Ending.REFERENCE_REFUSED,
    ReferenceDiffers: Ending.REFERENCE_DIFFERS,
    Announced: Ending.ANNOUNCED,
    Absent: Ending.ABSENT,
    Wrong: Ending.WRONG,
}


def ended(check: Callable[[], None]) -> tuple[Ending, str]:
    """Run a check and return how it ends, with the message of its error."""
    try:
        check()
    except LoraError as error:
        return Ending.REFUSED, _one_line(error)
    except tuple(ENDINGS) as error:
        return ENDINGS[type(error)], _one_line(error)
    except Exception as error:  # noqa: BLE001 - any other error is a crash of this library
        return Ending.CRASHED, f"{type(error).__name__}: {_one_line(error)}"
    return Ending.PASSED, ""


@contextmanager
def of_peft() -> Iterator[None]:
    """Report any error of PEFT inside the block as PEFT's refusal."""
    try:
        yield
    except Exception as error:  # PEFT and torch raise errors of every kind
        raise ReferenceRefuses(f"{type(error).__name__}: {error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
