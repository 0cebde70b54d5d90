"""Which turns of a conversation are supervised.

By default every answer is, or only the last one, or every turn. A greeting, which is an answer
before the first question, is part of the prompt unless its row declares that it is learned. Turns
after the last supervised one have no influence on it and are left out.
"""

from collections.abc import Sequence
from typing import Literal

from pipelines.data.conversation import Message
from pipelines.data.schemas.messages import Turn
from pipelines.errors import DataError


def first_question(turns: Sequence[Turn]) -> int:
    """Return the index of the first turn that is answered; their number if there is none."""
    for index, turn in enumerate(turns):
        if turn.role in ("user", "tool"):
            return index
    return len(turns)


def supervise_turns(
    turns: Sequence[Turn], *, start: int, supervise: Literal["assistant", "last", "all"]
) -> tuple[Message, ...]:
    """Return the messages up to the last supervised one.

    Args:
        turns: of the conversation.
        start: index of the first turn that is learned if it is an answer.
        supervise: which turns are learned.

    Raises:
        DataError: no turn is supervised.
    """
    learned = [
        _is_learned(turn, index >= start, supervise == "all") for index, turn in enumerate(turns)
    ]
    if supervise == "last":
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        last = answers[-1:]
        learned = [is_on and index in last for index, is_on in enumerate(learned)]
    if True not in learned:
        raise _nothing_learned(turns)
    end = len(turns) - learned[::-1].index(True)
    return tuple(
        Message(turn.role, turn.content, is_on, turn.fields)
        for turn, is_on in zip(turns[:end], learned, strict=False)
    )


def _is_learned(turn: Turn, is_after_prompt: bool, is_all: bool) -> bool:
    if turn.learn is not None:
        return turn.learn
    return is_all or (is_after_prompt and turn.role == "assistant")


def _nothing_learned(turns: Sequence[Turn]) -> DataError:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        reason = "has no message of role 'assistant'"
    elif all(turn.learn is False for turn in turns if turn.role == "assistant"):
        reason = "has only messages of role 'assistant' whose weight is 0"
    else:
        reason = f"has the roles {', '.join(roles)}, and no answer that is learned"
    return DataError(
        f"{reason}, so it has nothing to learn from; add an answer after a question or remove the "
        "row"
    )
