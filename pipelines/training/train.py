"""Train one adapter, or the full fine-tuning control.

    accelerate launch … -m pipelines.training.train STAGE_FOLDER

`accelerate launch` starts a child process on each rank. Adapter and control learn from the same
packs in the same order, so they see the same tokens.

    metrics.jsonl    one line per step, from rank 0
    checkpoints/     from which a stopped run resumes; removed when it ends
    snapshots/       adapter or model after the steps that the stage's options name
    adapter/         PEFT format and sidecar, or
    model/           the control's weights, which are evaluated and never registered

With `evaluate_every`, adapter/ or model/ has the weights of the step with the lowest held-out loss;
otherwise those of the last step.

    build.py         base, adapter, reader, optimizer and engine
    run.py           the examples and packs of each step
    step.py          one optimizer step
    evaluations.py   held-out loss, best weights and early stopping
    output.py        what is saved at the end
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import gethostname

import torch

from lora_core import LoraConfig
from pipelines.models.hardware import detect
from pipelines.models.verification_cache import VerificationCache
from pipelines.runtime.child import die_with_parent, errors_recorded
from pipelines.runtime.heartbeats import HeartbeatWriter, note
from pipelines.runtime.interfaces.inputs import TrainInputs, TrainOptions
from pipelines.runtime.interfaces.kinds import TRAIN
from pipelines.runtime.interfaces.results import SavedWeights, TrainingFacts, TrainResult
from pipelines.runtime.stage import read_inputs, read_options, read_result, snapshot
from pipelines.training.build import adapt, build_engine, load_base
from pipelines.training.checkpoint import select_checkpoint
from pipelines.training.checkpoint_state import resume
from pipelines.training.checkpoint_writer import Checkpoints
from pipelines.training.collective_timing import time_collectives
from pipelines.training.engine import Engine, start
from pipelines.training.eval_history import EVAL_LOSS
from pipelines.training.evaluations import Evaluations, resume_evaluations
from pipelines.training.held_out import load_held_out
from pipelines.training.held_out_losses import held_out_losses
from pipelines.training.log import METRICS, Log, Row
from pipelines.training.output import (
    copy_tokenizer,
    declare_done,
    missing_snapshots,
    peak_memory_of_all_ranks,
    saved_weights,
    write_trained,
)
from pipelines.training.phase_timer import PhaseTimer
from pipelines.training.rank_errors import gather_hostnames, name_lost_rank
from pipelines.training.run import Run, prepare_run
from pipelines.training.step import name_memory_limit, train_step
from pipelines.training.verification import announce

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Training:
    """A training on one rank, ready to take steps."""

    folder: Path
    """The stage's."""
    inputs: TrainInputs
    options: TrainOptions
    run: Run
    engine: Engine
    config: LoraConfig | None
    """The adapter's; None for full fine-tuning."""
    log: Log
    checkpoints: Checkpoints
    evaluations: Evaluations | None
    """None without `evaluate_every`, and for a finished run that only lacks snapshots."""


def train(folder: Path) -> None:
    """Train as the stage's inputs define, from the newest checkpoint if any; write the result.

    If the run is already finished but lacks snapshots, it trains again up to the last missing one,
    and its result stays as it is.
    """
    inputs, paths = read_inputs(folder, TRAIN)
    options = read_options(folder)
    base = paths.required("base")
    data = paths.required("data")
    hardware = detect()
    accelerator = start(inputs.seed, options, hardware, full=inputs.method == "full")
    model = load_base(base, inputs, hardware)
    timer = PhaseTimer(HeartbeatWriter(folder, accelerator.process_index, gethostname()))
    run = prepare_run(accelerator, inputs, data, timer)
    held_out = load_held_out(run, inputs, data)

    result = read_result(folder, TRAIN)
    checkpoint = select_checkpoint(accelerator.is_main_process, folder / CHECKPOINTS)
    config = adapt(model, inputs, examples=run.examples(), base=base, checkpoint=checkpoint)
    cache = VerificationCache(folder)
    engine, facts = build_engine(run, model, inputs, options, hardware, cache)
    checkpoints = _checkpoints(folder, options, facts.trained_weights)
    first = resume(engine, checkpoint, inputs.seed)
    time_collectives(engine, timer)
    log = Log(folder / METRICS if engine.is_first and result is None else None, first)
    evaluations = None
    if result is None:
        evaluations = resume_evaluations(
            inputs, held_out, checkpoints=checkpoints.folder, log=log, first=first
        )
    if engine.is_first:
        announce(folder, facts, ranks=engine.ranks, first=first)

    training = Training(folder, inputs, options, run, engine, config, log, checkpoints, evaluations)
    hosts = gather_hostnames()
    with checkpoints, name_lost_rank(hosts, timer):
        if result is None:
            _train_steps(training, first, len(run.steps), options.snapshots)
        else:
            missing = missing_snapshots(folder, options.snapshots)
            _train_steps(training, first, max(missing, default=0), missing)
    if result is None:
        result = _finish(training, facts)
        copy_tokenizer(engine, config, data, folder)
    declare_done(folder, engine, config, result)
    if engine.is_first:
        checkpoints.discard()


