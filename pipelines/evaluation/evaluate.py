"""Score models: the base, the base in 4 bits, the control, adapters on their base.

    python -m pipelines.evaluation.evaluate STAGE_FOLDER [STAGE_FOLDER ...]

items.jsonl keeps the outputs item by item, in the same order for every model, so that models are
compared in pairs and anyone can compute the results again. Consecutive stages with equal base and
quantization share the loaded model, and those with equal evaluation settings share the questions;
each writes what it would write alone, to the bit.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lora_core.files import atomic_file
from pipelines.comparison.record_files import write_items
from pipelines.comparison.record_types import ItemRecord, TaskRecord
from pipelines.comparison.records import left_out, of_type, unfinished
from pipelines.evaluation.chat import TENSOR, chat_records
from pipelines.evaluation.eval_set import EvalSet, prepare
from pipelines.evaluation.generation import answer_records
from pipelines.evaluation.models import Models
from pipelines.evaluation.questions import Question, records
from pipelines.evaluation.scoring import score, score_examples
from pipelines.evaluation.served import check_served, own_losses
from pipelines.models.checked import Architecture, CheckedReader
from pipelines.models.hardware import detect, peak_memory_bytes
from pipelines.models.verification_cache import VerificationCache, architecture_key
from pipelines.runtime.child import execute_stages
from pipelines.runtime.interfaces.inputs import EvaluateInputs, StagePaths
from pipelines.runtime.interfaces.kinds import EVALUATE
from pipelines.runtime.interfaces.results import EvaluateResult
from pipelines.runtime.stage import digest

ITEMS, DISTRIBUTIONS = "items.jsonl", "distributions.safetensors"


@dataclass
class Timings:
    """How long each part of an evaluation took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part's."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self.seconds[part] = round(self.seconds.get(part, 0.0) + elapsed, 2)


class Evaluation:
    """Evaluates one stage after the other, and keeps what the next one may share."""

    def __init__(self) -> None:
        self.models = Models(detect())
        self._eval_sets: dict[str, EvalSet] = {}
        """The last one, by the digest of what it depends on."""

    def __call__(
        self, folder: Path, inputs: EvaluateInputs, paths: StagePaths
    ) -> tuple[EvaluateResult, list[str]]:
        """Write items.jsonl and, if there are chats, distributions.safetensors for one model."""
        timings = Timings()
        with ExitStack() as stack:
            with timings.of("prepare"):
                eval_set = self.eval_set(inputs, paths)
            with timings.of("load"):
                use = self.models.use(
                    paths, inputs.quantization, trust_remote_code=inputs.trust_remote_code
                )
                model = stack.enter_context(use)
            cache = VerificationCache(folder)
            key = architecture_key(model)
            architecture = cache.load(key, Architecture) or Architecture()
            reader = CheckedReader(model, architecture)
            found, files = evaluate(reader, eval_set, folder, timings)
            cache.save(key, architecture)
            examples = eval_set.examples[: inputs.rescored]
            own = own_losses(model, examples)
        served = None
        if examples:
            with timings.of("served"):
                records = of_type(found, TaskRecord)[: len(examples)]
                served = check_served(model, paths.required("adapter"), examples, records, own)
        write_items(folder / ITEMS, found)
        result = EvaluateResult(
            items=len(found),
            left_out=left_out(found),
            unfinished=unfinished(found),
            forward=reader.verified,
            served=served,
            peak_memory_bytes=peak_memory_bytes(),
            seconds_of=timings.seconds,
        )
        return result, [ITEMS, *files]

    def eval_set(self, inputs: EvaluateInputs, paths: StagePaths) -> EvalSet:
        """Return the evaluation set of a stage; that of the stage before if it is the same.

        Args:
            inputs: the settings and the seed.
            paths: of the base, the data and the recipe; where the model is makes no difference.
        """
        shared = paths.model_copy(update={"model": None, "adapter": None})
        settings = inputs.evaluation.model_dump(mode="json")
        key = digest([settings, inputs.generations, inputs.seed, shared.plain()])
        if key not in self._eval_sets:
            self._eval_sets = {key: prepare(inputs, paths)}
        return self._eval_sets[key]


def evaluate(
    reader: CheckedReader, eval_set: EvalSet, folder: Path, timings: Timings
) -> tuple[list[ItemRecord], list[str]]:
    """Return the records of a model, and the names of the files that are written with them.

    Args:
        reader: of the model.
        eval_set: what every model of the comparison is evaluated on.
        folder: of the stage; gets the distributions at the scored tokens of chats.
        timings: gets the seconds of each part.
    """
    found = list[ItemRecord]()
    files = list[str]()
    with timings.of("task"):
        found += score_examples(reader, eval_set.examples)
    with timings.of("general"):
        found += scored(reader, eval_set.questions)
    with timings.of("lm_eval"):
        if eval_set.tasks is not None:
            context = eval_set.generation.context
            found += eval_set.tasks.records(reader, eval_set.tokenizer, context)
    with timings.of("text"):
        found += scored(reader, eval_set.texts)
    with timings.of("chat"):
        chats, table = chat_records(reader, eval_set.chats)
        found += chats
    if table.numel():
        _write_table(folder / DISTRIBUTIONS, table)
        files.append(DISTRIBUTIONS)
    with timings.of("answers"):
        answered = eval_set.examples[: eval_set.answered]
        found += answer_records(reader, eval_set.tokenizer, answered, eval_set.generation)
    return found, files


def _write_table(file: Path, table: Tensor) -> None:
    with atomic_file(file) as aside:
        save_file({TENSOR: table}, str(aside))


def scored(reader: CheckedReader, questions: Sequence[Question]) -> Iterator[ItemRecord]:
    """Yield the record of each question.

    Args:
        reader: of the model.
        questions: those that are left out get a record with the reason.
    """
    trees = [question.tree for question in questions if question.left_out is None]
    return records(questions, iter(score(reader, trees)))


if __name__ == "__main__":
    execute_stages(EVALUATE, Evaluation())
