"""lm-eval's tasks score the same here and with lm-eval's own `hf` model.

That model shares no code with our scorer.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_tasks import DOCS, TASKS, Values, settings, write_task
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipelines.comparison.record_types import (
    ChoiceRecord,
    ItemRecord,
    LeftOutRecord,
    ScoreRecord,
)
from pipelines.errors import RecipeError
from pipelines.evaluation import harness
from pipelines.evaluation.generation import generate
from pipelines.evaluation.harness import load_tasks
from pipelines.models.checked import CheckedReader

NATS = 1e-4
pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed; it is an extra"
)
RecordsOf = Callable[..., list[ItemRecord]]
SamplesOf = Callable[..., list[Values]]


@pytest.fixture
def samples_of(tasks_folder: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> SamplesOf:
    """Return a function from a task to what lm-eval keeps of each document with its own model."""

    def samples(name: str, **options: Any) -> list[Values]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        options |= {"batch_size": 1, "device": "cpu"}
        with harness.chdir(tasks_folder):
            manager = TaskManager(include_path=str(tasks_folder), include_defaults=False)
            found = simple_evaluate(
                HFLM(pretrained=plain, tokenizer=tokenizer, **options),
                tasks=[name],
                task_manager=manager,
                bootstrap_iters=0,
                fewshot_random_seed=7,
            )
        samples: list[Values] = found["samples"][name]
        return samples

    return samples


def likeliest(record: ChoiceRecord) -> int:
    """Return the index of the likeliest answer."""
    likelihoods = record.log_likelihoods
    return likelihoods.index(max(likelihoods))


@pytest.mark.parametrize("name", ["chosen", "shown"])
def test_a_multiple_choice_task_scores_like_in_lm_eval(
    records_of: RecordsOf, samples_of: SamplesOf, name: str
) -> None:
    pairs = zip(records_of(name), samples_of(name), strict=True)
    for index, (record, sample) in enumerate(pairs):
        likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]
        assert record.log_likelihoods == pytest.approx(likelihoods, abs=NATS)
        assert record.greedy == tuple(greedy for _, greedy in sample["filtered_resps"])
        assert (record.kind, record.benchmark) == ("general", name)
        assert (record.id, record.gold) == (f"{name}/{index}", index % 3)
        assert record.bytes == tuple(len(arguments[1]) for arguments in sample["arguments"])
        assert (likeliest(record) == record.gold) == bool(sample["acc"])


@pytest.mark.parametrize(
    ("name", "metric"), [("continued", "acc"), ("read", "bits_per_byte"), ("written", "chrf")]
)
def test_any_other_task_has_one_value_per_document_as_in_lm_eval(
    records_of: RecordsOf, samples_of: SamplesOf, name: str, metric: str
) -> None:
    import lm_eval.api.metrics as known

    aggregations = {"acc": known.mean, "bits_per_byte": known.bits_per_byte, "chrf": known.chrf}
    pairs = zip(records_of(name), samples_of(name), strict=True)
    for index, (record, sample) in enumerate(pairs):
        expected = aggregations[metric]([sample[metric]])
        assert record.value == pytest.approx(expected, abs=1e-5)
        assert (record.kind, record.benchmark) == ("score", name)
        assert (record.id, record.metric) == (f"{name}/{index}", metric)
        assert record.higher_is_better is (metric != "bits_per_byte")


def test_generated_answers_equal_those_of_lm_eval(
    samples_of: SamplesOf, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    from lm_eval.api.instance import Instance

    from pipelines.evaluation.harness_model import PackedModel

    samples = samples_of("written")
    requests = [
        Instance("generate_until", {}, tuple(sample["arguments"][0]), 0) for sample in samples
    ]
    answers = PackedModel(CheckedReader(model), tokenizer, None, {}).generate_until(requests)
    assert answers == [sample["resps"][0][0] for sample in samples]


def test_a_long_text_is_read_in_the_windows_of_lm_eval(
    records_of: RecordsOf, samples_of: SamplesOf
) -> None:
    samples = samples_of("read", max_length=16)
    records = records_of("read", context=16)
    for record, sample in zip(records, samples, strict=True):
        likelihood, size = sample["bits_per_byte"]
        assert record.value == pytest.approx(-likelihood / size / math.log(2), abs=1e-5)


def test_a_document_that_is_too_long_is_left_out(records_of: RecordsOf) -> None:
    records = records_of("chosen", "written", context=25)
    left_out = [record for record in records if isinstance(record, LeftOutRecord)]
    evaluated = [record for record in records if isinstance(record, ChoiceRecord | ScoreRecord)]
    assert left_out and evaluated
    assert len(left_out) + len(evaluated) == len(records)
    for record in left_out:
        assert "exceed the context of 25" in record.left_out
    for record in records_of("chosen", "written"):
        assert isinstance(record, ChoiceRecord | ScoreRecord)


def test_every_model_sees_the_same_few_shot_examples(
    tasks_folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    reader = CheckedReader(model)
    tasks = load_tasks(settings("shown"), 7, [tasks_folder])
    first, second = (list(tasks.records(reader, tokenizer, None)) for _ in range(2))
    assert first == second
    other_seed = load_tasks(settings("shown"), 8, [tasks_folder])
    other = other_seed.records(reader, tokenizer, None)
    digests = [record.prompt_sha256 for record in first]
    assert [record.prompt_sha256 for record in other] != digests


def test_a_limit_takes_the_first_documents(records_of: RecordsOf) -> None:
    records = records_of("chosen", limit=2)
    assert [record.id for record in records] == ["chosen/0", "chosen/1"]
    assert records_of("chosen")[:2] == records


def test_several_right_answers_give_a_value_instead_of_a_choice(
    tasks_folder: Path, records_of: RecordsOf
) -> None:
    write_task(tasks_folder, "several", {**TASKS["chosen"], "doc_to_target": "{{[right, 0]}}"})
    for record, one in zip(records_of("several"), records_of("chosen"), strict=True):
        assert record.kind == "score"
        assert record.log_likelihoods == one.log_likelihoods
        assert record.greedy == one.greedy
        assert record.value == (likeliest(one) in (one.gold, 0))


def test_a_task_that_computes_none_of_its_metrics_is_refused(
    tasks_folder: Path, records_of: RecordsOf
) -> None:
    metrics = [{"metric": "perplexity", "aggregation": "mean", "higher_is_better": False}]
    task = {**TASKS["chosen"], "doc_to_target": "{{[right, 0]}}", "metric_list": metrics}
    write_task(tasks_folder, "odd", task)
    message = "the lm-eval task 'odd' computes none of its metrics for odd/0"
    with pytest.raises(RecipeError, match=message):
        records_of("odd")


def test_a_value_keeps_the_likelihoods_behind_it(
    records_of: RecordsOf, samples_of: SamplesOf
) -> None:
    for record, sample in zip(records_of("continued"), samples_of("continued"), strict=True):
        [(likelihood, greedy)] = sample["filtered_resps"]
        assert record.log_likelihoods == pytest.approx([likelihood], abs=NATS)
        assert record.greedy == (greedy,)
    for record, sample in zip(records_of("read"), samples_of("read"), strict=True):
        assert record.log_likelihoods == pytest.approx(sample["filtered_resps"], abs=10 * NATS)
    assert all(record.log_likelihoods is None for record in records_of("written"))


def test_a_generated_answer_reports_whether_it_ended(
    tasks_folder: Path,
    records_of: RecordsOf,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompts = [tokenizer(doc["question"]).input_ids for doc in DOCS]
    answers = generate(CheckedReader(model), tokenizer, prompts, 8)
    end = answers[0].text[3]
    for name, until in (("endless", "no text has this"), ("ending", end)):
        kwargs = {"until": [until], "max_gen_toks": 8}
        write_task(tasks_folder, name, {**TASKS["written"], "generation_kwargs": kwargs})
    assert all(record.ended is False for record in records_of("endless"))
    ended = [end in answer.text for answer in answers]
    assert [record.ended for record in records_of("ending")] == ended
    assert all(record.ended is None for record in records_of("continued"))
    assert all(isinstance(record, ChoiceRecord) for record in records_of("chosen"))
