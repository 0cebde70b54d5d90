"""What each kind of stage reports."""

from pydantic import Field

from pipelines.runtime.interfaces.values import Values
from pipelines.runtime.interfaces.verified import Verified


class StageResult(Values):
    """What a stage reports."""

    seconds: float | None = None
    """Duration of the stage's work; None for a training, which may have been resumed."""


class BaseResult(StageResult):
    """The base model in Hugging Face format."""

    folder: str
    id: str
    revision: str
    """Commit of a hub model, or a digest of its files."""
    digests: dict[str, str]
    """Kind of weights → their fingerprint."""
    tokenizer_sha256: str
    template_sha256: str
    forward: Verified
    """How it is read, verified on a few random tokens."""
    trust_remote_code: bool
    weights: int
    """Number of weights."""
    context_tokens: int | None
    """Longest context; None if it has no limit."""


class SourceFacts(Values):
    """How the rows of one source were read."""

    source: str
    format: str
    """Such as json lines, csv, parquet, or hub."""
    rows: int
    files: int = 1
    encoding: str | None = None
    """Of a text file."""
    delimiter: str | None = None
    """Of a .csv file."""
    schema_name: str = ""
    """Such as prompt/completion or messages."""
    used_columns: tuple[str, ...] = ()
    unused_columns: tuple[str, ...] = ()

    @property
    def delimiter_name(self) -> str | None:
        """Name of the delimiter."""
        if self.delimiter is None:
            return None
        names = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
        return names.get(self.delimiter, self.delimiter)


class SplitOverlap(Values):
    """Held-out examples that resemble training examples."""

    exact: int = 0
    """Held-out examples whose tokens are those of a training example."""
    near: int = 0
    """Other held-out examples of which most of the text is in a training example."""
    examples: tuple[str, ...] = ()
    """The end of the text of a few of them."""


class LengthHistogram(Values):
    """How many tokens the examples have before truncation."""

    upper: tuple[int, ...] = ()
    """Largest number of tokens of each bin."""
    counts: tuple[int, ...] = ()
    """Examples in each bin."""
    median: int = 0
    percentile_95: int = 0
    percentile_99: int = 0
    longest: int = 0


class Preview(Values):
    """The first tokens of an example."""

    tokens: tuple[str, ...]
    """Text of each token."""
    supervised: tuple[bool, ...]
    more_tokens: int = 0
    """Tokens that are not listed."""


class DataResult(StageResult):
    """The prepared data."""

    rows: int
    sources: tuple[SourceFacts, ...] = ()
    bad_rows: int = 0
    """Rows that could not be learned as written and were removed."""
    left_out: int
    """Examples without any supervised token left, or removed because of their length."""
    cut: int
    """Examples that were truncated."""
    cut_held_out: int
    """Of these, the held-out ones."""
    train_examples: int
    """Examples of an epoch; an example with weight 2 counts twice."""
    validation_examples: int
    """Held-out examples, on which models are compared."""
    tuning_examples: int
    """Examples on which the control's learning rate is chosen."""
    unused_examples: int = 0
    """Held-out examples that are neither scored nor used for tuning, and training examples that a
    weight below 1 leaves out."""
    excluded_examples: int = 0
    """Training examples that were removed because the user's validation rows start with the same
    question."""
    overlap: SplitOverlap = SplitOverlap()
    """Between held-out and training examples."""
    notes: dict[str, int] = Field(default_factory=dict)
    """Observation → number of examples; see `pipelines.data.notes`."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end an answer; generation stops at each of them."""
    template_sha256: str
    """Of the chat template that rendered the rows, the recipe's or the base's."""
    train_tokens: int
    supervised_tokens: int
    """Of the training examples."""
    lengths: LengthHistogram = LengthHistogram()
    """Of all usable examples."""
    ends_supervised: int = 0
    """Training examples whose last token ends an answer and is supervised."""
    previews: tuple[Preview, ...] = ()
    """The first training examples."""
    digest: str
    """Of the tokens and supervision of all splits."""


class CheckResult(StageResult):
    """What the training data share with the evaluation."""

    contaminated: dict[str, int]
    """Benchmark or file of questions → its items whose text is in the training data."""
    items: int
    """That were searched for."""


class CheckpointMetrics(Values):
    """What checkpoints cost a training."""

    written: int
    """By the last process of the training."""
    seconds: float
    """That the training waited for them."""
    background_seconds: float
    """That they were written in the background."""


class ModuleSpectrum(Values):
    """The singular values of one module's ΔW."""

    module: str
    rank: int
    effective_rank: float
    values: tuple[float, ...]
    intruders: int | None = None
    """Of the 10 strongest left singular vectors of W + ΔW, those that resemble none of W; None in
    layers in which they were not counted."""


class TrainingTotals(Values):
    """Totals over the steps of a training."""

    steps: int
    tokens: int
    supervised_tokens: int
    first_loss: float
    """Of the first step, nats per supervised token."""
    last_loss: float
    tokens_per_second: float
    """Without the first step, which warms up."""
    training_seconds: float


