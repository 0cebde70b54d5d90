"""Compare the pipeline with the model's own forward, for one tiny random family with an adapter.

The reference shares no code with `pipelines.models`: each example alone, transformers' eager
attention, a log-softmax over all logits, autograd through all of it, and `generate` on each prompt
alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from families.configs import VOCABULARY, tiny_config
from lora_core import LoraConfig, inject
from lora_core.errors import LoraError
from pipelines.errors import BaseModelError
from pipelines.evaluation.generation import generate
from pipelines.evaluation.scoring import score
from pipelines.evaluation.trees import build_prefix_tree
from pipelines.models.checked import CheckedReader
from pipelines.models.equivalence import verified_reader
from pipelines.models.measurement import Probe
from pipelines.models.packs import pack
from pipelines.models.support import check_supported
from pipelines.training.objective import Objective

SEED, SHARPER, NEW_TOKENS = 3, 0.1, 8
LENGTHS = (9, 40, 17, 4)
"""Tokens of the examples; the windows of the configs have 8."""
Example = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The result of one family."""

    path: str
    """packed, one by one, refused, or unbuilt.

    "unbuilt" means that transformers cannot build the model or run it on text.
    """
    reason: str = ""
    """Why it is refused or unbuilt, or not packed."""
    loss: float = 0.0
    """Largest difference of an example's mean loss, nats per token."""
    gradient: float = 0.0
    """Largest difference of a trained tensor's gradient, relative to its norm."""
    tree: float = 0.0
    """Largest difference of an answer's log-likelihood, nats."""
    answers: int = 0
    """Greedy answers that differ."""


class Tokens:
    """A fake tokenizer: words are numbers."""

    eos_token_id = None
    pad_token_id = 0

    def decode(self, row: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, row))

    def batch_decode(
        self, rows: Sequence[list[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        return [self.decode(row) for row in rows]


def measure(name: str) -> Measured:
    """Build a family and compare."""
    try:
        config = tiny_config(name)
        check_supported(config)
        model = built(config)
    except BaseModelError as error:
        return Measured("refused", str(error))
    except Exception as error:  # noqa: BLE001 - any error of transformers
        return Measured(
            "unbuilt", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        )
    examples = drawn()
    try:
        config = LoraConfig(r=2, lora_alpha=4)
        inject(model, config, seed=SEED)
    except LoraError as error:
        return Measured("refused", str(error))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    try:
        reader, verified = verified_reader(
            model,
            [Probe(pack(examples[1:], "cpu"), gradient=True)],
            trained={name: one for name, one in model.named_parameters() if one.requires_grad},
        )
    except BaseModelError as error:
        return Measured("refused", str(error))
    losses, gradients = reference(model, examples, trained)
    found = [
        Objective(model, reader)(pack([one], "cpu")) / sum(one["supervised"]) for one in examples
    ]
    packed = torch.autograd.grad(
        Objective(model, reader)(pack(examples, "cpu")), trained, allow_unused=True
    )
    return Measured(
        path=verified.path + (", own head" if verified.own_head else ""),
        reason="; ".join(verified.rejected),
        loss=max(abs(float(a.detach()) - b) for a, b in zip(found, losses, strict=True)),
        gradient=max(relative(a, b) for a, b in zip(gradients, packed, strict=True)),
        tree=tree_difference(model),
        answers=answers_that_differ(model),
    )


def built(config: Any) -> PreTrainedModel:
    """Return a random model with weights so large that attention changes every logit."""
    torch.manual_seed(SEED)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=SHARPER)
    model.requires_grad_(True)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 43)[None], use_cache=False)
    return model


