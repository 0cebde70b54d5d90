"""The sections of a recipe: what can be set, between which bounds, and what it means. Loading them imports no torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lora_core.config import INIT_WORDS, INITS

COMMIT = re.compile(r"[0-9a-f]{40}")
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Sample = Annotated[int, Field(ge=2)]
"""Things that are scored; an interval over them needs two."""
Rate = Annotated[float, Field(gt=0, lt=1)]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"repeats itself in {list(values)}; name each once")
    return values


def _alone(value: Any) -> Any:
    """Take one value for a list of one."""
    return value if isinstance(value, list | tuple) else (value,)


Rates = Annotated[
    tuple[Rate, ...], BeforeValidator(_alone), Field(min_length=1), AfterValidator(_distinct)
]
"""One rate, or several."""


def _init_word(word: str) -> str:
    if not INITS.fullmatch(word):
        raise ValueError(f"is {word!r}, which names no start; use {INIT_WORDS}")
    return word


class Section(BaseModel):
    """Settings that cannot be changed after loading and refuse what they do not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class BaseModelSection(Section):
    """The frozen model under the adapters."""

    id: str
    """A hub id, a local folder, a .gguf file, or `embedded:SmolLM2-135M-Instruct`."""
    revision: str | None = None
    """Commit or tag of a hub model; pin it, so that a second run means the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base, which can do anything on this machine. A hub model is then pinned by `revision`, to the
    commit whose code was read."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How the adapters see the base: NF4 with double quantisation (QLoRA), or in full precision (LoRA)."""

    @model_validator(mode="after")
    def _trusted_code_is_pinned(self) -> "BaseModelSection":
        is_hub_id = (
            self.id.count("/") == 1
            and not self.id.startswith((".", "/", "~"))
            and not Path(self.id).is_dir()
        )
        if self.trust_remote_code and is_hub_id and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"has trust_remote_code and revision {self.revision!r}: code is trusted at a commit only, as a branch or tag may get other "
                "code; set revision to the 40 digits of the commit whose code was read"
            )
        return self


class DataSection(Section):
    """What is learnt."""

    source: str
    """`docstrings` (the interpreter's standard library), a .jsonl, .json, .csv or .parquet file, or a hub data set id."""
    revision: str | None = None
    """Commit or tag of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    group_column: str | None = None
    """Rows that share this value stay on one side of the split; without it, rows of the same text, prompt or conversation do."""
    validation_examples: Sample = 64
    """Held-out examples that are scored, from groups that are not trained on."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Longer examples are cut on the right; one whose completion is cut off whole is left out and counted."""
    max_source_characters: Count = 700
    """Longest function that `docstrings` harvests; no other source uses it."""


class LoraSection(Section):
    """The adapters: one is trained for each rank."""

    ranks: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_distinct)]
    """Ranks to compare."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Numerator of the scale alpha/r; with it fixed, the best learning rate hardly depends on the rank."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the head and gates of width 1), a regular expression, or a list of names."""
    target_parameters: tuple[str, ...] = ()
    """Stacked weights of experts to adapt as well, such as `mlp.experts.gate_up_proj`; `lora plan` lists what is adapted and what not."""
    exclude_modules: str | tuple[str, ...] = ()
    """Modules that are left out: a regular expression, or a list of names."""
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Numbers of the blocks to adapt; all when empty."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance of dropping an input of A while training."""
    use_rslora: bool = False
    """Scale by alpha/√r."""
    use_dora: bool = False
    """Train the length of each row of the adapted weight by itself (DoRA)."""
    init: Annotated[str, AfterValidator(_init_word)] = "kaiming"
    """How A and B start: drawn (kaiming, gaussian, orthogonal), from the weight (pissa, pissa_niter_N, olora; the saved adapter
    has twice the rank), from the first training examples (eva), or towards the unrounded weight (loftq)."""
    loraplus_ratio: Annotated[float, Field(gt=0)] = 1
    """Rate of B over that of A (LoRA+); 1 is one rate for both."""
    learning_rate: Rate = 1e-3
    """Peak rate; about ten times the control's."""


class ControlSection(Section):
    """What the adapters are held against: trained on the same data, in the same order, with the same number of tokens."""

    method: Literal["full", "lora", "none"] = "full"
    """Full fine-tuning; for a base too large for that an adapter of high rank, or none, and the report says so."""
    learning_rate: Rates = (1e-4,)
    """Peak rate, or a few of them: each is tried, and the one of the lowest loss on examples kept for that is the control."""
    rank: Count | None = None
    """Rank of a control by `lora`."""

    @model_validator(mode="after")
    def _rank_belongs_to_lora(self) -> "ControlSection":
        if (self.rank is None) == (self.method == "lora"):
            raise ValueError(
                f"has rank {self.rank} and method {self.method!r}: give a rank to 'lora', and to nothing else"
            )
        return self


class FrontierSection(Section):
    """What is scored besides, to draw learning against forgetting; none of it is registered."""

    snapshots: Annotated[tuple[Count, ...], AfterValidator(_distinct)] = ()
    """Steps after which what the control and each rank have learnt so far is scored too."""
    learning_rates: Annotated[tuple[Rate, ...], AfterValidator(_distinct)] = ()
    """Rates at which each rank is trained besides."""
    cuts: Annotated[tuple[Count, ...], AfterValidator(_distinct)] = ()
    """Ranks to which the adapter of the highest rank is cut."""


