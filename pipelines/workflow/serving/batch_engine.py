"""Generates answers in one thread: requests that wait form a batch, each with its own adapter.

A batch is answered to its end before the next one starts. Between batches, adapters are loaded into
the bank and removed from it, so that an answer never changes its adapter.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from lora_core import Bank
from lora_core.errors import RoutingError
from pipelines.errors import PipelineError
from pipelines.models.checked import CheckedReader, padded
from pipelines.models.forward import attending_by
from pipelines.models.renames import weight_renames
from pipelines.runtime.memory import is_out_of_memory
from pipelines.workflow.serving.answer_row import AnswerRow, RowsEnd
from pipelines.workflow.serving.sampling import ChosenTokens, Sampler

Value = TypeVar("Value")
SECONDS_TO_END = 30
REPLACED = "the adapter was replaced while the request arrived; send it again"
ENDING = "the server is ending; send the request again later"
log = logging.getLogger(__name__)


class QueueFullError(PipelineError):
    """As many requests wait as may."""


class EngineEndedError(PipelineError):
    """The server ends, or its engine has failed."""


@dataclass(frozen=True)
class BankAdapter:
    """An adapter that a request is answered with."""

    digests: str
    """Of its registered files; its name in the bank."""
    is_mixable: bool
    """Whether it can be in one batch with others."""


@dataclass(frozen=True)
class GenerationJob:
    """A request that waits for its answer, or is being answered."""

    adapter: BankAdapter | None
    """None for the base alone."""
    row: AnswerRow


@dataclass(frozen=True)
class EngineStatus:
    """What an engine does and did."""

    is_alive: bool
    waiting: int
    answering: int
    largest_batch: int
    """Requests in the largest batch so far."""
    largest_mix: int
    """Different adapters, with the base, in one batch so far."""


class GenerationEngine:
    """One base in memory, its adapters, and the thread that generates."""

    def __init__(self, model: PreTrainedModel, *, batch: int, queue: int) -> None:
        """Start the thread.

        Args:
            model: the base, in evaluation mode; only the thread uses it from now on.
            batch: most requests that are answered at once.
            queue: most requests that wait.
        """
        self.model = model
        self._bank = Bank(model)
        self._reader = CheckedReader(model)
        self._batch = batch
        self._queue = queue
        self._jobs: deque[GenerationJob] = deque()
        self._actions: deque[Callable[[], None]] = deque()
        self._kept: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        """Adapters that stay in the bank: those that are served, and those that were before."""
        self._loaded_since = set[str]()
        """Adapters that were loaded after the last call of `keep`; they stay until the next one."""
        self._changed = threading.Condition()
        self._is_ending = False
        self._answering = 0
        self._largest_batch = 0
        self._largest_mix = 0
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def submit(self, job: GenerationJob) -> None:
        """Let a request wait for its answer.

        Raises:
            QueueFullError: too many wait already.
            EngineEndedError: nothing is answered any more.
        """
        with self._changed:
            self._check_alive()
            if len(self._jobs) >= self._queue:
                raise QueueFullError(
                    f"{len(self._jobs)} requests wait already, which is the limit; try again later"
                )
            self._jobs.append(job)
            self._changed.notify()

    def load(self, digests: str, folder: Path) -> BankAdapter:
        """Load an adapter between two batches; wait until it is loaded.

        Args:
            digests: of its registered files.
            folder: with its files.

        Raises:
            LoraError: its files are not valid, or it belongs to another base or bank.
            EngineEndedError: nothing is answered any more.
        """
        return self._between_batches(lambda: self._loaded(digests, folder))

    def verify(self, tokens: int) -> None:
        """Verify how prompts of up to so many tokens are read; the first request needs not wait.

        A longer prompt is verified when it arrives.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
        self._between_batches(lambda: self._reader.generation([ids[: tokens // 2], ids]))

    def keep(self, served: Sequence[str]) -> None:
        """Keep these adapters and those of the previous call, to which a request may still be sent.

        The others are removed once no request waits for them.

        Args:
            served: digests of the adapters.
        """

        def remember() -> None:
            self._kept = (frozenset(served), self._kept[0])
            self._loaded_since.clear()
            self._remove_unused()

        self._between_batches(remember)

    @property
    def status(self) -> EngineStatus:
        """What the engine does and did."""
        is_alive = self._thread.is_alive() and not self._is_ending
        return EngineStatus(
            is_alive, len(self._jobs), self._answering, self._largest_batch, self._largest_mix
        )

    def close(self) -> None:
        """End the thread after its current token; unfinished answers fail."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        self._thread.join(SECONDS_TO_END)

    def _check_alive(self) -> None:
        if self._is_ending or not self._thread.is_alive():
            raise EngineEndedError(ENDING)

    def _between_batches(self, action: Callable[[], Value]) -> Value:
        """Run an action in the thread, and return its result."""
        future: Future[Value] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)
                if is_out_of_memory(error):
                    log.exception("an adapter does not fit into memory")

        with self._changed:
            self._check_alive()
            self._actions.append(run)
            self._changed.notify()
        return future.result()

    def _work(self) -> None:
        try:
            while not self._is_ending:
                self._run_actions()
                batch = self._next_batch()
                if batch:
                    self._answer(batch)
        finally:
            with self._changed:
                self._is_ending = True
            self._run_actions()
            for job in self._jobs:
                job.row.fail(ENDING, status=503)

    def _run_actions(self) -> None:
        while self._actions:
            self._actions.popleft()()

    def _next_batch(self) -> list[GenerationJob]:
        """Wait for a request; return those that can be answered together, the oldest first.

        Empty if there is something else to do.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._actions or self._is_ending)
            if self._actions or self._is_ending:
                return []
            first = self._jobs[0]
            batch: list[GenerationJob] = []
            others: deque[GenerationJob] = deque()
            while self._jobs:
                job = self._jobs.popleft()
                is_room = len(batch) < self._batch
                (batch if is_room and _can_mix(first, job) else others).append(job)
            self._jobs = others
            return batch

    def _answer(self, batch: Sequence[GenerationJob]) -> None:
        """Answer a batch; if that fails, each of its requests gets the error."""
        for job in batch:
            if job.adapter is not None and job.adapter.digests not in self._bank.names:
                job.row.fail(REPLACED, status=503)
        active = [job for job in batch if not job.row.is_done]  # clients may have left
        self._answering = len(active)
        try:
            if active:
                self._generate(active)
        except Exception as error:
            reason = type(error).__name__
            if is_out_of_memory(error):
                reason = "memory ran out; send a shorter prompt, or start the server with --batch 1"
            log.exception("a batch of %d requests failed", len(batch))
            for job in batch:
                job.row.fail(f"the answer could not be generated ({reason})")
        self._answering = 0
        for job in batch:  # those that a signal interrupted
            job.row.fail(ENDING, status=503)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[GenerationJob]) -> None:
        prompts = [job.row.prompt for job in batch]
        method = self._reader.generation(prompts)
        is_batched = method.batched and not _penalizes_tokens(self.model)
        groups = [batch] if is_batched else [[job] for job in batch]
        with attending_by(self.model, method.attention):
            for group in groups:
                self._record(group)
                with self._adapters_of(group):
                    _generate_rows(self.model, [job.row for job in group], lambda: self._is_ending)
        self._remove_unused()

    def _record(self, group: Sequence[GenerationJob]) -> None:
        self._largest_batch = max(self._largest_batch, len(group))
        self._largest_mix = max(self._largest_mix, len(set(map(_name, group))))

    @contextmanager
    def _adapters_of(self, group: Sequence[GenerationJob]) -> Iterator[None]:
        """Use the adapter of each request inside a block."""
        names = [_name(job) for job in group]
        is_one = len(set(names)) == 1
        with self._bank.using(names[0]) if is_one else self._bank.rows(names):
            yield

    def _loaded(self, digests: str, folder: Path) -> BankAdapter:
        if digests not in self._bank.names:
            self._bank.load(digests, folder, renames=weight_renames(self.model))
        self._loaded_since.add(digests)
        try:
            with self._bank.rows([digests, None]):
                return BankAdapter(digests, is_mixable=True)
        except RoutingError:
            return BankAdapter(digests, is_mixable=False)

    def _remove_unused(self) -> None:
        with self._changed:
            waiting = {_name(job) for job in self._jobs}
        needed = waiting.union(self._loaded_since, *self._kept)
        for name in self._bank.names:
            if name not in needed:
                self._bank.remove(name)


def _name(job: GenerationJob) -> str | None:
    return None if job.adapter is None else job.adapter.digests


def _can_mix(one: GenerationJob, other: GenerationJob) -> bool:
    """Return whether two requests can be in one batch."""
    if _name(one) == _name(other):
        return True
    adapters = [job.adapter for job in (one, other) if job.adapter is not None]
    return all(adapter.is_mixable for adapter in adapters)


def _penalizes_tokens(model: PreTrainedModel) -> bool:
    """Return whether the base's settings change scores by the tokens so far.

    The padding of a batch would count as such tokens.
    """
    penalty = getattr(model.generation_config, "repetition_penalty", None)
    size = getattr(model.generation_config, "no_repeat_ngram_size", None)
    return penalty not in (None, 1.0) or bool(size)


def _generate_rows(
    model: PreTrainedModel, rows: Sequence[AnswerRow], is_stopping: Callable[[], bool]
) -> None:
    """Generate until every row of a batch has ended."""
    filler = rows[0].prompt[0]
    ids, mask = padded([row.prompt for row in rows], filler=filler, device=str(model.device))
    chosen = ChosenTokens([Sampler(row.options) for row in rows])
    model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(row.options.max_tokens for row in rows),
        do_sample=False,
        pad_token_id=filler,
        eos_token_id=None,
        logits_processor=LogitsProcessorList([chosen]),
        stopping_criteria=StoppingCriteriaList([RowsEnd(rows, is_stopping)]),
    )
