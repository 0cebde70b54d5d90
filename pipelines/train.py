"""Train one adapter, or the full fine-tuning control: a child process on each rank, started by `accelerate launch`.

    accelerate launch … -m pipelines.train STAGE_FOLDER

Both learn from the same packs in the same order, so they see the same tokens. The loss of a step is the summed
negative log-likelihood over all ranks, divided by the step's supervised tokens over all ranks.

    metrics.jsonl    one line a step, from rank 0
    checkpoints/     where a stopped run goes on; gone when it ends
    snapshots/       adapter or model after the steps that the stage's options name
    adapter/         PEFT format and sidecar, or
    model/           the control's weights, which are scored and never registered
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from datasets import Dataset, load_from_disk
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lora_core import Identity, LoraConfig, save_adapter, trained_weights
from lora_core.adapter.files import CONFIG, read_json
from lora_core.config import GIVEN
from lora_core.errors import AdapterError
from lora_core.spectrum.spectrum import effective_rank, singular_values
from lora_core.spectrum.updates import read_updates
from lora_core.training.losses import linear_cross_entropy
from lora_core.training.optim import loraplus_groups
from pipelines import checkpoint
from pipelines.batches import Pack, order, pack, shares
from pipelines.child import die_with_parent, errors_recorded
from pipelines.errors import PipelineError
from pipelines.hardware import Hardware, detect, peak_memory_bytes
from pipelines.model import head_weight, hidden_states, load_model
from pipelines.plan import lora_config
from pipelines.stage import SNAPSHOTS, read_inputs, read_options, snapshot, write_result
from pipelines.starts import inject_started

METRICS = "metrics.jsonl"
FINAL_RATE = 0.1
"""The schedule ends at this share of the peak rate."""


@dataclass(frozen=True)
class Run:
    """What stays the same over all steps of one rank."""

    accelerator: Accelerator
    settings: dict[str, Any]
    """What of the recipe's training section decides the outcome."""
    parts: int
    """Packs of a rank in each step."""
    dataset: Dataset
    lengths: list[int]
    """Tokens of every training example."""
    steps: list[list[int]]
    """Examples of each step."""
    device: str

    def packs(self, step: int) -> list[Pack]:
        """Return this rank's packs of a step, one for each accumulation part."""
        return [pack([self.dataset[i] for i in share], self.device) for share in self.shares(step)]

    def shares(self, step: int) -> list[list[int]]:
        """Return the examples of this rank's packs."""
        dealt = shares(self.steps[step], self.lengths, self.accelerator.num_processes * self.parts)
        return dealt[self.accelerator.process_index :: self.accelerator.num_processes]

    def examples(self) -> Iterator[dict[str, Any]]:
        """Yield the examples of all steps and ranks, in the order of the steps."""
        return (self.dataset[i] for step in self.steps for i in step)

    def supervised_tokens(self, step: int) -> int:
        """Count the supervised tokens of a step over all ranks."""
        return sum(sum(self.dataset[i]["supervised"]) for i in self.steps[step])


