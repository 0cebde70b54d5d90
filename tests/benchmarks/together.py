"""Compare several adapters trained together on one base with the same adapters one by one.

    python tests/benchmarks/together.py [--adapters 4] [--rounds 5] [--layers 30]

Every adapter has a separate batch in every step. "Together", all batches pass through the base as
one, each row with its adapter; "apart", each batch passes alone with its adapter. Both modes take
the same AdamW steps from the same initial state, alternating in one process, so a machine that
slows down affects both equally; the fraction of the cores that the steps got shows whether other
processes were running. Peak memory is measured for each mode in a separate process. The base is a
random Llama with the shapes of SmolLM2-135M in NF4, on the CPU.

The results go to build/together.json.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contestants import environment, threads
from rows import BUILD, GIB, Row, report, row
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lora_core import Bank, LoraConfig
from lora_core.files import write_json
from lora_core.training.losses import linear_cross_entropy

RESULT = BUILD / "together.json"
VOCABULARY = 49152
SIZES = ((1, 64), (2, 128))
"""Rows in the batch of each adapter, and tokens in each row."""
ADAPTER = LoraConfig(r=16, lora_alpha=32)


class Way:
    """Adapters on one base and their optimizer, ready to take steps."""

    def __init__(self, model: PreTrainedModel, adapters: int) -> None:
        self.bank = Bank(model)
        for number in range(adapters):
            self.bank.add(f"{number}", ADAPTER, seed=number)
        self.optimizer = torch.optim.AdamW(
            self.bank.parameter_groups(dict.fromkeys(self.bank.names, 1e-3)), weight_decay=0.0
        )

    def together(self, ids: Tensor) -> list[float]:
        """Take a step in one pass; ids are (adapters, rows, tokens)."""
        with self.bank.rows([name for name in self.bank.names for _ in range(ids.shape[1])]):
            losses = _losses(self.bank.model, ids)
            sum(losses).backward()  # type: ignore[union-attr]
        return self._stepped(losses)

    def apart(self, ids: Tensor) -> list[float]:
        """Take the same step, adapter by adapter."""
        losses = []
        for name, own in zip(self.bank.names, ids, strict=True):
            with self.bank.using(name):
                losses += _losses(self.bank.model, own[None])
                losses[-1].backward()
        return self._stepped(losses)

    def _stepped(self, losses: list[Tensor]) -> list[float]:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [loss.item() for loss in losses]


def main() -> None:
    """Measure every size, write and print the results; with --only, print one peak of memory."""
    options = parse_options()
    if options.only:
        way, size = Way(load(), options.adapters), SIZES[options.size]
        for step in range(2):
            getattr(way, options.only)(draw(options.adapters, size, step))
        print(own_peak())
        return
    save(options.layers)
    ways = {name: Way(load(), options.adapters) for name in ("together", "apart")}
    found = [one for number in range(len(SIZES)) for one in rows(ways, number, options)]
    write_json(RESULT, found)
    report(found)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=4, help="adapters that are trained")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each mode and size")
    parser.add_argument("--layers", type=int, default=30, help="blocks of the base")
    parser.add_argument(
        "--only",
        choices=("together", "apart"),
        help="take two steps of one mode and print the peak of memory",
    )
    parser.add_argument("--size", type=int, default=0, help="index of the batch size, with --only")
    return parser.parse_args()


def save(layers: int) -> None:
    """Write the base to disk; it is quantized when it is loaded."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(_folder())


def load() -> PreTrainedModel:
    """Return the base in NF4."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        _folder(), quantization_config=nf4, dtype=torch.float32
    ).train()
    return model


def draw(adapters: int, size: tuple[int, int], step: int) -> Tensor:
    """Return the tokens of a step, (adapters, rows, tokens)."""
    return torch.randint(
        0, VOCABULARY, (adapters, *size), generator=torch.Generator().manual_seed(step)
    )


def rows(ways: dict[str, Way], number: int, options: argparse.Namespace) -> list[Row]:
    """Take the steps of one size, alternating; the first of each mode warms up."""
    size = SIZES[number]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    difference, start = 0.0, (time.perf_counter(), time.process_time())
    for step in range(options.rounds + 1):
        ids = draw(options.adapters, size, step)
        order = ("together", "apart") if step % 2 else ("apart", "together")
        losses = {name: timed(getattr(ways[name], name), ids, seconds[name]) for name in order}
        difference = max(difference, *(abs(a - b) for a, b in zip(*losses.values(), strict=True)))
    share = (time.process_time() - start[1]) / (time.perf_counter() - start[0]) / threads()
    ratios = [
        apart / one
        for one, apart in zip(seconds["together"][1:], seconds["apart"][1:], strict=True)
    ]
    peaks = {name: peak(name, number, options.adapters) / GIB for name in ways}
    what = f"{size[0]} × {size[1]} tokens an adapter"
    return [
        *[
            row(f"{what}, {name}: step", "s", median(values[1:]))
            for name, values in seconds.items()
        ],
        row(f"{what}: speed together / apart", "×", median(ratios), at_least=1.0),
        *[row(f"{what}, {name}: peak memory", "GiB", value) for name, value in peaks.items()],
        row(f"{what}: largest difference of loss", "nats", difference, at_most=1e-3),
        # Below the goal, other processes were running.
        row(f"{what}: share of the cores", "", share, at_least=0.8),
    ]


def timed(take: Callable[[Tensor], list[float]], ids: Tensor, seconds: list[float]) -> list[float]:
    """Take a step, record its duration, and return its losses."""
    start = time.perf_counter()
    losses = take(ids)
    seconds.append(time.perf_counter() - start)
    return losses


def peak(name: str, number: int, adapters: int) -> int:
    """Return the peak memory of one mode in bytes, in a fresh process."""
    argv = [
        sys.executable,
        __file__,
        "--only",
        name,
        "--size",
        f"{number}",
        "--adapters",
        f"{adapters}",
    ]
    return int(
        subprocess.run(
            argv, env=environment(), check=True, capture_output=True, text=True
        ).stdout.split()[-1]
    )


def own_peak() -> int:
    """Return the peak memory of this process in bytes; getrusage can return the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")
    )


def _losses(model: Any, ids: Tensor) -> list[Tensor]:
    """Return the mean loss of each adapter; ids are (adapters, rows, tokens)."""
    hidden = model.model(input_ids=ids.flatten(0, 1), use_cache=False).last_hidden_state[:, :-1]
    targets, width = ids[..., 1:].flatten(1), hidden.shape[-1]
    own = hidden.reshape(len(ids), -1, width)
    return [
        linear_cross_entropy(h, model.lm_head.weight, t) / len(t)
        for h, t in zip(own, targets, strict=True)
    ]


def _folder() -> Path:
    return BUILD / "together"


if __name__ == "__main__":
    main()
