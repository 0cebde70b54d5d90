"""The model for lm-eval: likelihoods over shared prompts, windows of long texts, greedy answers.

Tokens are those of lm-eval's own `hf` model: context and answer as one text, blanks at the end of
the context belong to the answer. A document that exceeds the model's context is noted and left out,
while that model would truncate it on the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
"""Most tokens of a tree of several documents; a mask compares each token with each, so that a wider
tree would cost more than it saves."""
LONGEST_WINDOW = 2048
"""Tokens of a window of a long text, if the model's context is unknown."""
LONGEST_ANSWER = 256
"""Tokens of an answer if a task names no limit; lm-eval's default."""
LEFT_OUT = (0.0, False)
"""Placeholder result of a request that is left out."""
Tokens = dict[tuple[str, bool], list[int]]
"""(text, whether special tokens were added) → tokens."""


@dataclass(frozen=True)
class _LikelihoodRequest:
    """What a request of a likelihood gives."""

    context: str
    answer: str

    @classmethod
    def of(cls, request: Any) -> "_LikelihoodRequest":
        context, answer = request.args[:2]
        return cls(context, answer)

    @property
    def stripped_context(self) -> str:
        """The context without the blanks at its end, which belong to the answer."""
        return self.context.rstrip()

    @property
    def text(self) -> str:
        return self.context + self.answer


@dataclass(frozen=True)
class _Sequence:
    """A token sequence to score."""

    ids: list[int]
    start: int
    """First token that counts."""
    context: str
    """The text before that token; equal contexts share a tree."""


class _Limits(NamedTuple):
    """When an answer ends."""

    max_new_tokens: int
    until: tuple[str, ...]
    """Texts that end it."""


