"""The page shows the losses of evaluated trainings, and nothing about them otherwise."""

from pathlib import Path

from browser.report_parser import ReportParser, render
from summaries import Summary, parsed

from pipelines.reporting.plots.loss_curves import loss_curves, plot_losses

LOSSES = ((5, 3.25, 3.5), (10, 3.125, 3.0), (15, 3.5, 2.5))
"""Step, held-out loss and training loss."""


def evaluate(summary: Summary, label: str) -> None:
    """Add evaluations to the training of a model."""
    losses = [
        {"step": step, "eval_loss": held_out, "train_loss": trained}
        for step, held_out, trained in LOSSES
    ]
    summary["models"][label]["training"]["result"]["held_out"] = {
        "losses": losses,
        "best_step": 10,
        "best_eval_loss": 3.125,
        "stopped_early": label == "control",
        "examples": 12,
    }


def test_an_evaluated_training_is_drawn_and_listed(summary: Summary, tmp_path: Path) -> None:
    labels = ("control", "rank-16")
    for label in labels:
        evaluate(summary, label)
    text, found = render(summary, tmp_path / "report.html")
    assert text.count('<svg role="img" aria-label="Training and held-out loss by step"') == 1
    assert len(found.identifiers) == len(set(found.identifiers))
    assert "control: step 10, stopped early" in text
    assert "rank-16: step 10\n" in text or "rank-16: step 10<" in text
    for label in labels:
        for step, held_out, _ in LOSSES:
            cell = f'data-model="{label}" data-figure="eval_loss@{step}" data-value="{held_out}"'
            assert text.count(cell) == 1
    colors = [curve.color for curve in loss_curves(parsed(summary))]
    assert len(set(colors)) == 2


def test_a_page_without_evaluations_has_no_loss_plot(page: tuple[str, ReportParser]) -> None:
    text, _ = page
    assert "plot-losses" not in text
    assert plot_losses([]) == ""


def test_a_single_evaluation_is_drawn(summary: Summary) -> None:
    evaluate(summary, "rank-4")
    held_out = summary["models"]["rank-4"]["training"]["result"]["held_out"]
    held_out |= {"losses": held_out["losses"][1:2]}
    assert plot_losses(loss_curves(parsed(summary))).count("<svg") == 1
