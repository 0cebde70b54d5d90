"""Train one adapter, or the full fine-tuning control.

    accelerate launch … -m pipelines.training.train STAGE_FOLDER

`accelerate launch` starts a child process on each rank. Adapter and control learn from the same
packs in the same order, so they see the same tokens.

    metrics.jsonl    one line per step, from rank 0
    checkpoints/     from which a stopped run resumes; removed when it ends, except for a trial of
                     a grid, which ends early and whose whole training resumes from the last one
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
from accelerate import Accelerator

from lora_core import LoraConfig
from pipelines.models.hardware import detect_for_training
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
from pipelines.training.phase_timer import PhaseTimer, clock_of
from pipelines.training.rank_errors import gather_hostnames, name_lost_contact, name_lost_rank
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
    data: Path
    """Folder of the prepared data."""
    options: TrainOptions
    run: Run
    engine: Engine
    facts: TrainingFacts
    """How it is computed, for its result."""
    config: LoraConfig | None
    """The adapter's; None for full fine-tuning."""
    first_step: int
    """Steps taken before this process, 0 without a checkpoint."""
    log: Log
    checkpoints: Checkpoints
    evaluations: Evaluations | None
    """None without `evaluate_every`, and for a finished run that only lacks snapshots."""

    @property
    def is_trial(self) -> bool:
        """Whether it is the beginning of a training, which may continue from its checkpoint."""
        return self.inputs.first_steps is not None

    @property
    def stops_early(self) -> bool:
        """Whether the held-out loss has not improved for too long."""
        return self.evaluations is not None and self.evaluations.should_stop

    @property
    def last_step(self) -> int:
        """Number of steps after which it ends, unless it stops early."""
        return self.inputs.first_steps or len(self.run.steps)


def train(folder: Path) -> None:
    """Train as the stage's inputs define, from the newest checkpoint if any; write the result.

    If the run is already finished but lacks snapshots, it trains again up to the last missing one,
    and its result stays as it is.

    Args:
        folder: of the stage.
    """
    result = read_result(folder, TRAIN)
    training = _prepare_training(folder, is_finished=result is not None)
    engine = training.engine
    snapshots = training.options.snapshots
    if engine.is_first:
        announce(folder, training.facts, ranks=engine.ranks, first=training.first_step)

    hosts = gather_hostnames()
    with training.checkpoints, name_lost_rank(hosts, engine.timer):
        if result is None:
            taken = _train_steps(training, training.last_step, snapshots)
            if training.is_trial:
                _save_last_checkpoint(training, taken)
        else:
            missing = missing_snapshots(folder, snapshots)
            _train_steps(training, max(missing, default=0), missing)
    if result is None:
        result = _finish(training)
        copy_tokenizer(engine, training.config, training.data, folder)
    declare_done(folder, engine, training.config, result)
    if engine.is_first and not training.is_trial:
        training.checkpoints.discard()


def _prepare_training(folder: Path, *, is_finished: bool) -> Training:
    """Load base and data, build the engine, and resume. A collective: every rank calls it.

    Args:
        folder: of the stage.
        is_finished: the stage has its result, so nothing is logged or evaluated.
    """
    inputs, paths = read_inputs(folder, TRAIN)
    options = read_options(folder)
    base = paths.required("base")
    data = paths.required("data")
    hardware = detect_for_training(inputs.training.dtype)
    accelerator = start(inputs.seed, options, hardware, full=inputs.method == "full")
    model = load_base(base, inputs, hardware)
    run = prepare_run(accelerator, inputs, data, _start_timer(folder, accelerator))
    held_out = None if is_finished else load_held_out(run, inputs, data)

    checkpoint = select_checkpoint(accelerator.is_main_process, folder / CHECKPOINTS)
    config = adapt(model, inputs, examples=run.examples(), base=base, checkpoint=checkpoint)
    engine, facts = build_engine(run, model, inputs, options, hardware, VerificationCache(folder))
    checkpoints = _checkpoints(folder, options, facts.trained_weights)
    first = resume(engine, checkpoint, inputs.seed)
    log = Log(folder / METRICS if engine.is_first and not is_finished else None, first)
    evaluations = resume_evaluations(
        inputs, held_out, checkpoints=checkpoints.folder, log=log, first=first
    )
    return Training(
        folder=folder,
        inputs=inputs,
        data=data,
        options=options,
        run=run,
        engine=engine,
        facts=facts,
        config=config,
        first_step=first,
        log=log,
        checkpoints=checkpoints,
        evaluations=evaluations,
    )


