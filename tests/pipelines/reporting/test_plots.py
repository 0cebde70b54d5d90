"""The plots show every row of the frontier once, on the trajectory that it belongs to."""

import re
from collections.abc import Sequence

from summaries import Summary, parsed

from pipelines.reporting.plots.drawing import RANK_COLORS, color_of
from pipelines.reporting.plots.frontier_plot import outside, plot_frontier
from pipelines.reporting.plots.rank_plot import plot_ranks
from pipelines.reporting.plots.trajectories import ScoredPoint, Trajectory, trajectories

DOTTED_CONTROL_LINE = (
    r'<path d="[^"]*" clip-path="[^"]*" '
    r'style="fill: none; stroke-dasharray: 0.8[^"]*stroke: var\(--control'
)
CONTROL_LABEL = r"fill: var\(--control[^>]*>([^<]*)</text>"


def labels_of(points: Sequence[ScoredPoint]) -> list[str]:
    return [point.label for point in points]


def by_label(summary: Summary) -> dict[str, Trajectory]:
    return {trajectory.label: trajectory for trajectory in trajectories(parsed(summary))}


def test_every_row_of_the_frontier_is_on_one_trajectory(summary: Summary) -> None:
    drawn = []
    for trajectory in trajectories(parsed(summary)):
        drawn += labels_of(trajectory.points)
    assert sorted(drawn) == sorted(row["label"] for row in summary["frontier"])


def test_trajectories_start_at_their_base(summary: Summary) -> None:
    found = by_label(summary)
    quantized = summary["models"]["base-nf4"]["change"]["task_gain"]["mean"]
    assert found["control"].start == (0.0, 0.0)
    assert found["rank-16"].start == (quantized, 0.0)


def test_trajectories_have_snapshots_rates_and_truncations(summary: Summary) -> None:
    found = by_label(summary)
    for label in ("control", "rank-16"):
        assert [point.step for point in found[label].snapshots] == [5, 10]
        assert not found[label].truncated
    assert labels_of(found["rank-16"].rates) == ["rank-16 lr 0.0005"]
    assert labels_of(found["control"].rates) == ["control lr 0.0003"]
    assert [point.rank for point in found["rank-64"].truncated] == [8, 2]


def test_lora_control_starts_at_the_base_of_the_adapters(summary: Summary) -> None:
    summary["control"]["method"] = "lora"
    found = by_label(summary)
    assert found["control"].start == found["rank-16"].start


def test_another_rate_of_the_control_is_drawn_and_labeled(summary: Summary) -> None:
    put_control_near_rank_16(summary)
    lines, labels = drawn_for_control(summary)
    rows = [row for row in summary["frontier"] if row["label"] != "control lr 0.0003"]
    summary["frontier"] = rows
    fewer_lines, fewer_labels = drawn_for_control(summary)
    assert lines - fewer_lines == 1
    assert labels - fewer_labels == {"0.0003"}


def put_control_near_rank_16(summary: Summary) -> None:
    """Move the control, which is outside the plot, to where the adapters are."""
    [near] = [row for row in summary["frontier"] if row["label"] == "rank-16"]
    for row in summary["frontier"]:
        if row["label"].startswith("control"):
            row |= {"gain": near["gain"], "general": near["general"]}


def test_axes_are_scaled_to_the_adapters_and_name_what_is_outside(summary: Summary) -> None:
    [far] = [row for row in summary["frontier"] if row["label"] == "control"]
    far["gain"] = {"mean": 40.0, "low": 39.0, "high": 41.0}
    summary["models"]["control"]["total"]["task_gain"] = far["gain"]
    [name] = outside(parsed(summary))
    assert "(+40.000" in name
    ticks = re.findall(r'">(\d+)<', plot_frontier(parsed(summary)))
    assert "40" not in ticks
    put_control_near_rank_16(summary)
    assert outside(parsed(summary)) == []


def drawn_for_control(summary: Summary) -> tuple[int, set[str]]:
    """Return the number of dotted lines in the control's color, and the labels in that color."""
    svg = plot_frontier(parsed(summary))
    lines = re.findall(DOTTED_CONTROL_LINE, svg)
    return len(lines), set(re.findall(CONTROL_LABEL, svg))


def test_without_quantization_all_trajectories_start_at_zero(summary: Summary) -> None:
    del summary["models"]["base-nf4"]
    assert {trajectory.start for trajectory in trajectories(parsed(summary))} == {(0.0, 0.0)}


def test_color_of_a_rank_does_not_depend_on_the_order(summary: Summary) -> None:
    colors = [color_of(rank, [64, 4, 16]) for rank in (4, 16, 64)]
    assert colors == list(RANK_COLORS[:3])
    assert len({trajectory.color for trajectory in trajectories(parsed(summary))}) == 4


def test_no_gain_limit_is_drawn_if_the_control_did_not_learn(summary: Summary) -> None:
    assert "of the control's gain" in plot_frontier(parsed(summary))
    summary["models"]["control"]["total"]["task_gain"]["low"] = -0.1
    assert "of the control's gain" not in plot_frontier(parsed(summary))


def test_truncations_are_labeled(summary: Summary) -> None:
    svg = plot_frontier(parsed(summary))
    assert ">→ rank 8<" in svg
    assert ">→ rank 2<" in svg


def test_a_single_rank_is_drawn(summary: Summary) -> None:
    summary["frontier"] = [row for row in summary["frontier"] if row["label"] == "rank-16"]
    assert plot_ranks(parsed(summary)).count("<svg") == 1
    assert plot_frontier(parsed(summary)).count("<svg") == 1