def train(folder: Path) -> None:
    """Train what the stage's inputs say, from the newest checkpoint if there is one, and write the result."""
    (inputs, paths), options = read_inputs(folder), read_options(folder)
    hardware = detect()
    accelerator = start(inputs["seed"], options, hardware)
    model = load_model(Path(paths["base"]), inputs["quantization"], hardware)
    run = prepare_run(accelerator, inputs, Path(paths["data"]), hardware)
    resumes = checkpoint.exists(accelerator, folder)
    config = adapt(model, inputs, examples=run.examples(), base=Path(paths["base"]), resumes=resumes)
    if options["gradient_checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = trained_weights(model)
    engine, optimizer, schedule = prepare_engine(run, model, parameter_groups(model, inputs), hardware)
    first = checkpoint.resume(accelerator, folder)
    log = Log(folder, first, accelerator.is_main_process)
    if accelerator.is_main_process:
        print(f"{weights} trained weights; {hardware.describe()}; {accelerator.num_processes} ranks; from step {first}", flush=True)
    for step in range(first, len(run.steps)):
        log.write(train_step(run, engine, optimizer, schedule, step))
        if step + 1 in options["snapshots"]:
            save_trained(run, engine, config, inputs, folder / snapshot(step + 1))
        if (step + 1) % options["checkpoint_every"] == 0 and step + 1 < len(run.steps):
            checkpoint.save(accelerator, folder, step + 1)
    finish(folder, run, engine, config, {"trained_weights": weights, **log.summary()})


def start(seed: int, options: dict[str, Any], hardware: Hardware) -> Accelerator:
    """Join the process group and hold it against what was asked for.

    Naming the backend matters: without it, DeepSpeed on CPUs leaves every rank alone with all of the data.
    """
    torch.manual_seed(seed + int(os.environ.get("RANK", "0")))
    accelerator = Accelerator(
        gradient_accumulation_steps=options["accumulation"],
        mixed_precision="bf16" if hardware.dtype is torch.bfloat16 else "no",
        kwargs_handlers=[InitProcessGroupKwargs(backend=hardware.backend)] if "WORLD_SIZE" in os.environ else None,
    )
    if accelerator.num_processes != options["processes"]:
        raise PipelineError(
            f"{accelerator.num_processes} ranks came up where launch.processes asks for {options['processes']}; "
            "check that the accelerate config fits the machine"
        )
    return accelerator


def adapt(
    model: PreTrainedModel, inputs: dict[str, Any], *, examples: Iterable[dict[str, Any]], base: Path, resumes: bool
) -> LoraConfig | None:
    """Inject the adapter, or leave every weight to train for the control; return the adapter's config.

    A run that resumes finds its adapter in the checkpoint, so what would only be written over is not looked for again.
    """
    config = None
    if inputs["method"] == "lora":
        config = lora_config(inputs["lora"], inputs["rank"])
        start = replace(config, init_lora_weights="kaiming") if resumes and config.init_lora_weights in GIVEN else config
        inject_started(model, start, seed=inputs["seed"], examples=examples, base=base)
    model.train()
    return config


def prepare_run(accelerator: Accelerator, inputs: dict[str, Any], data: Path, hardware: Hardware) -> Run:
    """Fix the order and check on every rank that the ranks' shares of the first step are disjoint and whole."""
    dataset = load_from_disk(str(data / "train"))
    settings = inputs["training"]
    lengths = [len(ids) for ids in dataset["input_ids"]]
    steps = order(len(dataset), settings["steps"], settings["batch_size"], inputs["seed"])
    run = Run(accelerator, settings, accelerator.gradient_accumulation_steps, dataset, lengths, steps, hardware.device)
    seen = sorted(gather_object([i for share in run.shares(0) for i in share]))
    if seen != sorted(steps[0]):
        raise PipelineError(f"the ranks share out examples {seen} where step 1 has {sorted(steps[0])}; they must be disjoint and whole")
    return run


def parameter_groups(model: PreTrainedModel, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the optimiser trains, and at which rate: one for all, or a higher one for every B."""
    rate, decay, ratio = inputs["learning_rate"], inputs["training"]["weight_decay"], inputs.get("lora", {}).get("loraplus_ratio", 1)
    if ratio != 1:
        return loraplus_groups(model.named_parameters(), learning_rate=rate, ratio=ratio, weight_decay=decay)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate, "weight_decay": decay}]


def prepare_engine(run: Run, model: PreTrainedModel, groups: list[dict[str, Any]], hardware: Hardware) -> tuple[Any, Any, Any]:
    """Hand model, optimiser and schedule to accelerate, which shards them as the launch config says."""
    settings, accelerator = run.settings, run.accelerator
    optimizer = torch.optim.AdamW(groups, fused=hardware.fused_optimizer)
    schedule = LambdaLR(optimizer, lambda step: rate_share(step, settings["warmup_steps"], settings["steps"]))
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = settings["max_grad_norm"]
    engine, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    return engine, optimizer, schedule


def rate_share(step: int, warmup: int, steps: int) -> float:
    """Return the share of the peak rate at a step: a linear rise, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(run: Run, engine: Any, optimizer: Any, schedule: Any, step: int) -> dict[str, Any]:
    """Take one optimiser step; return its row of metrics. Every rank calls it."""
    started, accelerator = time.perf_counter(), run.accelerator
    rate, supervised = schedule.get_last_lr()[0], run.supervised_tokens(step)
    packs = run.packs(step)
    weight = accelerator.num_processes * len(packs) / supervised  # engines average over ranks and parts; the loss is a sum
    total = torch.zeros((), device=run.device)
    for part in packs:
        with accelerator.accumulate(engine):
            negative_log_likelihood = forward(accelerator.unwrap_model(engine), part)
            total += everywhere_finite(accelerator, negative_log_likelihood, step)
            accelerator.backward(negative_log_likelihood * weight)
            norm = clip(accelerator, engine, run.settings["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
    schedule.step()
    return {
        "step": step + 1,
        "steps": len(run.steps),
        "loss": float(total) / supervised,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": sum(run.lengths[i] for i in run.steps[step]),
        "supervised_tokens": supervised,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "time": time.time(),
    }


def forward(model: PreTrainedModel, part: Pack) -> torch.Tensor:
    """Return the pack's summed negative log-likelihood; the head sees the supervised positions only."""
    states = hidden_states(model, part.input_ids, part.position_ids, part.segments)
    return linear_cross_entropy(states[part.predicts], head_weight(model), part.targets)


def everywhere_finite(accelerator: Accelerator, loss: torch.Tensor, step: int) -> torch.Tensor:
    """Return the sum over ranks; a loss that is not finite on any rank stops them all before the optimiser step."""
    total: torch.Tensor = accelerator.reduce(loss.detach().clone(), reduction="sum")
    if not torch.isfinite(total):
        raise PipelineError(f"the loss of step {step + 1} is {float(total)}; lower the learning rate (the last checkpoint is kept)")
    return total


def clip(accelerator: Accelerator, engine: Any, limit: float) -> float | None:
    """Shorten the gradient and return its former length, at the end of a step; DeepSpeed has done so by itself."""
    if not accelerator.sync_gradients:
        return None
    norm = accelerator.clip_grad_norm_([p for p in engine.parameters() if p.requires_grad], limit)
    return float(norm) if norm is not None else None


class Log:
    """metrics.jsonl on rank 0, cut back to the checkpoint that a resumed run starts from."""

    def __init__(self, folder: Path, first: int, writes: bool) -> None:
        self.path, self.writes = folder / METRICS, writes
        self.rows = list(_rows(self.path))[:first] if writes else []
        if writes:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: dict[str, Any]) -> None:
        """Append a step."""
        if self.writes:
            self.rows.append(row)
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")

    def summary(self) -> dict[str, Any]:
        """Return the figures of the whole run; the first step, which warms up, does not count for speed."""
        timed = self.rows[1:] or self.rows
        if not timed:
            return {}
        return {
            "steps": len(self.rows),
            "tokens": sum(row["tokens"] for row in self.rows),
            "supervised_tokens": sum(row["supervised_tokens"] for row in self.rows),
            "first_loss": self.rows[0]["loss"],
            "last_loss": self.rows[-1]["loss"],
            "tokens_per_second": round(sum(row["tokens"] for row in timed) / sum(row["seconds"] for row in timed), 1),
            "training_seconds": round(sum(row["seconds"] for row in self.rows), 2),
        }


def finish(folder: Path, run: Run, engine: Any, config: LoraConfig | None, figures: dict[str, Any]) -> None:
    """Save what was trained and declare the stage done. Rank 0 writes; all ranks give their peak of memory."""
    accelerator = run.accelerator
    figures["peak_memory_bytes"] = max(gather_object([peak_memory_bytes()]))
    inputs, _ = read_inputs(folder)
    figures |= save_trained(run, engine, config, inputs, folder)
    if accelerator.is_main_process:
        written = [*(folder / output_of(config)).iterdir(), *(folder / SNAPSHOTS).glob("*/*/*")]
        write_result(folder, figures, [str(path.relative_to(folder)) for path in sorted(written)])
        checkpoint.discard(folder)
    accelerator.wait_for_everyone()


def save_trained(run: Run, engine: Any, config: LoraConfig | None, inputs: dict[str, Any], place: Path) -> dict[str, Any]:
    """Write the adapter, or the control's weights, into `place`; return their size and digest. Rank 0 writes."""
    figures: dict[str, Any] = {}
    accelerator, folder = run.accelerator, place / output_of(config)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(engine)
        if config is not None:
            identity = Identity(inputs["base"]["id"], inputs["base"]["revision"], inputs["base"]["digests"], _lineage(inputs))
            figures["adapter_sha256"] = save_adapter(model, folder, config, identity)
            figures["file_rank"] = read_json(folder / CONFIG)["r"]
            figures["spectrum"] = spectrum(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder)
        figures["file_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
    accelerator.wait_for_everyone()
    return figures


def spectrum(adapter: Path) -> list[dict[str, Any]]:
    """Return the singular values of each module's ΔW and how many of them count; nothing where ΔW is not all that was trained."""
    try:
        values = {name: singular_values(update) for name, update in read_updates(adapter).items()}
    except AdapterError:  # DoRA, biases, modules trained whole: no product of two factors says what they changed
        return []
    return [
        {
            "module": name,
            "rank": len(one),
            "effective_rank": round(effective_rank(one), 3),
            "values": [float(f"{v:.4g}") for v in one.tolist()],
        }
        for name, one in values.items()
    ]


def output_of(config: LoraConfig | None) -> str:
    """Name the folder of what is trained."""
    return "adapter" if config is not None else "model"


def _lineage(inputs: dict[str, Any]) -> dict[str, str]:
    base = inputs["base"]
    return {
        "data_digest": inputs["data_digest"],
        "tokenizer_sha256": base["tokenizer_sha256"],
        "template_sha256": base["template_sha256"],
        "quantization": inputs["quantization"],
        "init": inputs["lora"]["init"],
    }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete rows of metrics.jsonl; a last line cut short by a kill is left out."""
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


if __name__ == "__main__":
    die_with_parent()
    with errors_recorded(Path(sys.argv[1])):
        train(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