class HeldOutLoss(Values):
    """One evaluation during a training."""

    step: int
    """Optimizer steps taken."""
    eval_loss: float
    """On the tuning examples, nats per supervised token."""
    train_loss: float
    """Mean loss of the steps since the previous evaluation."""


class HeldOutLosses(Values):
    """The evaluations of a training, and the weights that were chosen by them."""

    losses: tuple[HeldOutLoss, ...]
    """By step."""
    best_step: int
    """The step whose weights are saved: the first one with the lowest loss."""
    best_eval_loss: float
    stopped_early: bool
    """The loss did not improve for `early_stopping_patience` evaluations."""
    examples: int
    """Tuning examples."""


class ProcessorResult(StageResult):
    """How fast a CPU multiplies matrices, in 10⁹ operations per second."""

    float32_gflops: float
    bfloat16_gflops: float

    @property
    def speedup(self) -> float:
        """How many times as fast it multiplies in bfloat16."""
        return self.bfloat16_gflops / self.float32_gflops


class TrainingFacts(Values):
    """How a training is computed; known before its first step."""

    trained_weights: int
    processor: str
    """Name of the GPU, or CPU."""
    optimizer: str
    dtype: str = ""
    """In which products are computed; empty in a result of an earlier version."""
    attention: str
    """Name of the attention that reads packs."""
    choices: str
    """Device, dtype, backend, attention, optimizer and threads in one line."""
    forward: Verified


class SavedWeights(Values):
    """The output of a training."""

    file_bytes: int
    """Size of the saved weights."""
    adapter_sha256: str | None = None
    """None for full fine-tuning, as the next."""
    file_rank: int | None = None
    """Rank of the saved adapter; twice the trained one after a spectral initialization."""
    spectrum: tuple[ModuleSpectrum, ...] = ()
    """Empty if more than ΔW was trained, or if every weight was."""


class TrainResult(StageResult):
    """A trained adapter, or a fully fine-tuned model."""

    facts: TrainingFacts
    totals: TrainingTotals
    saved: SavedWeights
    held_out: HeldOutLosses | None = None
    """None without `evaluate_every`; else the saved weights are those of its best step."""
    checkpoints: CheckpointMetrics
    peak_memory_bytes: int
    """The largest of all ranks."""

    @property
    def saved_step(self) -> int:
        """Optimizer steps that the saved weights have taken."""
        return self.totals.steps if self.held_out is None else self.held_out.best_step


class TuneResult(StageResult):
    """The loss of a trained model on the tuning examples."""

    tuning_loss: float
    """Nats per supervised token."""
    losses: tuple[float, ...]
    """Of each example, in nats."""
    tokens: tuple[int, ...]
    """Supervised ones of each example."""


class CutResult(StageResult):
    """A truncated adapter."""

    rank: int
    lost: dict[str, float]
    """Module → fraction of its update that is lost."""


class ServedFormat(Values):
    """One export of an adapter, scored by another library."""

    name: str
    """peft or vllm."""
    difference: float | None = None
    """Largest of any example from the recorded score, nats per token; None if it was not scored."""
    reason: str = ""
    """Why it was not scored; empty if it was."""


class ServedCheck(Values):
    """How another library scores an adapter's exports; see `pipelines.evaluation.served`."""

    library: str
    """Its name and version."""
    examples: int
    """Held-out examples that were scored again."""
    noise_floor: float
    """Largest difference between two ways in which this pipeline scores them, nats per token."""
    tolerance: float
    """Largest difference that rounding explains, nats per token."""
    formats: tuple[ServedFormat, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every export that was scored agrees, and at least one was."""
        differences = [one.difference for one in self.formats if one.difference is not None]
        return bool(differences) and max(differences) <= self.tolerance

    def __str__(self) -> str:
        plural = "s" if self.examples != 1 else ""
        parts = []
        for one in self.formats:
            scored = f"not scored ({one.reason})"
            if one.difference is not None:
                scored = f"{one.difference:.0e} nats per token"
            parts.append(f"{one.name} {scored}")
        sign = "=" if self.is_equal else "≠"
        return (
            f"served {sign} trained: {self.library} on {self.examples} held-out example{plural}: "
            f"{', '.join(parts)}; noise floor {self.noise_floor:.0e}"
        )


class EvaluateResult(StageResult):
    """The scores of one model; its items are in the stage's folder."""

    items: int
    left_out: dict[str, int]
    """Benchmark → items that do not fit the context."""
    unfinished: dict[str, int]
    """Benchmark → answers that stopped at the maximum length."""
    forward: Verified | None
    """None if nothing was read."""
    served: ServedCheck | None = None
    """None if no export was scored."""
    peak_memory_bytes: int
    seconds_of: dict[str, float]
    """Part of the evaluation → its duration."""


class StageTime(Values):
    """How long a stage of a run took."""

    name: str
    seconds: float
    cached: bool
    folder: str
