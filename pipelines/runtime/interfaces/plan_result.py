"""What a plan reports: targets, the cost of each run, and the alternatives on more GPUs."""

from typing import Literal

from lora_core.budget.wire import CommunicatedWeights, Exchange, Sharding
from pipelines.runtime.interfaces.results import StageResult
from pipelines.runtime.interfaces.values import Values

TrainingMethod = Literal["full", "lora", "qlora"]


class StoredWeights(Values):
    """All weights of the base of one kind: a name without the number of its layer."""

    name: str
    stored: str
    """nf4 or dense."""
    adapted: bool
    count: int
    """Tensors."""
    weights: int


class TargetKind(Values):
    """The targets of an adapter with one name and one shape."""

    name: str
    out_features: int
    in_features: int
    count: int
    rank: int
    scale: float
    trained_weights: int


class SmallerChange(Values):
    """A single change of the recipe that needs less memory."""

    setting: str
    """Such as training.gradient_checkpointing."""
    value: bool | int | str
    memory_bytes: int


class PlannedAdapter(Values):
    """An adapter before it is trained."""

    rank: int
    scale: float
    file_rank: int
    """Rank of the saved adapter; twice the trained one after a spectral initialization."""


class RunCost(Values):
    """The cost of one training; memory is per process. See `lora_core.budget.budget.Budget`."""

    trained_weights: int
    file_bytes: int
    weight_bytes: int
    quantization_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    buffer_bytes: int
    process_bytes: int
    host_bytes: int
    loading_bytes: int
    uncounted: tuple[str, ...]
    memory_bytes: int
    """At its peak."""
    other_checkpointing_bytes: int
    """At its peak, with the other setting of gradient checkpointing."""
    less: tuple[SmallerChange, ...]
    """What needs less memory, the smallest first."""
    sent_bytes: int
    """That a process sends in a step."""
    adapter: PlannedAdapter | None = None
    """None for full fine-tuning."""


class PlannedSetup(Values):
    """How the adapters are trained."""

    sharding: Sharding
    tokens: int
    """The most that a process reads at once."""
    checkpointing: bool


class ConfigurationCost(Values):
    """Memory and traffic of a process, with or without gradient checkpointing."""

    memory_bytes: int
    eight_bit_bytes: int
    """Memory with AdamW in 8 bits."""
    sent_bytes: int


class Configuration(Values):
    """A way to train on a number of GPUs."""

    method: TrainingMethod
    sharding: Sharding
    processes: int
    without_checkpointing: ConfigurationCost
    with_checkpointing: ConfigurationCost

    def cost(self, *, checkpointing: bool) -> ConfigurationCost:
        """Return the cost with or without gradient checkpointing."""
        return self.with_checkpointing if checkpointing else self.without_checkpointing


class Communication(Values):
    """What determines the traffic on any number of processes, without the model."""

    weights: dict[TrainingMethod, CommunicatedWeights]
    exchange: Exchange
    """Under the recipe's own sharding and number of processes."""


class PlanResult(StageResult):
    """What a recipe trains and costs."""

    weights: tuple[StoredWeights, ...]
    targets: tuple[TargetKind, ...]
    """Of each rank."""
    runs: dict[str, RunCost]
    """Label of a training → its cost."""
    setup: PlannedSetup
    tokens_of_a_step: float
    """Mean over the training, on all processes together."""
    scaling: tuple[Configuration, ...]
    """Each method under each sharding on 1 to 512 GPUs."""
    comfortable_share: float
    """Largest fraction of GPU memory that a training may be estimated to need."""
    communication: Communication
