"""lm-eval's tasks score here what they score with lm-eval's own `hf` model, which shares no code with our scorer."""

import json
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipelines.errors import DataError, RecipeError
from pipelines.evaluation import harness
from pipelines.evaluation.generation import generate
from pipelines.evaluation.harness import load_tasks
from pipelines.models.checked import CheckedReader

NATS = 1e-4
needs_library = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed; it is an extra"
)
Values = dict[str, Any]
DOCS = [
    {
        "question": f"Say {word} {place}.",
        "right": place % 3,
        "answers": [word, "green", f"{word} blue up"],
        "text": f"{word} look on",
    }
    for place, word in enumerate(["red", "north", "south", "east", "west", "left"])
]
COMMON: Values = {
    "dataset_path": "json",
    "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}},
}
TASKS: dict[str, Values] = {
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "shown": {
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "num_fewshot": 2,
        "doc_to_text": "{{question}} ",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "continued": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{text}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{text}} {{question}} {{text}}",
        "metric_list": [
            {
                "metric": "word_perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            },
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
    },
}


@pytest.fixture
def tasks_folder(tmp_path: Path) -> Path:
    """A folder of task files beside the documents that they name."""
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, task in TASKS.items():
        write_task(tmp_path, name, task)
    return tmp_path


@pytest.fixture(autouse=True)
def forgiven() -> Iterator[None]:
    """The library's own warnings are no failures of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def records_of(
    tasks_folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[..., list[Values]]:
    """Return a function from names of tasks to our records."""

    def records(*names: str, context: int | None = None, limit: int | None = None) -> list[Values]:
        return list(
            load_tasks(settings(*names, limit=limit), 7, [tasks_folder]).records(
                CheckedReader(model), tokenizer, context
            )
        )

    return records


def write_task(folder: Path, name: str, task: Values) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **COMMON, **task}))


def settings(*names: str, limit: int | None = None) -> Values:
    return {"tasks": list(names), "include_path": ".", "limit": limit}


def theirs(
    folder: Path, name: str, model_folder: Path, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> list[Values]:
    """Return what lm-eval keeps of each document when its own model answers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with harness.chdir(folder):
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        wrapped = HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=1, device="cpu", **options)
        found = simple_evaluate(
            wrapped, tasks=[name], task_manager=manager, bootstrap_iters=0, fewshot_random_seed=7
        )
    samples: list[Values] = found["samples"][name]
    return samples


