"""The report says how the control was found, and where a better rate may lie."""

import json

import pytest

from pipelines.comparison.control import describe
from pipelines.config.sections import ControlSection


def test_one_rate_was_not_looked_for() -> None:
    found = describe(ControlSection(learning_rate=(1e-4,)), {})
    assert (found["method"], found["rates"], found["chosen"]) == ("full", {}, 1e-4)
    assert (
        found["words"]
        == "The control is full fine-tuning at a learning rate of 0.0001, the only one tried."
    )


def test_of_several_rates_the_one_of_the_lowest_loss_is_chosen() -> None:
    rates = {3e-4: 2.65, 3e-5: 2.7, 1e-4: 2.61}
    found = describe(ControlSection(learning_rate=tuple(rates)), rates)
    assert (found["rates"], found["chosen"]) == (
        {"3e-05": 2.7, "0.0001": 2.61, "0.0003": 2.65},
        1e-4,
    )
    assert found["words"] == (
        "The control is full fine-tuning at a learning rate of 0.0001, the best of 3 by the loss on examples kept for that "
        "(2.610; 2.700 at 3e-05, 2.650 at 0.0003)."
    )


@pytest.mark.parametrize(("best", "end"), [(3e-5, "lowest"), (3e-4, "highest")])
def test_a_best_rate_at_the_end_of_those_tried_is_called_so(best: float, end: str) -> None:
    rates = {rate: 2.5 if rate == best else 2.7 for rate in (3e-5, 1e-4, 3e-4)}
    assert (
        f"it is the {end} tried, and a better one may lie beyond."
        in describe(ControlSection(learning_rate=tuple(rates)), rates)["words"]
    )


def test_a_control_by_lora_is_called_so() -> None:
    found = describe(ControlSection(method="lora", rank=256, learning_rate=(1e-3,)), {})
    assert found["method"] == "lora"
    assert (
        "an adapter of rank 256 over the adapters' own base, in place of full fine-tuning,"
        in found["words"]
    )


def test_no_control_is_called_so() -> None:
    found = describe(ControlSection(method="none"), {})
    assert (found["method"], found["rates"], found["chosen"]) == ("none", {}, None)
    assert found["words"].startswith("There is no control")


def test_rates_whose_losses_are_not_known_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"names 2 rates and no loss is known; pass the loss of each"
    ):
        describe(ControlSection(learning_rate=(1e-4, 1e-5)), {})


@pytest.mark.parametrize("loss", [float("inf"), float("nan"), None])
def test_a_rate_at_which_training_diverged_is_named_and_not_chosen(loss: float | None) -> None:
    rates = {3e-3: loss, 1e-4: 2.7, 1e-3: 2.6}
    found = describe(ControlSection(learning_rate=tuple(rates)), rates)
    assert (found["rates"], found["chosen"]) == ({"0.0001": 2.7, "0.001": 2.6, "0.003": None}, 1e-3)
    assert found["words"] == (
        "The control is full fine-tuning at a learning rate of 0.001, the best of 3 by the loss on examples kept for that "
        "(2.600; 2.700 at 0.0001); training diverged at 0.003."
    )
    json.dumps(found, allow_nan=False)


def test_a_rate_that_alone_did_not_diverge_is_called_so() -> None:
    rates = {1e-3: float("inf"), 1e-4: 2.7, 1e-2: None}
    words = describe(ControlSection(learning_rate=tuple(rates)), rates)["words"]
    assert (
        ", the only one of 3 at which training did not diverge (a loss of 2.700); training diverged at 0.001, 0.01; "
        in words
    )
    assert words.endswith("it is the lowest tried, and a better one may lie beyond.")


def test_a_control_that_diverged_at_every_rate_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"diverged at every rate of control.learning_rate \(0.001, 0.01\); name lower ones",
    ):
        describe(ControlSection(learning_rate=(1e-2, 1e-3)), {1e-2: float("inf"), 1e-3: None})