def _start_timer(folder: Path, accelerator: Accelerator) -> PhaseTimer:
    heartbeat = HeartbeatWriter(folder, accelerator.process_index, gethostname())
    return PhaseTimer(heartbeat, clock_of(accelerator.device))


def _finish(training: Training) -> TrainResult:
    """Save the trained weights; return the result, of which rank 0 has all.

    A collective: every rank calls it.
    """
    peak = peak_memory_of_all_ranks(training.engine)
    _save_output(training)
    saved = SavedWeights(file_bytes=0)
    held_out = None
    if training.engine.is_first:
        saved = saved_weights(training.folder, training.config, with_spectrum=not training.is_trial)
        if training.evaluations is not None and not training.is_trial:
            examples = len(training.evaluations.examples.dataset)
            held_out = held_out_losses(training.log.rows, len(training.run.steps), examples)
    return TrainResult(
        facts=training.facts,
        totals=training.log.totals(),
        saved=saved,
        held_out=held_out,
        checkpoints=training.checkpoints.metrics,
        peak_memory_bytes=peak,
    )


def _save_output(training: Training) -> None:
    """Save the last weights, or, if the training was evaluated, the best ones. A collective.

    Those of a trial are the last ones in any case: trials are compared after equally many steps.
    """
    evaluations = training.evaluations
    if evaluations is None or training.is_trial:
        write_trained(training.engine, training.config, training.inputs, training.folder)
        return
    if training.engine.is_first:
        evaluations.weights.publish(evaluations.best_step, training.folder, training.config)
        taken = len(training.log.rows)
        note(training.folder, evaluations.describe(taken, len(training.run.steps)))
    training.engine.wait_for_everyone()


def _checkpoints(folder: Path, options: TrainOptions, trained_weights: int) -> Checkpoints:
    return Checkpoints(
        folder / CHECKPOINTS,
        options.checkpoints_kept,
        options.checkpoint_time_fraction,
        trained_weights,
    )


def _train_steps(training: Training, last: int, snapshots: Sequence[int]) -> int:
    """Take the steps up to `last`; evaluate, and save snapshots and checkpoints.

    Every rank calls it: steps, evaluations, snapshots and checkpoints are collectives, and every
    rank stops early after the same step. A row is written after its evaluation, and a checkpoint
    after its row, so a run that resumes has every evaluation before its checkpoint.

    Args:
        training: takes the steps.
        last: number of steps after which it ends.
        snapshots: numbers of steps after which the weights are saved.

    Returns:
        how many steps have been taken, with those before this process.
    """
    run, engine = training.run, training.engine
    done = training.first_step
    while done < last and not training.stops_early:
        step = done
        done += 1
        with name_memory_limit(f"step {done}", partial(run.largest_own_pack, step)):
            row = train_step(run, engine, step)
        training.log.write(row | _evaluate(training, done))
        if done in snapshots:
            with run.timer.phase("snapshot"):
                parent = training.folder / snapshot(done)
                write_trained(engine, training.config, training.inputs, parent)
        is_due = done % training.options.checkpoint_every == 0
        if is_due and done < last and not training.stops_early:
            with run.timer.phase("checkpoint"):
                _save_checkpoint(training, done)
    return done


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


def _save_last_checkpoint(training: Training, step: int) -> None:
    """Save the checkpoint from which the whole training continues, whatever time it takes."""
    if step > training.first_step:
        with training.run.timer.phase("checkpoint"):
            loss = training.log.mean_loss(training.options.checkpoint_every)
            training.checkpoints.save(training.engine, step, loss)


def main(folder: Path) -> None:
    """Train in this child process; an error is recorded for the parent."""
    die_with_parent()
    with errors_recorded(folder), name_lost_contact():
        train(folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
