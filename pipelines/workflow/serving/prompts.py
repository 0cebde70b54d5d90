"""The tokens of prompts, rendered as in training."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pipelines.data.conversation import Message
from pipelines.data.rendering.templates import ChatTemplate
from pipelines.evaluation.trees import encode


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a conversation up to where the assistant's answer begins.

    Args:
        tokenizer: with a chat template.
        messages: at least one.

    Raises:
        DataError: the template does not take these messages.
    """
    text = ChatTemplate(tokenizer).render(messages, opens_answer=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a plain text, with those that precede every text, such as BOS."""
    [ids] = encode([text], tokenizer).values()
    return ids
