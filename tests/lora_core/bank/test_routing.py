"""The routing of rows to adapters: which tokens belong to a row, and which routings are refused."""

import pytest
import torch

from lora_core import RoutingError
from lora_core.bank.routing import BATCH, TOKENS, routing

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], {"dim": 2}, "cannot be routed along dimension 2"),
        (["a", None], {"lengths": [3]}, r"lengths=\[3\] do not fit 2 names"),
        (["a", None], {"lengths": []}, r"lengths=\[\] do not fit 2 names"),
        (["a", None], {"lengths": [3, -1]}, "none below 0"),
        ([], {}, "not all 0"),
    ],
)
def test_an_invalid_routing_is_refused(
    names: list[str | None], options: dict[str, object], message: str
) -> None:
    with pytest.raises(RoutingError, match=message):
        routing(names, **options)


def test_tokens_of_rows() -> None:
    """By hand: rows 0 and 2 of 3 rows with 2 tokens; tokens 0 and 2 of 2 packs with 3 tokens."""
    assert routing(["a", None, "a"], dim=BATCH).tokens("a", 6, CPU).tolist() == [0, 1, 4, 5]
    assert routing(["a", None, "a"], dim=TOKENS).tokens("a", 6, CPU).tolist() == [0, 2, 3, 5]