@needs_library
@pytest.mark.parametrize("name", ["chosen", "shown"])
def test_a_multiple_choice_is_a_question_with_choices(
    records_of: Callable[..., list[Values]],
    tasks_folder: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> None:
    records, samples = records_of(name), theirs(tasks_folder, name, folder, tokenizer)
    for place, (record, sample) in enumerate(zip(records, samples, strict=True)):
        assert record["log_likelihoods"] == pytest.approx(
            [value for value, _ in sample["filtered_resps"]], abs=NATS
        )
        assert record["greedy"] == [greedy for _, greedy in sample["filtered_resps"]]
        assert (record["kind"], record["benchmark"], record["id"], record["gold"]) == (
            "general",
            name,
            f"{name}/{place}",
            place % 3,
        )
        assert record["bytes"] == [len(arguments[1]) for arguments in sample["arguments"]]
        assert (
            record["log_likelihoods"].index(max(record["log_likelihoods"])) == record["gold"]
        ) == bool(sample["acc"])


@needs_library
@pytest.mark.parametrize(
    ("name", "metric"), [("continued", "acc"), ("read", "bits_per_byte"), ("written", "chrf")]
)
def test_any_other_task_has_one_value_a_document(
    records_of: Callable[..., list[Values]],
    tasks_folder: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    metric: str,
) -> None:
    import lm_eval.api.metrics as known

    aggregate = {"acc": known.mean, "bits_per_byte": known.bits_per_byte, "chrf": known.chrf}[
        metric
    ]
    records, samples = records_of(name), theirs(tasks_folder, name, folder, tokenizer)
    for place, (record, sample) in enumerate(zip(records, samples, strict=True)):
        assert record["value"] == pytest.approx(aggregate([sample[metric]]), abs=1e-5)
        assert (record["kind"], record["benchmark"], record["id"], record["metric"]) == (
            "score",
            name,
            f"{name}/{place}",
            metric,
        )
        assert record["higher_is_better"] is (metric != "bits_per_byte")


@needs_library
def test_written_answers_are_those_of_the_library(
    tasks_folder: Path, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    from lm_eval.api.instance import Instance

    from pipelines.evaluation.harness_model import PackedModel

    samples = theirs(tasks_folder, "written", folder, tokenizer)
    requests = [
        Instance("generate_until", {}, tuple(sample["arguments"][0]), 0) for sample in samples
    ]
    assert PackedModel(CheckedReader(model), tokenizer, None, {}).generate_until(requests) == [
        sample["resps"][0][0] for sample in samples
    ]


@needs_library
def test_a_long_text_is_read_in_the_windows_of_the_library(
    records_of: Callable[..., list[Values]],
    tasks_folder: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    samples = theirs(tasks_folder, "read", folder, tokenizer, max_length=16)
    expected = [
        -likelihood / size / 0.6931471805599453
        for likelihood, size in (sample["bits_per_byte"] for sample in samples)
    ]
    assert [record["value"] for record in records_of("read", context=16)] == pytest.approx(
        expected, abs=1e-5
    )


@needs_library
def test_a_document_that_is_too_long_is_left_out(records_of: Callable[..., list[Values]]) -> None:
    whole = records_of("chosen", "written", context=25)
    assert [record["id"] for record in whole if "left_out" in record]
    assert [record["id"] for record in whole if "left_out" not in record]
    for record in whole:
        assert ("log_likelihoods" in record or "value" in record) != ("left_out" in record)
    assert all(
        "exceed the context of 25" in record["left_out"] for record in whole if "left_out" in record
    )
    assert all("left_out" not in record for record in records_of("chosen", "written"))


@needs_library
def test_every_model_is_shown_the_same_examples(
    tasks_folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tasks = load_tasks(settings("shown"), 7, [tasks_folder])
    first, second = (list(tasks.records(CheckedReader(model), tokenizer, None)) for _ in range(2))
    assert first == second
    other = load_tasks(settings("shown"), 8, [tasks_folder]).records(
        CheckedReader(model), tokenizer, None
    )
    assert [record["prompt_sha256"] for record in other] != [
        record["prompt_sha256"] for record in first
    ]


@needs_library
def test_a_limit_takes_the_first_documents(records_of: Callable[..., list[Values]]) -> None:
    assert [record["id"] for record in records_of("chosen", limit=2)] == ["chosen/0", "chosen/1"]
    assert records_of("chosen")[:2] == records_of("chosen", limit=2)


@needs_library
def test_several_right_answers_give_a_value_instead_of_a_choice(
    tasks_folder: Path, records_of: Callable[..., list[Values]]
) -> None:
    write_task(tasks_folder, "several", {**TASKS["chosen"], "doc_to_target": "{{[right, 0]}}"})
    records = records_of("several")
    assert {record["kind"] for record in records} == {"score"}
    for record, one in zip(records, records_of("chosen"), strict=True):
        assert (record["log_likelihoods"], record["greedy"]) == (
            one["log_likelihoods"],
            one["greedy"],
        )
        assert record["value"] == (
            one["log_likelihoods"].index(max(one["log_likelihoods"])) in (one["gold"], 0)
        )


@needs_library
def test_a_task_that_computes_none_of_its_metrics_is_refused(
    tasks_folder: Path, records_of: Callable[..., list[Values]]
) -> None:
    metrics = [{"metric": "perplexity", "aggregation": "mean", "higher_is_better": False}]
    write_task(
        tasks_folder,
        "odd",
        {**TASKS["chosen"], "doc_to_target": "{{[right, 0]}}", "metric_list": metrics},
    )
    with pytest.raises(
        RecipeError, match="the lm-eval task 'odd' computes none of its metrics for odd/0"
    ):
        records_of("odd")


@needs_library
def test_a_value_keeps_the_likelihoods_that_it_comes_from(
    records_of: Callable[..., list[Values]],
    tasks_folder: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for record, sample in zip(
        records_of("continued"), theirs(tasks_folder, "continued", folder, tokenizer), strict=True
    ):
        [(likelihood, greedy)] = sample["filtered_resps"]
        assert (record["log_likelihoods"], record["greedy"]) == (
            [pytest.approx(likelihood, abs=NATS)],
            [greedy],
        )
    for record, sample in zip(
        records_of("read"), theirs(tasks_folder, "read", folder, tokenizer), strict=True
    ):
        assert record["log_likelihoods"] == pytest.approx(sample["filtered_resps"], abs=10 * NATS)
    assert not any("log_likelihoods" in record for record in records_of("written"))


@needs_library
def test_a_written_answer_says_whether_it_came_to_an_end(
    tasks_folder: Path,
    records_of: Callable[..., list[Values]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    written = generate(
        CheckedReader(model), tokenizer, [tokenizer(doc["question"]).input_ids for doc in DOCS], 8
    )
    end = written[0].text[3]
    for name, until in (("cut", "no text has this"), ("ending", end)):
        write_task(
            tasks_folder,
            name,
            {**TASKS["written"], "generation_kwargs": {"until": [until], "max_gen_toks": 8}},
        )
    assert [record["ended"] for record in records_of("cut")] == [False] * len(DOCS)
    assert [record["ended"] for record in records_of("ending")] == [
        end in answer.text for answer in written
    ]
    assert not any("ended" in record for record in records_of("continued", "chosen"))


def changed(place: int, **changes: Any) -> list[Values]:
    """Return the documents with one that is changed; a field set to None is taken out of it."""
    docs = [dict(doc) for doc in DOCS]
    docs[place] = {
        name: value for name, value in {**docs[place], **changes}.items() if value is not None
    }
    return docs


@needs_library
@pytest.mark.parametrize(
    ("task", "docs", "fragments"),
    [
        (
            "chosen",
            changed(2, right=7),
            [
                "document 2 ",
                "7 as its right answer (doc_to_target)",
                "'south blue up'",
                "from 0 to 2",
            ],
        ),
        ("chosen", changed(2, right=-1), ["document 2 ", "-1 as its right answer"]),
        (
            "chosen",
            changed(2, right=None),
            ["document 2 ", "nothing as its 'right', which doc_to_target would show"],
        ),
        (
            "chosen",
            changed(3, question=None),
            ["document 3 ", "nothing as its 'question', which doc_to_text would show as 'None'"],
        ),
        ("chosen", changed(0, question=None), ["document 0 ", "'question'"]),
        (
            "chosen",
            changed(1, answers=None),
            ["document 1 ", "nothing as its 'answers', which doc_to_choice would show"],
        ),
        (
            "chosen",
            changed(1, answers=["red", ""]),
            ["document 1 ", "['red', ''] as its doc_to_choice"],
        ),
        ("continued", changed(4, text=None), ["document 4 ", "nothing as its 'text'"]),
        ("written", changed(4, text=None), ["document 4 ", "nothing as its 'text'"]),
        ("read", changed(5, text=None), ["document 5 ", "nothing as its 'text'"]),
    ],
)
def test_a_document_that_cannot_be_asked_is_refused_before_any_model(
    tasks_folder: Path, task: str, docs: list[Values], fragments: list[str]
) -> None:
    (tasks_folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    with pytest.raises(DataError) as refused:
        load_tasks(settings(task), 7, [tasks_folder])
    for fragment in (f"of the lm-eval task {task!r}", *fragments):
        assert fragment in str(refused.value)


@needs_library
def test_a_document_beyond_the_limit_is_not_asked(tasks_folder: Path) -> None:
    (tasks_folder / "docs.jsonl").write_text(
        "".join(json.dumps(doc) + "\n" for doc in changed(2, right=7))
    )
    assert load_tasks(settings("chosen", limit=2), 7, [tasks_folder]).names == ["chosen"]


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"doc_to_target": "rigth"},
            "document 0 of the lm-eval task 'odd' has 'rigth' as its right answer",
        ),
        (
            {"doc_to_target": "{{[right, 3]}}"},
            "document 0 of the lm-eval task 'odd' has 3 as its right answer",
        ),
        (
            {"doc_to_text": "{% if right == 2 %}{{ qestion }}{% else %}{{ question }}{% endif %}"},
            "document 2 .* does not fit doc_to_text",
        ),
        ({"doc_to_choice": "{{answers|first}}"}, "SyntaxError|NameError|ValueError"),
    ],
)
def test_a_field_that_gives_no_question_is_refused(
    tasks_folder: Path, change: Values, message: str
) -> None:
    write_task(tasks_folder, "odd", {**TASKS["chosen"], **change})
    with pytest.raises((DataError, RecipeError), match=message):
        load_tasks(settings("odd"), 7, [tasks_folder])


@needs_library
def test_what_is_not_filled_and_not_shown_is_no_fault(
    tasks_folder: Path, records_of: Callable[..., list[Values]]
) -> None:
    docs = [
        {**doc, **({"hint": "No colour."} if place else {}), "question": "None of it?"}
        for place, doc in enumerate(DOCS)
    ]
    (tasks_folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    text = "{% if hint is not none %}{{ hint }} {% endif %}{{ question }}"
    write_task(tasks_folder, "hinted", {**TASKS["chosen"], "doc_to_text": text})
    assert [record["kind"] for record in records_of("hinted")] == ["general"] * len(DOCS)


@needs_library
def test_a_right_answer_may_be_named_as_it_is_written(
    tasks_folder: Path, records_of: Callable[..., list[Values]]
) -> None:
    write_task(tasks_folder, "named", {**TASKS["chosen"], "doc_to_target": "{{answers[right]}}"})
    assert [record["gold"] for record in records_of("named")] == [
        record["gold"] for record in records_of("chosen")
    ]


@needs_library
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {name: value for name, value in TASKS["chosen"].items() if name != "doc_to_choice"},
            "has no doc_to_choice, which its output_type",
        ),
        (
            {name: value for name, value in TASKS["chosen"].items() if name != "doc_to_text"},
            r"odd.yaml \(TypeError; it has no doc_to_text\)",
        ),
        (
            {**TASKS["chosen"], "doc_to_text": "{{question"},
            "the lm-eval task 'odd' cannot be read from .*odd.yaml .*TemplateSyntaxError",
        ),
        (
            {**TASKS["chosen"], "doc_to_choice": "{{answrs}}"},
            "'odd' cannot be read from .* 'answrs' is undefined",
        ),
        ({**TASKS["chosen"], "test_split": "tset"}, "'odd' cannot be read from .* 'tset'"),
        ({**TASKS["chosen"], "doc_to_txt": "x"}, "'odd' cannot be read from .* 'doc_to_txt'"),
        (
            {
                **TASKS["chosen"],
                "metric_list": [
                    {"metric": "accu", "aggregation": "mean", "higher_is_better": True}
                ],
            },
            "no metric 'accu'",
        ),
        (
            {**TASKS["chosen"], "metric_list": [{"metric": "accu"}]},
            "'odd' cannot be read from .*KeyError",
        ),
        (
            {
                **TASKS["chosen"],
                "metric_list": [{"metric": "acc", "aggregation": "meen", "higher_is_better": True}],
            },
            "no aggregation of the metric 'acc'",
        ),
    ],
)
def test_a_task_file_with_a_fault_is_named(tasks_folder: Path, task: Values, message: str) -> None:
    write_task(tasks_folder, "odd", task)
    with pytest.raises(RecipeError, match=message):
        load_tasks(settings("odd"), 7, [tasks_folder])


@needs_library
def test_worked_examples_that_cannot_be_shown_are_refused(tasks_folder: Path) -> None:
    examples = "".join(json.dumps({**doc, "right": 5}) + "\n" for doc in DOCS)
    (tasks_folder / "shown.jsonl").write_text(examples)
    files = {
        "dataset_kwargs": {"data_files": {"test": "docs.jsonl", "train": "shown.jsonl"}},
        "fewshot_split": "train",
    }
    write_task(tasks_folder, "odd", {**TASKS["shown"], **files})
    with pytest.raises(
        DataError,
        match=r"the prompts of the lm-eval task 'odd' cannot be built .*; mend its worked examples",
    ):
        load_tasks(settings("odd"), 7, [tasks_folder])


@needs_library
def test_a_task_that_a_group_brings_again_is_refused(tasks_folder: Path) -> None:
    (tasks_folder / "both.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": ["chosen", "written"]})
    )
    assert load_tasks(settings("both"), 7, [tasks_folder]).names == ["chosen", "written"]
    with pytest.raises(RecipeError, match="names 'chosen' already where 'both' brings it again"):
        load_tasks(settings("chosen", "both"), 7, [tasks_folder])