def drawn() -> list[Example]:
    """Return examples of random tokens; the first third of each is its prompt."""
    generator = torch.Generator().manual_seed(SEED)
    rows = [
        torch.randint(3, VOCABULARY - 5, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]
    return [
        {"input_ids": row, "supervised": [place > len(row) // 3 for place in range(len(row))]}
        for row in rows
    ]


def own_log_likelihoods(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Return the log-likelihoods (T, V) after each token by the model's own forward."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=1)


def reference(
    model: PreTrainedModel, examples: list[Example], trained: list[Tensor]
) -> tuple[list[float], list[Tensor | None]]:
    """Return each example's mean loss, and the gradients of the summed loss of all."""
    total = torch.zeros(())
    means = []
    for example in examples:
        targets = torch.tensor(example["input_ids"])[1:]
        counted = torch.tensor(example["supervised"])[1:]
        loss = (
            -own_log_likelihoods(model, example["input_ids"])[:-1]
            .gather(1, targets[:, None])[:, 0][counted]
            .sum()
        )
        means.append(float(loss.detach()) / int(counted.sum()))
        total = total + loss
    return means, list(torch.autograd.grad(total, trained, allow_unused=True))


def relative(wanted: Tensor | None, found: Tensor | None) -> float:
    if wanted is None or float(wanted.norm()) == 0:
        return 0.0
    return float("inf") if found is None else float((wanted - found).norm() / wanted.norm())


@torch.no_grad()
def tree_difference(model: PreTrainedModel) -> float:
    """Compare answers that share a prompt longer than the windows with each answer alone."""
    generator = torch.Generator().manual_seed(SEED + 1)
    prompt, *answers = (
        torch.randint(3, VOCABULARY - 5, (length,), generator=generator).tolist()
        for length in (20, 12, 3, 15)
    )
    answers.append(answers[0][:4] + answers[1])  # shares a prefix with another
    wholes = [prompt + answer for answer in answers]
    tree = build_prefix_tree(wholes, [len(prompt)] * len(wholes))
    assert tree is not None
    [found] = score(CheckedReader(model), [tree])
    wanted = [
        own_log_likelihoods(model, ids[:-1])[len(prompt) - 1 :]
        .gather(1, torch.tensor(ids[len(prompt) :])[:, None])
        .sum()
        for ids in wholes  # the last token predicts nothing and is not read
    ]
    return max(
        abs(one.log_likelihood - float(other)) for one, other in zip(found, wanted, strict=True)
    )


@torch.no_grad()
def answers_that_differ(model: PreTrainedModel) -> int:
    """Compare greedy answers to prompts of several lengths with each prompt alone."""
    generator = torch.Generator().manual_seed(SEED + 2)
    prompts = [
        torch.randint(3, VOCABULARY - 5, (length,), generator=generator).tolist()
        for length in (5, 21, 12)
    ]
    found = generate(CheckedReader(model), Tokens(), prompts, NEW_TOKENS)  # type: ignore[arg-type]
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": ends,
    }
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        wanted.append(
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
                0, len(prompt) :
            ].tolist()
        )  # type: ignore[operator]
    named = ends if isinstance(ends, list) else [ends]
    pairs = [
        (without_padding(one.text.split()), without_padding(map(str, before_end(row, named))))
        for one, row in zip(found, wanted, strict=True)
    ]
    return sum(
        a != b and not is_tie(model, prompt, a, b)
        for prompt, (a, b) in zip(prompts, pairs, strict=True)
    )


def before_end(tokens: list[int], ends: list[int | None]) -> list[int]:
    """Return the tokens before the first one that ends an answer."""
    positions = [index for index, token in enumerate(tokens) if token in ends]
    return tokens[: min(positions, default=len(tokens))]


def is_tie(model: PreTrainedModel, prompt: list[int], found: list[str], wanted: list[str]) -> bool:
    """Return whether two answers diverge at tokens of equal likelihood, up to rounding."""
    place = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    if place is None:
        return False
    after = own_log_likelihoods(model, prompt + [int(word) for word in wanted[:place]])[-1]
    return float((after[int(found[place])] - after[int(wanted[place])]).abs()) < 1e-5


def without_padding(words: Iterable[str]) -> list[str]:
    """Return the words of an answer without the padding after its end."""
    kept = list(words)
    while kept and kept[-1] == "0":
        kept.pop()
    return kept
