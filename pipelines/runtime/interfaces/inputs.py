"""What determines the outcome of each kind of stage; it makes the stage's key."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from lora_core.budget.wire import Sharding
from pipelines.config.data_section import DataSection
from pipelines.config.sections import (
    EvaluationSection,
    LmEvalSection,
    LoraSection,
    LoraSettings,
    OptimizationSettings,
    SchedulingSettings,
    TrainingSection,
)
from pipelines.errors import StageError
from pipelines.runtime.interfaces.values import Values

Method = Literal["full", "lora"]
Quantization = Literal["nf4", "none"]
PathName = Literal["base", "data", "model", "adapter"]


class StagePaths(Values):
    """Where to find what the inputs name by digest; not part of the key."""

    base: str | None = None
    """Folder of the base in Hugging Face format."""
    data: str | None = None
    """Folder of the data's stage."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Name in the data section → the file, folder or pattern of files, if it is local."""
    model: str | None = None
    """Folder of a fully fine-tuned model, which replaces the base."""
    adapter: str | None = None
    """Folder of an adapter."""
    recipe: str | None = None
    """Folder of the recipe, which may name files next to it."""
    here: str | None = None
    """Folder in which the run was started."""

    def required(self, name: PathName) -> Path:
        """Return the path with a name.

        Raises:
            StageError: the stage was started without it.
        """
        value: str | None = getattr(self, name)
        if value is None:
            raise StageError(f"the stage was started without the path {name!r}; run its recipe")
        return Path(value)

    @property
    def weights(self) -> Path:
        """Folder of the weights that are loaded: the fully fine-tuned model, or the base."""
        return self.required("base" if self.model is None else "model")


class BaseIdentity(Values):
    """Which base it is, found before it is loaded."""

    kind: Literal["gguf", "folder", "hub"]
    id: str
    revision: str | None = None
    """Of a hub model."""
    file: str | None = None
    """Name of an embedded GGUF file."""
    bytes: int | None = None
    """Size of that file."""
    sha256: str | None = None
    """Of a GGUF file of the user."""
    files: str | None = None
    """Digest of a folder's file names, sizes and times."""
    trust_remote_code: bool = False
    """Its own Python code may run."""


class BaseInputs(Values):
    """Inputs of a base's stage."""

    base: BaseIdentity


class ProcessorInputs(Values):
    """Inputs of the measurement that chooses the dtype of a training on a CPU."""

    model: str
    """The processor's name."""
    units: tuple[str, ...]
    """Flags of its units for bfloat16."""
    limits: dict[str, str] = Field(default_factory=dict)
    """Environment variable → which units the user lets libraries use."""


class DataInputs(Values):
    """Inputs of a data stage."""

    data: DataSection
    sources: dict[str, str]
    """Name in the data section → a digest of the files, or what else identifies the content."""
    tokenizer: str
    """SHA-256 of the vocabulary."""
    template: str
    """SHA-256 of the chat template."""
    seed: int
    trust_remote_code: bool = False


class CheckInputs(Values):
    """Inputs of a check of the data against the evaluation."""

    data_digest: str
    general: tuple[str, ...]
    """Benchmarks."""
    items_per_benchmark: int
    probes: tuple[str, ...]
    files: dict[str, str]
    """File of questions, or folder of tasks → its digest."""
    seed: int
    lm_eval: LmEvalSection | None = None
    lm_eval_version: str | None = None
    """Of the library, if its tasks are searched for."""
    trust_remote_code: bool = False


class LaunchFacts(Values):
    """What a launch config means for a plan."""

    device: Literal["cpu", "gpu"]
    sharding: Sharding
    bucket_weights: int
    """Gradients that the engine reduces at once."""
    persistent_weights: int
    """ZeRO-3: a tensor of at most this many weights stays gathered."""
    reuse_weights: int
    """ZeRO-3: a weight stays gathered if it is used again within this many others."""
    reduces_to_owner: bool
    """Each shard of the gradient is reduced to its owner only."""


class PlanInputs(Values):
    """Inputs of a plan."""

    base_digests: dict[str, str]
    data_digest: str
    lora: LoraSection
    quantization: Quantization
    training: TrainingSection
    launch: LaunchFacts
    processes: int
    seed: int
    trust_remote_code: bool = False


class AdapterInputs(Values):
    """What an adapter is, and what its file names as its base."""

    rank: int
    lora: LoraSettings
    base_id: str
    base_revision: str
    tokenizer_sha256: str
    template_sha256: str
    end_tokens: tuple[int, ...] = ()
    """Tokens that end an answer in the training data."""


class TrainInputs(Values):
    """Inputs of a training. Those of full fine-tuning name the base by its weights only, so that
    every recipe with the same control reuses it."""

    base_digests: dict[str, str]
    """Kind of weights → their fingerprint."""
    data_digest: str
    quantization: Quantization
    learning_rate: float
    training: OptimizationSettings
    seed: int
    adapter: AdapterInputs | None = None
    """None for full fine-tuning."""
    first_steps: int | None = None
    """Number of steps after which a trial of a grid ends, of the schedule of a whole training; its
    checkpoint is kept. None for a whole training."""
    trust_remote_code: bool = False

    @property
    def method(self) -> Method:
        """How it is trained."""
        return "full" if self.adapter is None else "lora"


class TrainOptions(SchedulingSettings):
    """How a training is distributed over time, memory and processes: this changes its result by
    rounding only."""

    processes: int
    device: Literal["cpu", "gpu"]
    timeout_seconds: int
    snapshots: tuple[int, ...] = ()
    """Steps after which the weights are saved as well."""


class TuneInputs(Values):
    """Inputs of the loss that selects a control's learning rate, or adapters of a grid."""

    trained: str
    """Key of the training."""
    quantization: Quantization
    data_digest: str
    trust_remote_code: bool = False


class CutInputs(Values):
    """Inputs of a truncation."""

    adapter: str
    """SHA-256 of the adapter's weights."""
    rank: int
    """To which it is truncated."""


class EvaluateInputs(Values):
    """Inputs of an evaluation."""

    base_digests: dict[str, str]
    tokenizer: str
    template: str
    trained: str | None
    """Digest of the trained weights, or the key of their training; None for a base."""
    quantization: Quantization
    data_digest: str
    evaluation: EvaluationSection
    generations: int
    """Held-out prompts that this model answers."""
    rescored: int = 0
    """Held-out examples on which the exports of this adapter are scored again."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end an answer in the training data."""
    files: dict[str, str]
    """File that the evaluation section names → its digest."""
    seed: int
    lm_eval: str | None = None
    """Version of the lm-eval library, if its tasks are scored."""
    trust_remote_code: bool = False