class PackedModel(LM):  # type: ignore[misc]
    """Answers lm-eval's three kinds of requests.

    Attributes:
        left_out: (task, document) → why it is left out.
        ended: (task, document) → whether each answer to it ended by itself.
    """

    def __init__(
        self,
        reader: CheckedReader,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        tokens: Tokens,
    ) -> None:
        """Wrap a model; `tokens` caches those of texts of models before, and is extended."""
        super().__init__()
        self.reader = reader
        self.tokenizer = tokenizer
        self.context = context
        self.left_out: dict[tuple[str, int], str] = {}
        self.ended: dict[tuple[str, int], bool] = {}
        self._tokens = tokens

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return each answer's log-likelihood after its context, and whether it is greedy."""
        pairs = [_LikelihoodRequest.of(request) for request in requests]
        self._encode_pairs(pairs)
        evaluated: dict[int, _Sequence] = {}
        for index, pair in enumerate(pairs):
            sequence = self._sequence(pair)
            tokens_read = len(sequence.ids) - 1
            if not self._is_too_long(requests[index], tokens_read):
                evaluated[index] = sequence
        scores = self._scores(list(evaluated.values()))
        found = [LEFT_OUT] * len(requests)
        for index, one in zip(evaluated, scores, strict=True):
            found[index] = (one.log_likelihood, one.greedy)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each text, read in windows if it exceeds the context."""
        texts = [request.args[0] for request in requests]
        self._encode(texts)
        sequences: list[_Sequence] = []
        text_of = list[int]()
        for index, text in enumerate(texts):
            windows = self._windows(self._tokens_of(text))
            for before, ids in windows:
                unique_context = str(len(sequences))
                sequences.append(_Sequence(before + ids, len(before), unique_context))
                text_of.append(index)
        scores = self._scores(sequences)
        log_likelihoods = [0.0] * len(texts)
        for index, one in zip(text_of, scores, strict=True):
            log_likelihoods[index] += one.log_likelihood
        return log_likelihoods

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the greedy answer to each prompt, cut off at the task's stop sequences."""
        contexts = [request.args[0] for request in requests]
        self._encode(contexts)
        texts = [""] * len(requests)
        for limits, indices in self._group_by_limits(requests).items():
            prompts = [self._tokens_of(contexts[index]) for index in indices]
            answers = generate(
                self.reader,
                self.tokenizer,
                prompts,
                limits.max_new_tokens,
                limits.until,
            )
            for index, answer in zip(indices, answers, strict=True):
                texts[index] = answer.text
                document = _document(requests[index])
                others_ended = self.ended.get(document, True)
                self.ended[document] = answer.ended and others_ended
        return texts

    def _group_by_limits(self, requests: Sequence[Any]) -> "dict[_Limits, list[int]]":
        """Return the indices of the requests that fit into the context, by their limits."""
        groups: dict[_Limits, list[int]] = {}
        for index, request in enumerate(requests):
            prompt, settings = request.args[:2]
            limits = _limits(settings)
            tokens = len(self._tokens_of(prompt)) + limits.max_new_tokens
            if not self._is_too_long(request, tokens):
                groups.setdefault(limits, []).append(index)
        return groups

    @property
    def _start_token(self) -> int:
        """The token before a text without a context."""
        bos = self.tokenizer.bos_token_id
        if bos is not None:
            return int(bos)
        return int(self.tokenizer.eos_token_id)

    def _scores(self, sequences: Sequence[_Sequence]) -> list[Score]:
        """Score token sequences; those with similar contexts are read as one tree."""
        wholes = [sequence.ids for sequence in sequences]
        contexts = [sequence.context for sequence in sequences]
        groups = list(group_by_prefix(wholes, contexts, TREE_TOKENS))
        trees = []
        for group in groups:
            members = [sequences[index] for index in group]
            tree = build_prefix_tree([one.ids for one in members], [one.start for one in members])
            if tree is None:
                raise DataError(
                    "a document of an lm-eval task has an empty context or answer; "
                    "leave it out of the task's data"
                )
            trees.append(tree)
        found: dict[int, Score] = {}
        scores_of_groups = score(self.reader, trees)
        for group, scores in zip(groups, scores_of_groups, strict=True):
            found |= zip(group, scores, strict=True)
        return [found[index] for index in range(len(sequences))]

    def _encode_pairs(self, pairs: Sequence[_LikelihoodRequest]) -> None:
        """Tokenize the contexts and answers of all requests."""
        texts = list[str]()
        answers_alone = list[str]()
        for pair in pairs:
            if pair.context:
                texts += [pair.stripped_context, pair.text]
            else:
                answers_alone.append(pair.answer)
        self._encode(texts)
        self._encode(answers_alone, special=False)

    def _sequence(self, pair: _LikelihoodRequest) -> _Sequence:
        """Return the tokens of a context with its answer, and where the answer begins."""
        if pair.context:
            context_tokens = self._tokens_of(pair.stripped_context)
            ids = self._tokens_of(pair.text)
            return _Sequence(ids, start=len(context_tokens), context=pair.context)
        ids = self._tokens[(pair.answer, False)]
        if ids[:1] != [self._start_token]:
            ids = [self._start_token, *ids]
        return _Sequence(ids, start=1, context="")

    def _encode(self, texts: Sequence[str], *, special: bool = True) -> None:
        """Cache the tokens of texts; one that has a start token already gets no other."""
        new: dict[bool, list[str]] = {True: [], False: []}
        for text in texts:
            if (text, special) not in self._tokens:
                adds_special = special and not self._has_start_token(text)
                new[adds_special].append(text)
        for adds_special, some in new.items():
            encoded = encode(some, self.tokenizer, special=adds_special)
            for text, ids in encoded.items():
                self._tokens[(text, special)] = ids

    def _tokens_of(self, text: str) -> list[int]:
        return self._tokens[(text, True)]

    def _has_start_token(self, text: str) -> bool:
        start_text = str(self.tokenizer.decode([self._start_token]))
        return text.startswith(start_text)

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=ids,
            prefix_token=self._start_token,
            max_seq_len=self.context or LONGEST_WINDOW,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _is_too_long(self, request: Any, tokens: int) -> bool:
        """Return whether so many tokens exceed the context, and note the document if they do."""
        reason = too_long(tokens, self.context)
        if reason is not None:
            self.left_out[_document(request)] = reason
        return reason is not None


def _document(request: Any) -> tuple[str, int]:
    return request.task_name, request.doc_id


def _limits(settings: dict[str, Any]) -> _Limits:
    kwargs = normalize_gen_kwargs(settings, LONGEST_ANSWER)
    until = handle_stop_sequences(kwargs["until"], eos=None)
    texts = tuple(text for text in until if text)
    return _Limits(int(kwargs["max_gen_toks"]), texts)