class TrainingSection(Section):
    """What every run of the comparison shares."""

    steps: Count
    """Optimiser steps."""
    batch_size: Count = 8
    """Examples in one step, over all processes."""
    gradient_accumulation_steps: Count = 1
    """Parts in which each process takes its share of a step; more parts need less memory."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    """Steps in which the rate rises linearly; after them it falls along a cosine to a tenth."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients longer than this are shortened to it."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: slower, smaller."""
    checkpoint_every: Count = 10
    """Steps between checkpoints, from which a stopped run goes on."""
    checkpoint_time_fraction: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Of the training's time, what writing checkpoints may take: one that would take more waits for a later turn; 1 writes all."""
    checkpoints_kept: Count = 2
    """How many of the newest checkpoints stay beside the best."""


class LaunchSection(Section):
    """How training is started."""

    config: str = "cpu_zero2"
    """A file of infra/accelerate, by name, or the path of another accelerate config."""
    processes: Count = 1
    """Ranks on all machines together: one per GPU, or a few on a CPU."""
    machines: Count = 1
    """Hosts that train together; on all but the first runs `lora join`, and LORA_MAIN_ADDRESS names the first on each."""
    timeout_seconds: Count = 600
    """How long a rank waits for another, and a run for any of its ranks to move, before it is ended with an error."""
    stall_seconds: Count = 60
    """After how long the rank that holds the others up is named."""
    evaluations_at_once: Count = 1
    """Models that are scored side by side: one per GPU, or one per core or two on a CPU."""

    @model_validator(mode="after")
    def _ranks_are_shared_out(self) -> "LaunchSection":
        if self.processes % self.machines:
            raise ValueError(
                f"has {self.processes} processes on {self.machines} machines; give each machine as many"
            )
        return self


Benchmark = Literal["hellaswag", "piqa", "arc_easy", "openbookqa", "winogrande", "lambada"]


class LmEvalSection(Section):
    """Tasks that lm-eval knows or that a folder of YAML files describes; needs `pip install lora-pipeline[lm-eval]`."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)]
    """Names of tasks."""
    include_path: str | None = None
    """Folder of task files of one's own."""
    limit: Sample | None = None
    """First items of each task; all when left out."""


class EvaluationSection(Section):
    """What is scored for the base, the control and each adapter."""

    general: Annotated[tuple[Benchmark, ...], AfterValidator(_distinct)] = (
        "hellaswag",
        "piqa",
        "arc_easy",
        "openbookqa",
        "winogrande",
        "lambada",
    )
    """General abilities that training should leave alone. It may be empty where there are probes or lm_eval; then chat_prompts
    and passages, which come from the same wheel, are 0 unless they are given."""
    items_per_benchmark: Sample = 40
    """Sampled by seed; the same items for every model."""
    probes: Annotated[tuple[str, ...], AfterValidator(_distinct)] = ()
    """Questions of one's own: .jsonl files of prompt, choices and gold (its place), or of prompt and answer."""
    lm_eval: LmEvalSection | None = None
    """Tasks of the lm-eval library."""
    chat_prompts: Annotated[int, Field(ge=0)] = 40
    """General questions put as chats, whose right answer's loss and whose change of distribution (KL) are measured; 0 for none."""
    passages: Annotated[int, Field(ge=0)] = 30
    """Passages of plain text whose loss is measured; 0 for none."""
    generations: Count = 24
    """Held-out prompts that are answered greedily, for the metrics; left out, no more than are held out."""
    max_new_tokens: Count = 40
    """Longest answer."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)] = (
        "chrf",
        "rouge_l",
        "bleu",
        "exact_match",
    )
    """Of each answer against its reference: chrf, rouge_l, bleu, exact_match, or `module:function` of one's own, of
    (answer, reference, prompt); higher is better."""
    execute: tuple[str, ...] = ()
    """Command that judges an answer, such as ["python", "check.py"]: reads JSON (prompt, answer, reference) from its standard
    input; status 0 is right and 1 wrong, and any other, a signal, a Python traceback or too long a time is an error."""
    execute_seconds: Annotated[float, Field(gt=0)] = 10
    """Longest time of that command."""

    @model_validator(mode="before")
    @classmethod
    def _wheel_is_needed_only_where_it_is_asked(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("general") in ([], ()):
            return {"chat_prompts": 0, "passages": 0, **values}
        return values

    @model_validator(mode="after")
    def _asks_for_general_abilities(self) -> "EvaluationSection":
        if not self.general and not self.probes and self.lm_eval is None:
            raise ValueError(
                "asks no question of general abilities, so that forgetting could not be seen: evaluation.general is empty and there "
                "are no probes and no lm_eval; name benchmarks in general, or questions of your own in probes or lm_eval"
            )
        return self


class GateSection(Section):
    """When an adapter passes; every bound is held against an end of a 95 % interval, not against a mean."""

    min_gain_share: Share = 0.5
    """Least share of the control's task gain, over the base in full precision."""
    max_general_drop: Share = 0.03
    """Largest loss of choice probability on general abilities that training may cause; of accuracy on each benchmark of open
    questions; and on each that rates itself, as a share of the base's mean absolute score."""
    max_drop_beyond_control: Share = 0.03
    """How much more than the control an adapter may lose of general abilities; 0 for no more."""
    max_file_mb: Annotated[float, Field(gt=0)] | None = None
    """Largest adapter file, in 10⁶ bytes."""
    max_rank: Count | None = None
    """Highest rank that the serving engine takes."""
    min_gain_over_champion: float | None = 0.0
    """Least task gain over the registered champion, in nats per token, on the same items; `null` does not compare them."""


def _registry_name(name: str) -> str:
    if "/" in name or ":" in name or not name.strip():
        raise ValueError(
            f"is {name!r}: a registered name has no '/' and no ':'; use letters, digits, '-' and '_'"
        )
    return name


class RegistrySection(Section):
    """Where MLflow keeps it."""

    model: Annotated[str, AfterValidator(_registry_name)]
    """Registered model whose versions are this recipe's adapters."""
    experiment: str | None = None
    """Experiment of the runs; the recipe's name when left out."""