def _finish(training: Training, facts: TrainingFacts) -> TrainResult:
    """Save the trained weights; return the result, of which rank 0 has all.

    A collective: every rank calls it.
    """
    peak = peak_memory_of_all_ranks()
    _save_output(training)
    saved = SavedWeights(file_bytes=0)
    held_out = None
    if training.engine.is_first:
        saved = saved_weights(training.folder, training.config)
        if training.evaluations is not None:
            examples = len(training.evaluations.examples.dataset)
            held_out = held_out_losses(training.log.rows, len(training.run.steps), examples)
    return TrainResult(
        facts=facts,
        totals=training.log.totals(),
        saved=saved,
        held_out=held_out,
        checkpoints=training.checkpoints.metrics,
        peak_memory_bytes=peak,
    )


def _save_output(training: Training) -> None:
    """Save the last weights, or, if the training was evaluated, the best ones. A collective."""
    evaluations = training.evaluations
    if evaluations is None:
        write_trained(training.engine, training.config, training.inputs, training.folder)
        return
    if training.engine.is_first:
        evaluations.weights.publish(evaluations.best_step, training.folder, training.config)
        taken = len(training.log.rows)
        note(training.folder, evaluations.describe(taken, len(training.run.steps)))
    training.engine.accelerator.wait_for_everyone()


def _checkpoints(folder: Path, options: TrainOptions, trained_weights: int) -> Checkpoints:
    return Checkpoints(
        folder / CHECKPOINTS,
        options.checkpoints_kept,
        options.checkpoint_time_fraction,
        trained_weights,
    )


def _train_steps(training: Training, first: int, last: int, snapshots: Sequence[int]) -> None:
    """Take the steps from `first` up to `last`; evaluate, and save snapshots and checkpoints.

    Every rank calls it: steps, evaluations, snapshots and checkpoints are collectives, and every
    rank stops early after the same step. A row is written after its evaluation, and a checkpoint
    after its row, so a run that resumes has every evaluation before its checkpoint.
    """
    run, engine = training.run, training.engine
    for step in range(first, last):
        done = step + 1
        with name_memory_limit(f"step {done}", partial(run.largest_own_pack, step)):
            row = train_step(run, engine, step)
        training.log.write(row | _evaluate(training, done))
        if done in snapshots:
            with run.timer.phase("snapshot"):
                parent = training.folder / snapshot(done)
                write_trained(engine, training.config, training.inputs, parent)
        if training.evaluations is not None and training.evaluations.should_stop:
            return
        if done % training.options.checkpoint_every == 0 and done < len(run.steps):
            with run.timer.phase("checkpoint"):
                _save_checkpoint(training, done)


def _evaluate(training: Training, step: int) -> Row:
    """Evaluate the weights after `step` steps if that is due; return what the row gets from it."""
    run, engine, evaluations = training.run, training.engine, training.evaluations
    if evaluations is None or not evaluations.is_due(step, len(run.steps)):
        return {}
    tokens = evaluations.examples.largest_pack_tokens
    with name_memory_limit(f"the evaluation after step {step}", lambda: tokens):
        loss = evaluations.evaluate(run, engine, training.config, training.inputs, step)
    if engine.is_first:
        evaluations.remove_unneeded(training.checkpoints.steps())
    return {EVAL_LOSS: loss}


def _save_checkpoint(training: Training, step: int) -> None:
    if training.checkpoints.due():
        loss = training.log.mean_loss(training.options.checkpoint_every)
        training.checkpoints.save(training.engine, step, loss)


def main(folder: Path) -> None:
    """Train in this child process; an error is recorded for the parent."""
    die_with_parent()
    with errors_recorded(folder):
        train(folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
