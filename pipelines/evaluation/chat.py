"""General questions as chats: the loss of the right answer, and the distribution at each token.

The distributions of every model are kept, so that the distance between any two models, the
Kullback-Leibler divergence in nats per token, is computed afterwards from two files. float16 holds
a log-probability above -16 to 0.004.

Shapes: log_probabilities (N, V), one row for each scored token, in the order of the records.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipelines.comparison.record_types import ChatRecord, LeftOutRecord
from pipelines.data.conversation import Message
from pipelines.data.rendering.templates import ChatTemplate
from pipelines.errors import DataError
from pipelines.evaluation.benchmarks import chats
from pipelines.evaluation.items import Choice, Item
from pipelines.evaluation.questions import Question, left_out_record
from pipelines.evaluation.scoring import PACK_TOKENS, tree_pack
from pipelines.evaluation.trees import Tree, bin_pack
from pipelines.models.checked import CheckedReader

TENSOR = "log_probabilities"


def chat_items(
    tokenizer: PreTrainedTokenizerBase, count: int, seed: int, sampled: int
) -> list[Item]:
    """Return general questions in the base's chat template; none if it has no template.

    No other item repeats one of them.

    Args:
        tokenizer: of the base, whose chat template is used.
        count: number of questions.
        seed: of the recipe.
        sampled: number of items that `sample` draws of ARC-Easy.

    Raises:
        DataError: the template does not take a single question of a user.
    """
    if not tokenizer.chat_template or count == 0:
        return []
    items = []
    template = ChatTemplate(tokenizer)
    for name, question, answer in chats(count, seed, sampled):
        prompt = _rendered(template, question)
        choice = Choice(lead="", scored=answer)
        items.append(Item("chat", name, prompt, choices=(choice,), gold=0, kind="chat"))
    return items


@torch.inference_mode()
def chat_records(
    reader: CheckedReader, questions: Sequence[Question]
) -> tuple[list[ChatRecord | LeftOutRecord], Tensor]:
    """Return the records of chats, and the log-probabilities (N, V) in float16 of their `rows`.

    Args:
        reader: of the model.
        questions: one tree with one answer each; those that are left out get a record with the
            reason.
    """
    evaluated = [question for question in questions if question.left_out is None]
    trees = [question.tree for question in evaluated]
    tables, losses = _log_probabilities(reader, trees)
    found: list[ChatRecord | LeftOutRecord] = []
    scored = iter(zip(tables, losses, strict=True))
    row = 0
    for question in questions:
        if question.left_out is not None:
            found.append(left_out_record(question.item, question.left_out))
            continue
        table, loss = next(scored)
        found.append(_record(question.item, loss, first_row=row, tokens=len(table)))
        row += len(table)
    if not tables:
        return found, torch.empty(0, 0, dtype=torch.float16)
    return found, torch.cat(tables)


def _record(item: Item, loss: float, *, first_row: int, tokens: int) -> ChatRecord:
    return ChatRecord(
        id=item.id,
        benchmark=item.benchmark,
        prompt_sha256=item.prompt_sha256,
        nll=loss,
        tokens=tokens,
        rows=(first_row, first_row + tokens),
    )


def _log_probabilities(
    reader: CheckedReader, trees: Sequence[Tree]
) -> tuple[list[Tensor], list[float]]:
    """Return, for each tree, the log-probabilities of its answer, (tokens, V), and its NLL."""
    device = str(reader.model.device)
    tables = [torch.empty(0)] * len(trees)
    losses = [0.0] * len(trees)
    for indices in bin_pack(trees, PACK_TOKENS):
        pack = tree_pack([trees[index] for index in indices], device)
        logits = reader.logits(pack)
        table = logits.log_softmax(dim=1)
        chosen = table.gather(1, pack.targets[:, None])[:, 0]
        start = 0
        for index in indices:
            [answer] = trees[index].answers
            end = start + len(answer.targets)
            log_likelihood = chosen[start:end].sum()
            tables[index] = table[start:end].half().cpu()
            losses[index] = -float(log_likelihood)
            start = end
    return tables, losses


def _rendered(template: ChatTemplate, question: str) -> str:
    try:
        return template.render([Message("user", question)], opens_answer=True)
    except DataError as error:
        raise DataError(
            f"a single question of a user {error}; or set evaluation.chat_prompts to 0"
        ) from error
