"""Train one adapter, or the full fine-tuning control: a child process on each rank, started by `accelerate launch`.

    accelerate launch … -m pipelines.training.train STAGE_FOLDER

Both learn from the same packs in the same order, so they see the same tokens. The loss of a step is the summed
negative log-likelihood over all ranks, divided by the step's supervised tokens over all ranks.

    metrics.jsonl    one line a step, from rank 0
    checkpoints/     where a stopped run goes on; gone when it ends
    snapshots/       adapter or model after the steps that the stage's options name
    adapter/         PEFT format and sidecar, or
    model/           the control's weights, which are scored and never registered
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from datasets import Dataset, load_from_disk
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lora_core import LoraConfig, trained_weights
from lora_core.adapter.adapter_files import read_json
from lora_core.config import DATA_DRIVEN_INITS
from lora_core.modules import modules_outside_language_model
from lora_core.training.optim import loraplus_groups
from pipelines.data.batches import order, shares
from pipelines.errors import DataError, DivergenceError, MemoryExceededError, PipelineError
from pipelines.models.equivalence import Probe, verified_reader
from pipelines.models.forward import PackReader
from pipelines.models.hardware import (
    Hardware,
    attention_kernel,
    detect,
    peak_memory_bytes,
    reset_peak_memory,
)
from pipelines.models.loading import attention_heads, load_model
from pipelines.models.packs import Pack, pack
from pipelines.models.support import enable_checkpointing
from pipelines.models.verified import Verified, sentence
from pipelines.planning.plan import lora_config
from pipelines.runtime.child import die_with_parent, errors_recorded
from pipelines.runtime.heartbeats import Pulse, note
from pipelines.runtime.memory import is_out_of_memory
from pipelines.runtime.stage import (
    RESULT,
    SNAPSHOTS,
    read_inputs,
    read_options,
    read_result,
    snapshot,
    write_result,
)
from pipelines.training.checkpoint import (
    Checkpoints,
    LoadedCheckpoint,
    load_trained_weights,
    resume,
    select_checkpoint,
)
from pipelines.training.engine import Engine, disable_zero_init, is_deepspeed, prepare, start
from pipelines.training.initialization import inject_initialized
from pipelines.training.log import METRICS, Log
from pipelines.training.optimizers import optimizer_of
from pipelines.training.output import output_of, save_trained
from pipelines.training.phase_timer import PhaseTimer
from pipelines.training.rank_errors import gather_hostnames, name_lost_rank

OPENING = 16
"""Tokens of a text whose gradient is compared before training."""
NAMED = 5
"""How many of the tensors without a gradient are named."""
FINAL_RATE = 0.1
"""The schedule ends at this share of the peak rate."""


@dataclass(frozen=True)
class Run:
    """What stays the same over all steps of one rank."""

    accelerator: Accelerator
    dataset: Dataset
    lengths: list[int]
    """Tokens of every training example."""
    steps: list[list[int]]
    """Examples of each step."""
    warmup: int
    """Steps in which the rate rises."""
    max_grad_norm: float
    device: str
    heart: PhaseTimer

    def packs(self, step: int) -> list[Pack]:
        """Return this rank's packs of a step, one for each micro-batches."""
        return [
            pack([self.example(i, step) for i in share], self.device) for share in self.shares(step)
        ]

    def example(self, place: int, step: int) -> dict[str, Any]:
        """Return one example; one that cannot be read is named."""
        try:
            example: dict[str, Any] = self.dataset[place]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"example {place}, of step {step + 1}, cannot be read ({type(error).__name__}: {error}); remove the folder of the prepared "
                "data and run again, which prepares it anew (the last checkpoint is kept)"
            ) from error
        return example

    def shares(self, step: int) -> list[list[int]]:
        """Return the examples of this rank's packs."""
        ranks = self.accelerator.num_processes
        dealt = shares(
            self.steps[step], self.lengths, ranks * self.accelerator.gradient_accumulation_steps
        )
        return dealt[self.accelerator.process_index :: ranks]

    def probes(self) -> list[Probe]:
        """Return what the path is verified on: the gradient of two short texts, and the loss of the longest example after one."""
        used = sorted({i for step in self.steps for i in step}, key=lambda i: (self.lengths[i], i))
        first, second = (opening(self.example(i, 0)) for i in (used[0], used[len(used) // 2]))
        longest = self.example(used[-1], 0)
        return [
            Probe(pack([first, second], self.device), gradient=True),
            Probe(pack([first, longest], self.device)),
        ]

    def examples(self) -> Iterator[dict[str, Any]]:
        """Yield the examples of all steps and ranks, in the order of the steps."""
        return (self.dataset[i] for step in self.steps for i in step)

    def most_tokens(self) -> int:
        """Return the most tokens that any rank handles at once."""
        parts = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
        return max(
            sum(self.lengths[i] for i in share)
            for step in self.steps
            for share in shares(step, self.lengths, parts)
        )

    def supervised_tokens(self, step: int) -> int:
        """Count the supervised tokens of a step over all ranks."""
        return sum(sum(self.example(i, step)["supervised"]) for i in self.steps[step])


def opening(example: dict[str, Any]) -> dict[str, Any]:
    """Return the first tokens of an example, each after the first supervised: gradients are compared on little text."""
    ids = example["input_ids"][:OPENING]
    return {"input_ids": ids, "supervised": [False] + [True] * (len(ids) - 1)}


def train(folder: Path) -> None:
    """Train what the stage's inputs say, from the newest checkpoint if there is one, and write the result.

    A run that is done and is asked for more snapshots goes as far as the last one that it lacks; its outcome stays.
    """
    (inputs, paths), options = read_inputs(folder), read_options(folder)
    hardware = detect()
    accelerator = start(inputs["seed"], options, hardware, full=inputs["method"] == "full")
    model = loaded(Path(paths["base"]), inputs, hardware)
    heart = PhaseTimer(Pulse(folder, accelerator.process_index, gethostname()))
    run = prepare_run(accelerator, inputs, Path(paths["data"]), heart)
    done, found = (
        read_result(folder),
        select_checkpoint(accelerator.is_main_process, folder / "checkpoints"),
    )
    config = adapt(model, inputs, examples=run.examples(), base=Path(paths["base"]), found=found)
    engine, facts = equip(run, model, inputs, options, hardware)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        options["checkpoints_kept"],
        options["checkpoint_time_fraction"],
        facts["trained_weights"],
    )
    first = resume(engine, found, inputs["seed"])
    watch(engine, heart)
    log = Log(folder / METRICS if engine.is_first and done is None else None, first)
    if engine.is_first:
        announce(folder, facts, f"{engine.ranks} ranks; from step {first}")
    peers = gather_hostnames()
    lacking = (
        options["snapshots"] if done is None else missing_snapshots(folder, options["snapshots"])
    )
    with checkpoints, name_lost_rank(peers, heart):
        for step in range(first, len(run.steps) if done is None else max(lacking, default=0)):
            with memory_named(run, step):
                log.write(train_step(run, engine, step))
            if step + 1 in lacking:
                with heart.phase("snapshot"):
                    save_trained(engine, config, inputs, folder / snapshot(step + 1))
            if (step + 1) % options["checkpoint_every"] == 0 and step + 1 < len(run.steps):
                with heart.phase("checkpoint"):
                    if checkpoints.due():
                        checkpoints.save(
                            engine, step + 1, log.mean_loss(options["checkpoint_every"])
                        )
    if done is None:
        done = finish(
            folder, engine, config, {**facts, "checkpoints": checkpoints.figures, **log.summary()}
        )
    declare(folder, engine, config, done)
    if engine.is_first:
        checkpoints.discard()


def loaded(base: Path, inputs: dict[str, Any], hardware: Hardware) -> PreTrainedModel:
    """Load the base, whole on every rank; in float32 where all of it is trained, unless DeepSpeed keeps float32 masters."""
    masters, trusted = (
        inputs["method"] == "full" and not is_deepspeed(),
        inputs.get("trust_remote_code", False),
    )
    with disable_zero_init():
        return load_model(
            base, inputs["quantization"], hardware, masters=masters, trust_remote_code=trusted
        )


def equip(
    run: Run,
    model: PreTrainedModel,
    inputs: dict[str, Any],
    options: dict[str, Any],
    hardware: Hardware,
) -> tuple[Engine, dict[str, Any]]:
    """Choose how the model is read and by what it is trained; return it under its engine, and what a result says of that."""
    weights = trained_weights(model)
    if options["gradient_checkpointing"]:
        enable_checkpointing(model)
    reader, verified = verify(run, model, hardware.dtype)
    optimizer = optimizer_of(
        run.accelerator,
        hardware,
        model,
        options,
        full=inputs["method"] == "full",
        tokens=run.most_tokens,
    )
    engine = prepare(
        run.accelerator,
        reader,
        parameter_groups(model, inputs),
        optimizer=optimizer,
        max_grad_norm=run.max_grad_norm,
    )
    attention = (
        attention_kernel(hardware, attention_heads(model)) if reader.packed else reader.attention
    )
    return engine, {
        "trained_weights": weights,
        "processor": hardware.name,
        "optimizer": optimizer.name,
        "attention": attention,
        "choices": hardware.describe(attention, optimizer),
        "forward": verified.figures(),
    }


def verify(run: Run, model: PreTrainedModel, dtype: torch.dtype) -> tuple[PackReader, Verified]:
    """Choose how the model is read, and see on examples of the run that this is the model's own forward; every rank does."""
    with run.heart.phase("check"):
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        reader, verified = verified_reader(model, run.probes(), trained=trained, dtype=dtype)
    run.heart.collect()  # it belongs to no step
    reset_peak_memory()
    paths = gather_object([(verified.path, verified.own_head)])
    if len(set(paths)) > 1:
        raise PipelineError(
            f"the ranks would read the base in different ways ({paths}); run them on hosts of one kind"
        )
    if any(
        gather_object([bool(verified.without_gradient)])
    ):  # DDP waits for the gradients of all tensors, unless it is told to look which there are
        run.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    return reader, verified


def announce(folder: Path, facts: dict[str, Any], where: str) -> None:
    """Say how the training is computed, that it is computed rightly, and what it does not reach."""
    note(folder, f"{facts['trained_weights']} trained weights; {facts['choices']}; {where}")
    note(folder, sentence(facts["forward"]))
    names = facts["forward"]["without_gradient"]
    if names:
        more = "" if len(names) <= NAMED else f" and {len(names) - NAMED} more"
        note(
            folder,
            f"{len(names)} trained tensors got no gradient from the first examples: {', '.join(names[:NAMED])}{more}",
        )


def watch(engine: Engine, heart: PhaseTimer) -> None:
    """Have the time in collectives and in DeepSpeed's step, which it takes inside the backward pass, counted by themselves."""
    if engine.zero_stage:
        engine.wrapped.step = heart.timed("optimizer", engine.wrapped.step)
    if torch.distributed.is_initialized():
        heart.watch_collectives()
    if (
        isinstance(engine.wrapped, DistributedDataParallel)
        and engine.accelerator.device.type == "cpu"
    ):
        engine.wrapped.register_comm_hook(None, reduced_by(torch.distributed.all_reduce))


def reduced_by(
    all_reduce: Callable[..., Any],
) -> Callable[[None, GradBucket], torch.futures.Future[torch.Tensor]]:
    """Return a hook by which DDP averages gradients where their time is counted; on a CPU there is nothing to overlap it with."""

    def average(_: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradient = bucket.buffer().div_(torch.distributed.get_world_size())
        all_reduce(gradient)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(gradient)
        return done

    return average


def adapt(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    *,
    examples: Iterable[dict[str, Any]],
    base: Path,
    found: LoadedCheckpoint | None = None,
) -> LoraConfig | None:
    """Inject the adapter, or leave every weight to train for the control; return the adapter's config.

    A run that resumes takes its weights from the checkpoint, so a start that would only be written over is not looked for again.
    """
    config = None
    if inputs["method"] == "lora":
        config = lora_config(inputs["lora"], inputs["rank"])
        begin = (
            replace(config, init_lora_weights="kaiming")
            if found is not None and config.init_lora_weights in DATA_DRIVEN_INITS
            else config
        )
        inject_initialized(model, begin, seed=inputs["seed"], examples=examples, base=base)
    else:
        freeze_towers(model)
    if found is not None:
        load_trained_weights(model, found.tensors["weights"])
    model.train()
    return config


def freeze_towers(model: PreTrainedModel) -> None:
    """Leave alone what a multimodal model holds next to its language model: nothing that it is trained on reaches it."""
    for tower in modules_outside_language_model(model).values():
        tower.requires_grad_(False)


def prepare_run(
    accelerator: Accelerator, inputs: dict[str, Any], data: Path, heart: PhaseTimer
) -> Run:
    """Fix the order and check on every rank that the ranks' shares of the first step are disjoint and whole."""
    dataset = load_from_disk(str(data / "train"))
    settings = inputs["training"]
    lengths = [len(ids) for ids in dataset["input_ids"]]
    steps = order(len(dataset), settings["steps"], settings["batch_size"], inputs["seed"])
    run = Run(
        accelerator,
        dataset,
        lengths,
        steps,
        settings["warmup_steps"],
        settings["max_grad_norm"],
        str(accelerator.device),
        heart,
    )
    seen = sorted(gather_object([i for share in run.shares(0) for i in share]))
    if seen != sorted(steps[0]):
        raise PipelineError(
            f"the ranks share out examples {seen} where step 1 has {sorted(steps[0])}; they must be disjoint and whole"
        )
    return run


def parameter_groups(model: PreTrainedModel, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the optimiser trains, and at which rate: one for all, or a higher one for every B."""
    rate, decay, ratio = (
        inputs["learning_rate"],
        inputs["training"]["weight_decay"],
        inputs.get("lora", {}).get("loraplus_ratio", 1),
    )
    if ratio != 1:
        return loraplus_groups(
            model.named_parameters(), learning_rate=rate, ratio=ratio, weight_decay=decay
        )
    return [
        {
            "params": [p for p in model.parameters() if p.requires_grad],
            "lr": rate,
            "weight_decay": decay,
        }
    ]


def lr_multiplier(step: int, warmup: int, steps: int) -> float:
    """Return the share of the peak rate at a step: a linear rise, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(run: Run, engine: Engine, step: int) -> dict[str, Any]:
    """Take one optimiser step; return its row of metrics. Every rank calls it."""
    started, accelerator, heart = time.perf_counter(), engine.accelerator, run.heart
    heart.step = step + 1
    rate = engine.set_lr(lr_multiplier(step, run.warmup, len(run.steps)))
    with heart.phase("data"):
        supervised, packs = run.supervised_tokens(step), run.packs(step)
    weight = (
        engine.ranks * len(packs) / supervised
    )  # engines average over ranks and parts; the loss is a sum
    total = torch.zeros((), device=run.device)
    for part in packs:
        with accelerator.accumulate(engine.wrapped):
            with heart.phase("forward"):
                negative_log_likelihood = engine.wrapped(part)
                total += everywhere_finite(run, negative_log_likelihood, step)
            with heart.phase("backward"):
                accelerator.backward(negative_log_likelihood * weight)
            with heart.phase("optimizer"):
                engine.fill_gradients()
                norm = engine.gradient_norm(run.max_grad_norm)
                engine.optimizer.step()
                engine.optimizer.zero_grad()
    seconds, tokens = time.perf_counter() - started, sum(run.lengths[i] for i in run.steps[step])
    return {
        "step": step + 1,
        "steps": len(run.steps),
        "loss": float(total) / supervised,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "seconds": seconds,
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_of": heart.collect(),
        "peak_memory_bytes": peak_memory_bytes(),
        "time": time.time(),
    }


@contextmanager
def memory_named(run: Run, step: int) -> Iterator[None]:
    """Say of a step inside the block that needs too much memory how many tokens it had at once."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tokens = max(sum(run.lengths[i] for i in share) for share in run.shares(step))
        raise MemoryExceededError(
            f"step {step + 1} needs more memory than there is, with {tokens:,} tokens at once"
        ) from error


def everywhere_finite(run: Run, loss: torch.Tensor, step: int) -> torch.Tensor:
    """Return the sum over ranks; a loss that is not finite on any rank stops them all before the optimiser step."""
    total: torch.Tensor = run.accelerator.reduce(loss.detach().clone(), reduction="sum")
    if not torch.isfinite(total):
        losses = gather_object(
            [(float(loss), sorted(i for share in run.shares(step) for i in share))]
        )
        rank, (value, examples) = next(
            (pair for pair in enumerate(losses) if not math.isfinite(pair[1][0])), (0, losses[0])
        )
        raise DivergenceError(
            f"the loss of step {step + 1} is {value} on rank {rank}, whose examples are {', '.join(map(str, examples))}; lower the "
            "learning rate, or mend these rows (the last checkpoint is kept)"
        )
    return total


def missing_snapshots(folder: Path, steps: list[int]) -> list[int]:
    """Return the steps of which a run that is done has kept nothing."""
    kept = read_json(folder / RESULT)["files"]
    return [
        step for step in steps if not any(name.startswith(f"{snapshot(step)}/") for name in kept)
    ]


def finish(
    folder: Path, engine: Engine, config: LoraConfig | None, figures: dict[str, Any]
) -> dict[str, Any]:
    """Save what was trained; return the run's figures. All ranks give their peak of memory."""
    peak = max(gather_object([peak_memory_bytes()]))
    inputs, _ = read_inputs(folder)
    return {**figures, "peak_memory_bytes": peak, **save_trained(engine, config, inputs, folder)}


def declare(
    folder: Path, engine: Engine, config: LoraConfig | None, figures: dict[str, Any]
) -> None:
    """Declare the stage done, with every snapshot that it ever kept; rank 0 writes."""
    if engine.is_first:
        written = [*(folder / output_of(config)).iterdir(), *(folder / SNAPSHOTS).glob("*/*/*")]
        write_result(folder, figures, [str(path.relative_to(folder)) for path in sorted(written)])
    engine.accelerator.wait_for_everyone()


if __name__ == "__main__":
    die_with_parent()
    with errors_recorded(Path(sys.argv[1])):
        train(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
