"""The rows of the report's table of a grid."""

from dataclasses import dataclass

from pipelines.comparison.grid import AdapterSettings, GridSearch, GridTrial


@dataclass(frozen=True)
class GridRow:
    """One experiment of a grid."""

    label: str
    settings: AdapterSettings
    trials: tuple[GridTrial | None, ...]
    """At each halving; None after it was stopped."""
    survives: bool
    """Whether it was trained to the end."""

    @property
    def targets(self) -> str:
        """Adapted modules, as text."""
        names = self.settings.target_modules
        return names if isinstance(names, str) else ", ".join(names)


def grid_rows(grid: GridSearch | None) -> list[GridRow]:
    """Return the experiments of a grid: survivors first, then those that were stopped last.

    Args:
        grid: None for a recipe without one.
    """
    if grid is None:
        return []
    order = dict.fromkeys(trial.label for rung in reversed(grid.rungs) for trial in rung.trials)
    rows = []
    for label in order:
        trials = []
        for rung in grid.rungs:
            trial = next((one for one in rung.trials if one.label == label), None)
            trials.append(trial)
        rows.append(GridRow(label, grid.experiments[label], tuple(trials), label in grid.survivors))
    return rows
