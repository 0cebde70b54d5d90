"""The sections of a recipe: all settings, their bounds, and their meaning.

Loading them imports no torch.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lora_core.config import INIT_NAMES, INITS
from pipelines.config.fields import (
    Count,
    Fraction,
    LearningRate,
    LearningRates,
    SampleSize,
    Section,
    distinct,
)
from pipelines.config.registry_names import with_promote

COMMIT = re.compile(r"[0-9a-f]{40}")


def _check_init(name: str) -> str:
    if not INITS.fullmatch(name):
        raise ValueError(f"is {name!r}, which is not an initialization; use {INIT_NAMES}")
    return name


class BaseModelSection(Section):
    """The frozen model under the adapters."""

    id: str
    """A hub id, a local folder, a .gguf file, or `embedded:SmolLM2-135M-Instruct`."""
    revision: str | None = None
    """Commit or tag of a hub model; pin it, so that a second run uses the same weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base, which can do anything on this machine. A hub model
    then needs a `revision`: the commit whose code was reviewed."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How the adapters see the base: NF4 with double quantization (QLoRA), or in full precision
    (LoRA)."""

    @model_validator(mode="after")
    def _check_trusted_code_is_pinned(self) -> "BaseModelSection":
        is_path = self.id.startswith((".", "/", "~")) or Path(self.id).is_dir()
        is_hub_id = self.id.count("/") == 1 and not is_path
        is_pinned = COMMIT.fullmatch(self.revision or "") is not None
        if self.trust_remote_code and is_hub_id and not is_pinned:
            raise ValueError(
                f"has trust_remote_code and revision {self.revision!r}: code is trusted at a "
                "commit only, since a branch or tag can change; set revision to the 40 digits of "
                "the commit whose code was reviewed"
            )
        return self


class LoraSettings(Section):
    """What all adapters have in common."""

    alpha: Annotated[float, Field(gt=0)] = 32
    """Numerator of the scale alpha/r; with it fixed, the best learning rate hardly depends on the
    rank."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the head and gates of width 1), a regular expression, or
    a list of names."""
    target_parameters: tuple[str, ...] = ()
    """Stacked weights of experts to adapt as well, such as `mlp.experts.gate_up_proj`; `lora plan`
    lists what is adapted and what is not."""
    exclude_modules: str | tuple[str, ...] = ()
    """Modules to leave out: a regular expression, or a list of names."""
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Indices of the blocks to adapt; empty for all."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an input of A in training."""
    use_rslora: bool = False
    """Scale by alpha/√r."""
    use_dora: bool = False
    """Train the norm of each row of the adapted weight separately (DoRA)."""
    init: Annotated[str, AfterValidator(_check_init)] = "kaiming"
    """Initialization of A and B: random (kaiming, gaussian, orthogonal), from the weight (pissa,
    pissa_niter_N, olora; the saved adapter has twice the rank), from the first training examples
    (eva), or toward the full-precision weight (loftq)."""
    loraplus_ratio: Annotated[float, Field(gt=0)] = 1
    """Learning rate of B divided by that of A (LoRA+); 1 for one learning rate."""


class Ranks(Section):
    """Which adapters are trained."""

    ranks: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(distinct)]
    """Ranks to compare."""


class LoraSection(LoraSettings, Ranks):
    """The adapters: one is trained for each rank."""

    learning_rate: LearningRate = 1e-3
    """Peak learning rate; about ten times the control's."""


class ControlSection(Section):
    """What the adapters are compared with: trained on the same data, order and number of tokens."""

    method: Literal["full", "lora", "none"] = "full"
    """Full fine-tuning; if the base is too large for that, an adapter of high rank, or none. The
    report states which."""
    learning_rate: LearningRates = (1e-4,)
    """Peak learning rate, or several: each is tried, and the one with the lowest loss on the tuning
    examples is the control."""
    rank: Count | None = None
    """Rank of the control if the method is 'lora'."""

    @model_validator(mode="after")
    def _check_rank(self) -> "ControlSection":
        if (self.rank is None) == (self.method == "lora"):
            raise ValueError(
                f"has rank {self.rank} and method {self.method!r}: set a rank for method 'lora', "
                "and only then"
            )
        return self


class FrontierSection(Section):
    """Further models that are scored to plot learning versus forgetting; none is registered."""

    snapshots: Annotated[tuple[Count, ...], AfterValidator(distinct)] = ()
    """Steps after which the control and each rank are scored too."""
    learning_rates: Annotated[tuple[LearningRate, ...], AfterValidator(distinct)] = ()
    """Further learning rates at which each rank is trained."""
    cuts: Annotated[tuple[Count, ...], AfterValidator(distinct)] = ()
    """Ranks to which the adapter of the highest rank is truncated."""


