"""The rules for settings that depend on the number of optimizer steps. Imports no torch."""

from pipelines.config.experiments_section import ExperimentsSection
from pipelines.config.halving import rungs
from pipelines.config.sections import FrontierSection, TrainingSection


def check_steps(
    training: TrainingSection, frontier: FrontierSection, experiments: ExperimentsSection
) -> None:
    """Check the settings that depend on the number of steps, which is known.

    Args:
        training: with its number of steps.
        frontier: with the snapshots.
        experiments: with the grid.

    Raises:
        ValueError: a setting breaks its rule.
    """
    steps = training.total_steps
    warmup = training.warmup_steps
    if warmup >= steps:
        raise ValueError(
            f"training.warmup_steps {warmup} takes all of training.steps {steps}, so that the "
            f"peak rate is never reached; use at most {steps - 1}, or more steps"
        )
    late = [step for step in frontier.snapshots if step >= steps]
    if late:
        raise ValueError(
            f"frontier.snapshots names step {late[0]} of training.steps {steps}; use earlier ones"
        )
    if experiments.is_grid:
        rungs(experiments.size, experiments.kept, steps, warmup)
    _check_evaluations(steps, training.evaluate_every, training.early_stopping_patience)


def _check_evaluations(steps: int, every: int | None, patience: int | None) -> None:
    """Check that evaluations take place, and that early stopping can stop the training."""
    if every is None:
        return
    if every > steps:
        raise ValueError(
            f"training.evaluate_every {every} is more than training.steps {steps}; use at most "
            f"{steps}, or more steps"
        )
    if patience is None:
        return
    earliest = every * (1 + patience)
    if earliest >= steps:
        raise ValueError(
            f"training.early_stopping_patience {patience} has no effect: with "
            f"training.evaluate_every {every} it stops a training after step {earliest} at the "
            f"earliest, and training.steps is {steps}; evaluate more often, or lower the patience"
        )


def check_early_stopping(training: TrainingSection, frontier: FrontierSection) -> None:
    """Check that every snapshot will exist: a training that may stop early promises none.

    Args:
        training: may stop early.
        frontier: with the snapshots.

    Raises:
        ValueError: the recipe sets both.
    """
    if training.early_stopping_patience is not None and frontier.snapshots:
        raise ValueError(
            f"frontier.snapshots names step {frontier.snapshots[0]}, which a training with "
            f"training.early_stopping_patience {training.early_stopping_patience} may not reach; "
            "remove one of them"
        )
