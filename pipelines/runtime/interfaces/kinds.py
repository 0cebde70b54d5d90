"""The kinds of stages: which module runs one, from which inputs, to which result."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipelines.runtime.interfaces import inputs, results
from pipelines.runtime.interfaces.plan_result import PlanResult
from pipelines.runtime.interfaces.values import Values

Inputs = TypeVar("Inputs", bound=Values)
Result = TypeVar("Result", bound=results.StageResult)


@dataclass(frozen=True)
class StageKind(Generic[Inputs, Result]):
    """A kind of stage."""

    name: str
    module: str
    """Runs it in a child process. The parent does not import it, because most of these modules
    import torch."""
    format: int
    """Increased when the outcome changes for the same inputs."""
    inputs: type[Inputs]
    result: type[Result]
    libraries: tuple[str, ...] = ()
    """What the module imports while it runs. A process that starts several stages imports it once
    for all of them."""

    def __str__(self) -> str:
        return self.name


MODELS = "transformers.modeling_utils"
QUANTIZATION = ("bitsandbytes", "transformers.integrations.bitsandbytes")
"""What a stage with a base in 4 bits imports."""
LOCAL_RANKS = "pipelines.runtime.local_ranks"
"""Takes the arguments of accelerate's launcher, and forks the ranks of a training. Imports
torch."""
METRICS = ("sacrebleu", "rouge_score.rouge_scorer")
BASE = StageKind(
    "base", "pipelines.models.base_model", 5, inputs.BaseInputs, results.BaseResult, (MODELS,)
)
PROCESSOR = StageKind(
    "processor",
    "pipelines.models.processor",
    1,
    inputs.ProcessorInputs,
    results.ProcessorResult,
)
DATA = StageKind(
    "data", "pipelines.data.preparation", 6, inputs.DataInputs, results.DataResult, (MODELS,)
)
CHECK = StageKind(
    "check",
    "pipelines.evaluation.data_check",
    1,
    inputs.CheckInputs,
    results.CheckResult,
    (MODELS,),
)
PLAN = StageKind("plan", "pipelines.planning.plan", 7, inputs.PlanInputs, PlanResult, (MODELS,))
TRAIN = StageKind(
    "train",
    "pipelines.training.train",
    7,
    inputs.TrainInputs,
    results.TrainResult,
    (MODELS, "deepspeed"),
)
TUNE = StageKind(
    "tune", "pipelines.evaluation.tuning", 6, inputs.TuneInputs, results.TuneResult, (MODELS,)
)
CUT = StageKind("cut", "pipelines.models.truncate", 3, inputs.CutInputs, results.CutResult)
EVALUATE = StageKind(
    "evaluate",
    "pipelines.evaluation.evaluate",
    7,
    inputs.EvaluateInputs,
    results.EvaluateResult,
    (MODELS, *METRICS),
)
KINDS: dict[str, StageKind[Any, Any]] = {
    kind.name: kind for kind in (BASE, PROCESSOR, DATA, CHECK, PLAN, TRAIN, TUNE, CUT, EVALUATE)
}
