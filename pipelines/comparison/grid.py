"""A search over a grid of experiments by successive halving: losses, differences, who continues.

Pure functions of the losses on the tuning examples.
"""

from collections.abc import Mapping, Sequence
from math import inf, isfinite

import numpy as np

from pipelines.comparison.resampling import Interval, ratio_interval
from pipelines.runtime.interfaces.results import TuneResult
from pipelines.runtime.interfaces.values import Values


class AdapterSettings(Values):
    """What distinguishes the adapters of a comparison."""

    rank: int
    learning_rate: float
    target_modules: str | tuple[str, ...]


class GridTrial(Values):
    """One experiment at a halving."""

    label: str
    tuning_loss: float | None
    """On the tuning examples, nats per supervised token; None if training diverged."""
    behind: Interval | None
    """Its loss minus the lowest one, paired by example; None for the best one and if training
    diverged."""
    continues: bool
    """Whether it is trained further."""


class GridRung(Values):
    """A halving."""

    step: int
    """Optimizer steps that each experiment had taken."""
    trials: tuple[GridTrial, ...]
    """The lowest loss first."""

    @property
    def continuing(self) -> tuple[str, ...]:
        """Labels of the experiments that are trained further."""
        return tuple(trial.label for trial in self.trials if trial.continues)


class GridSearch(Values):
    """How the experiments of a grid were searched."""

    experiments: dict[str, AdapterSettings]
    """Label → combination, in the order of the grid."""
    steps: int
    """Of a whole training."""
    rungs: tuple[GridRung, ...]
    """By step."""
    diverged: tuple[str, ...] = ()
    """Labels of the experiments whose training diverged after the last halving."""

    @property
    def survivors(self) -> tuple[str, ...]:
        """Labels of the experiments that were trained to the end, the lowest loss first."""
        return tuple(one for one in self.rungs[-1].continuing if one not in self.diverged)

    @property
    def steps_taken(self) -> int:
        """Steps of all trainings together, had none diverged."""
        taken = 0
        before = 0
        for rung in self.rungs:
            taken += len(rung.trials) * (rung.step - before)
            before = rung.step
        return taken + len(self.rungs[-1].continuing) * (self.steps - before)

    @property
    def exhaustive_steps(self) -> int:
        """Steps that training every experiment to the end would take."""
        return len(self.experiments) * self.steps


def halve(step: int, tuned: Mapping[str, TuneResult | None], kept: int) -> GridRung:
    """Compare experiments after equally many steps; the `kept` best ones continue.

    Args:
        step: optimizer steps taken.
        tuned: label → losses on the same examples, None if training diverged; at least one has
            them. Of equal losses, the first one is the better.
        kept: experiments that continue; fewer if fewer have not diverged.
    """
    tuned = {label: _finite(result) for label, result in tuned.items()}
    order = sorted(tuned, key=lambda label: _loss(tuned[label]))
    best = tuned[order[0]]
    assert best is not None, "at least one experiment has not diverged"
    trials = []
    for place, label in enumerate(order):
        result = tuned[label]
        behind = None
        if result is not None and place > 0:
            behind = _difference(result, best)
        trials.append(
            GridTrial(
                label=label,
                tuning_loss=None if result is None else result.tuning_loss,
                behind=behind,
                continues=place < kept and result is not None,
            )
        )
    return GridRung(step=step, trials=tuple(trials))


def _finite(result: TuneResult | None) -> TuneResult | None:
    """Return losses if they are finite, else None, as for a training that diverged."""
    return None if result is None or not isfinite(result.tuning_loss) else result


def _loss(result: TuneResult | None) -> float:
    """Return the loss by which experiments are ordered."""
    return inf if result is None else result.tuning_loss


def _difference(result: TuneResult, best: TuneResult) -> Interval:
    """Return the loss of an experiment minus that of the best one, in nats per token."""
    losses = _as_array(result.losses) - _as_array(best.losses)
    return ratio_interval(losses, _as_array(result.tokens))


def _as_array(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)
