"""General questions put as chats: the loss of the right answer, and what the model expects at each of its tokens.

The distributions of every model are kept, so that how far any model has moved from any other, the Kullback-Leibler
divergence in nats per token, is computed afterwards from two files. float16 holds a log-probability above -16 to 0.004.

Shapes: log_probabilities (N, V), one row for each scored token, in the order of the records.
"""

from collections.abc import Sequence

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipelines.errors import DataError
from pipelines.evaluation.benchmarks import chats
from pipelines.evaluation.items import Choice, Item
from pipelines.evaluation.questions import Question, Record, head, left_out
from pipelines.evaluation.scoring import PACK_TOKENS, tree_pack
from pipelines.evaluation.trees import packs
from pipelines.models.checked import CheckedReader

TENSOR = "log_probabilities"


def chat_items(
    tokenizer: PreTrainedTokenizerBase, count: int, seed: int, sampled: int
) -> list[Item]:
    """Return general questions in the base's chat template, none of which is asked otherwise; none without a template.

    Raises:
        DataError: the template takes no question of a user.
    """
    if not tokenizer.chat_template or count == 0:
        return []
    return [
        Item("chat", name, _rendered(tokenizer, question), (Choice("", answer),), 0, "chat")
        for name, question, answer in chats(count, seed, sampled)
    ]


@torch.inference_mode()
def chat_records(
    reader: CheckedReader, questions: Sequence[Question]
) -> tuple[list[Record], Tensor]:
    """Return the records of chats, and the log-probabilities (N, V) in float16 that their `rows` point into."""
    asked = [question for question in questions if question.left_out is None]
    tables: dict[int, Tensor] = {}
    figures: dict[int, Record] = {}
    for places in packs([question.tree for question in asked], PACK_TOKENS):
        group = [asked[place].tree for place in places]
        pack = tree_pack(group, str(reader.model.device))
        table = reader.logits(pack).log_softmax(dim=1)
        chosen = table.gather(1, pack.targets[:, None])[:, 0]
        counts = [len(tree.answers[0].targets) for tree in group]
        for place, rows, values in zip(
            places, table.split(counts), chosen.split(counts), strict=True
        ):
            tables[place], figures[place] = (
                rows.half().cpu(),
                {"nll": -float(values.sum()), "tokens": len(values)},
            )
    ends = (
        torch.tensor([0, *(len(tables[place]) for place in range(len(asked)))]).cumsum(0).tolist()
    )
    answered = iter(
        [
            {**head(one.item), **figures[place], "rows": ends[place : place + 2]}
            for place, one in enumerate(asked)
        ]
    )
    found = [left_out(one) if one.left_out is not None else next(answered) for one in questions]
    return found, torch.cat(
        [tables[place] for place in range(len(asked))]
    ) if asked else torch.empty(0, 0, dtype=torch.float16)


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
    except (TypeError, ValueError, TemplateError) as error:
        raise DataError(
            f"the base's chat template takes no single question of a user ({error}); mend it, or set evaluation.chat_prompts to 0"
        ) from error
