"""A kind of stage for the tests of the runtime, with inputs of every type."""

from pipelines.runtime.interfaces.kinds import StageKind
from pipelines.runtime.interfaces.results import StageResult
from pipelines.runtime.interfaces.values import Values


class SyntheticLora(Values):
    """A section among the inputs."""

    alpha: int = 32
    init: str = "kaiming"


class SyntheticInputs(Values):
    """What determines the outcome."""

    rank: int | str = 4
    lora: SyntheticLora = SyntheticLora()
    names: tuple[str, ...] = ("a", "b")
    does: str = "works"


class SyntheticResult(StageResult):
    """What the stage reports."""

    loss: float


SYNTHETIC = StageKind("train", "synthetic_stages", 1, SyntheticInputs, SyntheticResult)
OTHER = StageKind("evaluate", "synthetic_stages", 1, SyntheticInputs, SyntheticResult)
