"""What the tests of the pipeline share: a tiny model, rows to learn from, and a machine that asks no hub."""

import json
from collections.abc import Callable, Iterator, Sequence
from math import log
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import hypothesis
import pytest
import torch
from tiny import save_pairs, save_tiny_model, tiny_recipe

Values = dict[str, Any]
hypothesis.settings.register_profile(
    "any machine", deadline=None
)  # a first call may load a library
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ask no hub, in this process or its children, and keep prepared rows out of the user's cache."""
    cache = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.setattr(
            huggingface_hub.constants, "HF_HUB_OFFLINE", True
        )  # read once, when the library was imported
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Let tests side by side not fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved two-layer model whose tokenizer has a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "plain", template=False)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty prompts with completions."""
    return save_pairs(tmp_path_factory.mktemp("rows") / "pairs.jsonl")


@pytest.fixture
def recipe_with() -> Callable[..., Values]:
    """Return a maker of a tiny recipe's plain values; a keyword is merged into its section, or takes its place."""

    def make(**changes: Any) -> Values:
        values = tiny_recipe(Path("models/tiny"), Path("pairs.jsonl"))
        merged = {
            name: {**values.get(name, {}), **change} if isinstance(change, dict) else change
            for name, change in changes.items()
        }
        return {**values, **merged}

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of rows as JSON lines."""

    def write(rows: list[Values], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def data_settings() -> Callable[..., Values]:
    """Return a maker of a recipe's data section as plain values."""

    def make(source: Path | str, **changes: Any) -> Values:
        defaults = {
            "revision": None,
            "split": "train",
            "group_column": None,
            "validation_examples": 8,
            "max_tokens": 64,
            "max_source_characters": 500,
        }
        return {"source": str(source), **defaults, **changes}

    return make


@pytest.fixture(scope="session")
def general_records() -> Callable[..., list[Values]]:
    """Return a maker of questions of two answers of four bytes, from the probability of each one's right answer."""

    def make(benchmark: str, probabilities: Sequence[float]) -> list[Values]:
        records = []
        for number, probability in enumerate(probabilities):
            gold = number % 2
            answers = [log(probability), log(1 - probability)]
            records.append(
                {
                    "kind": "general",
                    "id": f"{benchmark}/{number}",
                    "benchmark": benchmark,
                    "prompt_sha256": f"digest of {benchmark}/{number}",
                    "gold": gold,
                    "log_likelihoods": answers[::-1] if gold else answers,
                    "bytes": [4, 4],
                    "greedy": [False, False],
                }
            )
        return records

    return make


@pytest.fixture(scope="session")
def task_records() -> Callable[..., list[Values]]:
    """Return a maker of held-out examples, from the loss per token of each and the number of its tokens."""

    def make(losses: Sequence[float], tokens: Sequence[int] | None = None) -> list[Values]:
        counts = tokens or [10 + number % 3 for number in range(len(losses))]
        pairs = enumerate(zip(losses, counts, strict=True))
        return [
            {"kind": "task", "id": number, "nll": loss * count, "tokens": count}
            for number, (loss, count) in pairs
        ]

    return make