class LengthSettings(Section):
    """How long a training lasts: a number of steps, or of epochs."""

    steps: Count | None = None
    """Optimizer steps; or set `epochs`."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Passes over the training examples, instead of `steps`; a fraction is possible, and the last
    step is rounded up."""

    @property
    def total_steps(self) -> int:
        """Return the number of steps; a length in epochs is resolved first, see `resolve_steps`."""
        assert self.steps is not None, "epochs are converted to steps once the data is prepared"
        return self.steps

    @model_validator(mode="after")
    def _check_one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"has steps {self.steps} and epochs {self.epochs}: set one of them, which "
                "determines how long the training lasts"
            )
        return self


TrainingDtype = Literal["auto", "float32", "bfloat16"]


class UpdateSettings(Section):
    """What determines the result of a training of a given length."""

    batch_size: Count = 8
    """Examples per step, over all processes."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    """Steps in which the learning rate rises linearly; after them it falls along a cosine to a
    tenth."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients with a larger norm are clipped to it."""
    dtype: TrainingDtype = "auto"
    """In which products with weights are computed; the optimizer updates float32 weights in every
    case. `auto` is bfloat16 on a GPU with units for it, and on a CPU that multiplies faster in it,
    which a measurement decides; else float32. A CPU computes attention, norms and loss in float32,
    and scores models in float32 in every case."""
    evaluate_every: Count | None = None
    """Steps between two evaluations of the loss on the tuning examples, which is also evaluated
    after the last step. The weights with the lowest loss are saved instead of the last ones; by
    default, nothing is evaluated and the last ones are saved."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations in a row that do not improve on the lowest loss; by default,
    all steps are taken."""


class OptimizationSettings(UpdateSettings):
    """What determines the result of a training."""

    steps: Count
    """Optimizer steps."""


class SchedulingSettings(Section):
    """How a step is distributed over time and memory: this changes a result by rounding only."""

    gradient_accumulation_steps: Count = 1
    """Micro-batches per step and process; more of them need less memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: slower, less memory."""
    checkpoint_every: Count = 10
    """Steps between checkpoints, from which a stopped run resumes."""
    checkpoint_time_fraction: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Fraction of the training time that writing checkpoints may take. A checkpoint that would take
    more is postponed; 1 writes all."""
    checkpoints_kept: Count = 2
    """Number of latest checkpoints to keep, in addition to the best."""


class TrainingSection(SchedulingSettings, UpdateSettings, LengthSettings):
    """What all trainings of the comparison have in common."""

    @model_validator(mode="after")
    def _check_patience_has_effect(self) -> Self:
        if self.early_stopping_patience is not None and self.evaluate_every is None:
            raise ValueError(
                f"has early_stopping_patience {self.early_stopping_patience} without "
                "evaluate_every: patience counts evaluations, so set evaluate_every as well"
            )
        return self


class LaunchSection(Section):
    """How training is started."""

    config: str = "cpu_zero2"
    """A file of infra/accelerate, by name, or the path of another accelerate config."""
    processes: Count = 1
    """Ranks on all hosts together: one per GPU, or a few on a CPU."""
    machines: Count = 1
    """Hosts that train together. All but the first run `lora join`, and on each LORA_MAIN_ADDRESS
    names the first."""
    timeout_seconds: Count = 600
    """How long a rank waits for another, and a run for progress of any rank, before it ends with an
    error."""
    stall_seconds: Count = 60
    """After how long the run names the rank that blocks the others."""
    evaluations_at_once: Count = 1
    """Models that are scored at the same time: one per GPU, or one or two per core on a CPU."""

    @model_validator(mode="after")
    def _check_processes_per_machine(self) -> "LaunchSection":
        if self.processes % self.machines:
            raise ValueError(
                f"has {self.processes} processes on {self.machines} machines; give each machine "
                "the same number"
            )
        return self


Benchmark = Literal["hellaswag", "piqa", "arc_easy", "openbookqa", "winogrande", "lambada"]


class LmEvalSection(Section):
    """Tasks of lm-eval or of a folder of YAML files.

    They need `pip install lora-pipeline[lm-eval]`.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(distinct)]
    """Names of tasks."""
    include_path: str | None = None
    """Folder of user-defined task files."""
    limit: SampleSize | None = None
    """Number of items of each task, from its start; all if left out."""


