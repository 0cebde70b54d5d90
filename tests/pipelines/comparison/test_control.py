"""The description of the control reports how its rate was chosen, and where a better one may be."""

import json

import pytest

from pipelines.comparison.control import describe
from pipelines.config.sections import ControlSection


def section_with(*rates: float) -> ControlSection:
    return ControlSection(learning_rate=rates)


def test_a_single_rate() -> None:
    result = describe(section_with(1e-4), {})
    assert result.method == "full"
    assert result.rates == {}
    assert result.chosen == 1e-4
    assert result.words == (
        "The control is full fine-tuning at a learning rate of 0.0001, the only one tried."
    )


def test_the_rate_with_the_lowest_loss_is_chosen() -> None:
    rates = {3e-4: 2.65, 3e-5: 2.7, 1e-4: 2.61}
    result = describe(section_with(*rates), rates)
    assert result.rates == {"3e-05": 2.7, "0.0001": 2.61, "0.0003": 2.65}
    assert result.chosen == 1e-4
    assert result.words == (
        "The control is full fine-tuning at a learning rate of 0.0001, "
        "the best of 3 by the loss on the tuning examples "
        "(2.610; 2.700 at 3e-05, 2.650 at 0.0003)."
    )


@pytest.mark.parametrize(
    ("best", "note"),
    [
        (3e-5, "it is the lowest rate tried, and a lower one may be better."),
        (3e-4, "it is the highest rate tried, and a higher one may be better."),
    ],
)
def test_a_best_rate_at_the_end_of_the_range_is_reported(best: float, note: str) -> None:
    rates = dict.fromkeys((3e-5, 1e-4, 3e-4), 2.7)
    rates[best] = 2.5
    assert note in describe(section_with(*rates), rates).words


def test_a_lora_control() -> None:
    result = describe(ControlSection(method="lora", rank=256, learning_rate=(1e-3,)), {})
    assert result.method == "lora"
    assert (
        "an adapter of rank 256 over the adapters' own base, in place of full fine-tuning,"
        in result.words
    )


def test_no_control() -> None:
    result = describe(ControlSection(method="none"), {})
    assert (result.method, result.rates, result.chosen) == ("none", {}, None)
    assert result.words.startswith("There is no control")


def test_rates_with_unknown_losses_are_rejected() -> None:
    with pytest.raises(ValueError, match="has 2 rates and no loss is known; pass the loss of each"):
        describe(section_with(1e-4, 1e-5), {})


@pytest.mark.parametrize("loss", [float("inf"), float("nan"), None])
def test_a_rate_at_which_training_diverged_is_reported_and_not_chosen(loss: float | None) -> None:
    rates = {3e-3: loss, 1e-4: 2.7, 1e-3: 2.6}
    result = describe(section_with(*rates), rates)
    assert result.rates == {"0.0001": 2.7, "0.001": 2.6, "0.003": None}
    assert result.chosen == 1e-3
    assert result.words == (
        "The control is full fine-tuning at a learning rate of 0.001, "
        "the best of 3 by the loss on the tuning examples (2.600; 2.700 at 0.0001); "
        "training diverged at 0.003."
    )
    json.dumps(result.plain(), allow_nan=False)


def test_the_only_rate_that_did_not_diverge() -> None:
    rates = {1e-3: float("inf"), 1e-4: 2.7, 1e-2: None}
    words = describe(section_with(*rates), rates).words
    assert (
        ", the only one of 3 at which training did not diverge (a loss of 2.700); "
        "training diverged at 0.001, 0.01; " in words
    )
    assert words.endswith("it is the lowest rate tried, and a lower one may be better.")


def test_a_control_that_diverged_at_every_rate_is_rejected() -> None:
    message = r"diverged at every rate of control.learning_rate \(0.001, 0.01\); use lower ones"
    with pytest.raises(ValueError, match=message):
        describe(section_with(1e-2, 1e-3), {1e-2: float("inf"), 1e-3: None})