@needs_library
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {**TASKS["written"], "generation_kwargs": {"do_sample": True, "temperature": 0.8}},
            "draws answers at random",
        ),
        ({**TASKS["written"], "unsafe_code": True}, "runs code that a model wrote"),
        ({**TASKS["chosen"], "output_type": "guess"}, "cannot be read"),
    ],
)
def test_a_task_that_is_not_done_here_is_refused(
    tasks_folder: Path, task: Values, message: str
) -> None:
    write_task(tasks_folder, "odd", task)
    with pytest.raises(RecipeError, match=message):
        load_tasks(settings("odd"), 7, [tasks_folder])


@needs_library
def test_data_that_is_not_there_is_refused(tasks_folder: Path) -> None:
    write_task(
        tasks_folder,
        "odd",
        {**TASKS["chosen"], "dataset_kwargs": {"data_files": {"test": "no.jsonl"}}},
    )
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tasks(settings("odd"), 7, [tasks_folder])


@needs_library
def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="include_path 'tasks' is no folder in"):
        load_tasks({**settings("chosen"), "include_path": "tasks"}, 7, [tmp_path])


@needs_library
def test_a_misspelt_task_is_answered_with_a_guess(tasks_folder: Path) -> None:
    with pytest.raises(RecipeError, match="has no 'hellaswagg'; did you mean 'hellaswag'"):
        load_tasks(settings("hellaswagg"), 7, [tasks_folder])


def test_without_the_library_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r"is not installed; run: pip install 'lora-pipeline\[lm-eval\]'"
    ):
        load_tasks(settings("chosen"), 7, [tmp_path])