class EvaluationSection(Section):
    """What is scored for the base, the control and each adapter."""

    general: Annotated[tuple[Benchmark, ...], AfterValidator(distinct)] = (
        "hellaswag",
        "piqa",
        "arc_easy",
        "openbookqa",
        "winogrande",
        "lambada",
    )
    """General abilities that training should not change. It may be empty if there are probes or
    lm_eval; then chat_prompts and passages, which come from the same package, are 0 unless they are
    set."""
    items_per_benchmark: SampleSize = 40
    """Sampled by seed; the same items for every model."""
    probes: Annotated[tuple[str, ...], AfterValidator(distinct)] = ()
    """User-defined questions: .jsonl files with prompt, choices and gold (the index of the right
    choice), or with prompt and answer."""
    lm_eval: LmEvalSection | None = None
    """Tasks of the lm-eval library."""
    chat_prompts: Annotated[int, Field(ge=0)] = 40
    """General questions in chat format; the loss of the right answer and the change of the
    distribution (KL) are measured; 0 for none."""
    passages: Annotated[int, Field(ge=0)] = 30
    """Passages of plain text whose loss is measured; 0 for none."""
    generations: Count = 24
    """Held-out prompts that are answered greedily for the metrics; by default at most as many as
    are held out."""
    max_new_tokens: Count = 40
    """Maximum length of an answer."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(distinct)] = (
        "chrf",
        "rouge_l",
        "bleu",
        "exact_match",
    )
    """Metrics of each answer against its reference: chrf, rouge_l, bleu, exact_match, or a
    user-defined `module:function` of (answer, reference, prompt); higher is better."""
    execute: tuple[str, ...] = ()
    """Command that judges an answer, such as ["python", "check.py"]. It reads JSON (prompt, answer,
    reference) from standard input; status 0 means right and 1 wrong. Any other status, a signal, a
    Python traceback or a timeout is an error."""
    execute_seconds: Annotated[float, Field(gt=0)] = 10
    """Timeout of that command."""

    @model_validator(mode="before")
    @classmethod
    def _default_to_no_passages_without_benchmarks(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("general") in ([], ()):
            return {"chat_prompts": 0, "passages": 0, **values}
        return values

    @model_validator(mode="after")
    def _check_general_abilities(self) -> "EvaluationSection":
        if not self.general and not self.probes and self.lm_eval is None:
            raise ValueError(
                "measures no general abilities, so that forgetting would not be detected: "
                "evaluation.general is empty and probes and lm_eval are missing; name "
                "benchmarks in general, or your own questions in probes or lm_eval"
            )
        return self


class GateSection(Section):
    """When an adapter passes.

    Every bound is compared with an end of a 95 % interval, not with a mean.
    """

    min_gain_share: Fraction = 0.5
    """Minimum fraction of the control's task gain, over the base in full precision."""
    max_general_drop: Fraction = 0.03
    """Largest drop that training may cause on general abilities: of choice probability; of accuracy
    on each benchmark of open questions; and, on each benchmark that rates itself, as a fraction of
    the base's mean absolute score."""
    max_drop_beyond_control: Fraction = 0.03
    """How much more than the control an adapter may lose of general abilities; 0 for no more."""
    max_file_mb: Annotated[float, Field(gt=0)] | None = None
    """Largest adapter file, in 10⁶ bytes."""
    max_rank: Count | None = None
    """Highest rank that the serving engine supports."""
    min_gain_over_champion: float | None = 0.0
    """Minimum task gain over the registered champion, in nats per token, on the same items; `null`
    skips the comparison."""


def _registry_name(name: str) -> str:
    forbidden = [repr(mark) for mark in ("/", ":", "@", "..") if mark in name]
    if "'" in name and '"' in name:
        forbidden.append("both kinds of quotes")
    if not name.isprintable():
        forbidden.append("a control character")
    if name != name.strip() or not name:
        forbidden.append("an empty name or spaces at its ends")
    if len(name) > 256:
        forbidden.append(f"{len(name)} characters")
    if forbidden:
        raise ValueError(
            f"is {name[:60]!r}, which has {', '.join(forbidden)}: a registered name has at most "
            "256 characters and no '/', ':', '@' or '..'; use letters, digits, '-' and '_'"
        )
    return name


class RegistrySection(Section):
    """Where MLflow stores the adapters."""

    model: Annotated[str, AfterValidator(_registry_name)]
    """Registered model whose versions are this recipe's adapters. `NAME-candidates` separates the
    roles: its adapters are proposed, and a person copies one into `NAME` with `lora registry
    promote`."""
    experiment: str | None = None
    """MLflow experiment of the runs; the recipe's name if left out."""
    promote: Literal["auto", "propose"] = "auto"
    """`auto` moves the alias `champion` to the adapter that passes and gains most; `propose` gives
    it the alias `proposed`, and a person decides with `lora registry promote` or `reject`.
    `NAME-candidates` implies `propose`."""

    @model_validator(mode="before")
    @classmethod
    def _propose_candidates(cls, section: Any) -> Any:
        return with_promote(section)
