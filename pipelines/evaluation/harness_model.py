"""The model as lm-eval sees it: likelihoods over shared prompts, windows of long texts, greedy answers.

Tokens are those of lm-eval's own `hf` model: context and answer as one text, blanks at the context's end with the answer.
A document that is longer than the model's context is noted and left out, where that model would cut it on the left.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from pipelines.errors import DataError
from pipelines.evaluation.generation import generate
from pipelines.evaluation.questions import too_long
from pipelines.evaluation.scoring import Score, score
from pipelines.evaluation.trees import build_prefix_tree, encode, group_by_prefix
from pipelines.models.checked import CheckedReader

TREE_TOKENS = 2048
"""Most tokens of a tree of several documents; each token is held against each, so that a wider one would cost more than it spares."""
LONGEST_WINDOW = 2048
"""Tokens of a window of a long text, where the model does not say what it takes."""
LONGEST_ANSWER = 256
"""Tokens of an answer where a task does not say; lm-eval's own figure."""
NOT_ASKED = (0.0, False)
Texts = tuple[str, str]
Tokens = dict[tuple[str, bool], list[int]]


class PackedModel(LM):  # type: ignore[misc]
    """Answers lm-eval's three requests.

    Attributes:
        left_out: (task, document) → why it is not asked.
        ended: (task, document) → whether each answer to it came to an end by itself.
    """

    def __init__(
        self,
        reader: CheckedReader,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        tokens: Tokens,
    ) -> None:
        """Wrap a model; `tokens` are those of texts that were asked of a model before, and are added to."""
        super().__init__()
        self.reader, self.tokenizer, self.context = reader, tokenizer, context
        self.left_out, self.ended = dict[tuple[str, int], str](), dict[tuple[str, int], bool]()
        self._tokens = tokens

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return, for each pair of context and answer, the answer's log-likelihood and whether it is greedy."""
        pairs = [request.args[:2] for request in requests]
        read = self._pairs(pairs)
        asked = [
            place
            for place, (ids, _) in enumerate(read)
            if not self._is_too_long(requests[place], len(ids) - 1)
        ]
        scores = self._scores(
            [read[place] for place in asked], [pairs[place][0] for place in asked]
        )
        found = {
            place: (one.log_likelihood, one.greedy)
            for place, one in zip(asked, scores, strict=True)
        }
        return [found.get(place, NOT_ASKED) for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each whole text, read in windows where it is longer than the context."""
        texts = [request.args[0] for request in requests]
        self._encode(texts)
        windows = [self._windows(self._of(text)) for text in texts]
        flat = [(before + ids, len(before)) for some in windows for before, ids in some]
        scores = iter(self._scores(flat, [str(place) for place in range(len(flat))]))
        return [sum(next(scores).log_likelihood for _ in some) for some in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the greedy answer to each prompt, cut where the task says."""
        self._encode([request.args[0] for request in requests])
        kinds: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            most, until = self._limits(request.args[1])
            if not self._is_too_long(request, len(self._of(request.args[0])) + most):
                kinds.setdefault((most, until), []).append(place)
        answers: dict[int, str] = {}
        for (most, until), places in kinds.items():
            written = generate(
                self.reader,
                self.tokenizer,
                [self._of(requests[place].args[0]) for place in places],
                most,
                until,
            )
            for place, one in zip(places, written, strict=True):
                document = requests[place].task_name, requests[place].doc_id
                answers[place], self.ended[document] = (
                    one.text,
                    one.ended and self.ended.get(document, True),
                )
        return [answers.get(place, "") for place in range(len(requests))]

    @property
    def _opening(self) -> int:
        """The token before a text that nothing comes before."""
        own = self.tokenizer.bos_token_id
        return int(own if own is not None else self.tokenizer.eos_token_id)

    def _scores(
        self, read: Sequence[tuple[list[int], int]], contexts: Sequence[str]
    ) -> list[Score]:
        """Score token sequences, each from a place on; those that share a context are read as one tree."""
        groups = list(group_by_prefix([ids for ids, _ in read], contexts, TREE_TOKENS))
        trees = [
            build_prefix_tree(
                [read[place][0] for place in group], [read[place][1] for place in group]
            )
            for group in groups
        ]
        if any(tree is None for tree in trees):
            raise DataError(
                "a document of an lm-eval task has an empty context or answer; leave it out of the task's data"
            )
        scores = score(self.reader, [tree for tree in trees if tree is not None])
        found = {
            place: one
            for group, some in zip(groups, scores, strict=True)
            for place, one in zip(group, some, strict=True)
        }
        return [found[place] for place in range(len(read))]

    def _pairs(self, pairs: Sequence[Texts]) -> list[tuple[list[int], int]]:
        """Return the tokens of each context with its answer, and where the answer begins."""
        self._encode(
            [
                text
                for context, answer in pairs
                if context
                for text in (context.rstrip(), context + answer)
            ]
        )
        self._encode([answer for context, answer in pairs if not context], special=False)
        return [self._pair(*pair) for pair in pairs]

    def _pair(self, context: str, answer: str) -> tuple[list[int], int]:
        if context:
            return self._of(context + answer), len(self._of(context.rstrip()))
        ids = self._tokens[(answer, False)]
        return (ids, 1) if ids[:1] == [self._opening] else ([self._opening, *ids], 1)

    def _encode(self, texts: Sequence[str], *, special: bool = True) -> None:
        """Note the tokens of texts; one that opens with the mark of a beginning is given no other."""
        for kind in (True, False):
            new = [
                text
                for text in texts
                if (special and not self._is_opened(text)) is kind
                and (text, special) not in self._tokens
            ]
            self._tokens |= {
                (text, special): ids
                for text, ids in encode(new, self.tokenizer, special=kind).items()
            }

    def _of(self, text: str) -> list[int]:
        return self._tokens[(text, True)]

    def _is_opened(self, text: str) -> bool:
        return text.startswith(str(self.tokenizer.decode([self._opening])))

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        longest = self.context or LONGEST_WINDOW
        cut = get_rolling_token_windows(
            token_list=ids, prefix_token=self._opening, max_seq_len=longest, context_len=1
        )
        return [make_disjoint_window(window) for window in cut]

    def _limits(self, settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
        """Return the longest answer and the texts that end one."""
        kwargs = normalize_gen_kwargs(settings, LONGEST_ANSWER)
        until = handle_stop_sequences(kwargs["until"], eos=None)
        return int(kwargs["max_gen_toks"]), tuple(text for text in until if text)

    def _is_too_long(self, request: Any, tokens: int) -> bool:
        """Tell whether the model cannot take so many tokens, and note the document then."""
        reason = too_long(tokens, self.context)
        if reason is not None:
            self.left_out[(request.task_name, request.doc_id)] = reason
        return reason is not None
