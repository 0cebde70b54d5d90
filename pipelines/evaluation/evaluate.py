"""Score models: the base, the base in 4 bits, the control, adapters on their base.

    python -m pipelines.evaluation.evaluate STAGE_FOLDER [STAGE_FOLDER ...]

items.jsonl keeps what was seen item by item, in the same order for every model, so that models are compared in pairs and
anyone can compute the figures again. Stages that follow each other and share base and quantisation share what is loaded,
and those that ask the same share the questions; what each one writes is what it would write alone, to the bit.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lora_core.files import file_written_aside, write_text
from pipelines.comparison.records import left_out, unfinished
from pipelines.evaluation.chat import TENSOR, chat_records
from pipelines.evaluation.eval_set import EvalSet, prepare
from pipelines.evaluation.generation import answer_records
from pipelines.evaluation.models import Models
from pipelines.evaluation.questions import Question, Record, records
from pipelines.evaluation.scoring import score, score_examples
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import detect, peak_memory_bytes
from pipelines.runtime.child import run_stages
from pipelines.runtime.stage import digest

ITEMS, DISTRIBUTIONS = "items.jsonl", "distributions.safetensors"


@dataclass
class Timings:
    """How long each part of an evaluation took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part's."""
        begun = time.perf_counter()
        yield
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - begun, 2)


class Evaluation:
    """Evaluates one stage after the other, and keeps between them what the next may share."""

    def __init__(self) -> None:
        self.models = Models(detect())
        self._asked: tuple[str, EvalSet] | None = None

    def __call__(
        self, folder: Path, inputs: dict[str, Any], paths: dict[str, str]
    ) -> tuple[dict[str, Any], list[str]]:
        """Write items.jsonl, and where there are chats distributions.safetensors, for the model that the inputs name."""
        timings = Timings()
        with ExitStack() as stack:
            with timings.of("prepare"):
                asked = self.asked(inputs, paths)
            with timings.of("load"):
                model = stack.enter_context(
                    self.models.use(
                        paths,
                        inputs["quantization"],
                        trust_remote_code=inputs.get("trust_remote_code", False),
                    )
                )
            reader = CheckedReader(model)
            found, files = answer(reader, asked, folder, timings)
        write_text(
            folder / ITEMS,
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found),
        )
        counts = {"items": len(found), "left_out": left_out(found), "unfinished": unfinished(found)}
        counts["forward"] = None if reader.verified is None else reader.verified.figures()
        return {
            **counts,
            "peak_memory_bytes": peak_memory_bytes(),
            "seconds_of": timings.seconds,
        }, [ITEMS, *files]

    def asked(self, inputs: Mapping[str, Any], paths: Mapping[str, str]) -> EvalSet:
        """Return what a stage asks; the former stage's where it is the same."""
        own = {name: path for name, path in paths.items() if name not in ("model", "adapter")}
        key = digest([inputs["evaluation"], inputs["seed"], own])
        if self._asked is None or self._asked[0] != key:
            self._asked = key, prepare(inputs, paths)
        return self._asked[1]


def answer(
    reader: CheckedReader, asked: EvalSet, folder: Path, timings: Timings
) -> tuple[list[Record], list[str]]:
    """Return the records of a model, and the names of the files that go with them, which are written."""
    found, files = list[Record](), list[str]()
    with timings.of("task"):
        found += score_examples(reader, asked.examples)
    with timings.of("general"):
        found += scored(reader, asked.questions)
    with timings.of("lm_eval"):
        found += (
            asked.tasks.records(reader, asked.tokenizer, asked.judging.context)
            if asked.tasks is not None
            else []
        )
    with timings.of("text"):
        found += scored(reader, asked.texts)
    with timings.of("chat"):
        chats, table = chat_records(reader, asked.chats)
        found += chats
    if table.numel():
        with file_written_aside(folder / DISTRIBUTIONS) as aside:
            save_file({TENSOR: table}, str(aside))
        files.append(DISTRIBUTIONS)
    with timings.of("answers"):
        found += answer_records(
            reader, asked.tokenizer, asked.examples[: asked.answered], asked.judging
        )
    return found, files


def scored(reader: CheckedReader, questions: Sequence[Question]) -> Iterator[Record]:
    """Yield the record of each question."""
    return records(
        questions, iter(score(reader, [one.tree for one in questions if one.left_out is None]))
    )


if __name__ == "__main__":
    run_stages(Evaluation())
