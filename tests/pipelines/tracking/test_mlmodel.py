"""A registered version in mlflow.pyfunc, and its files in PEFT: real adapters of a tiny base."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from registered import configure_store, register
from served_adapters import alone, save_adapter_of, save_sharp_base
from summaries import Summary, build

from lora_core.errors import BaseMismatchError
from lora_core.files import sha256_of_file
from pipelines.errors import PipelineError, RegistryError

mlflow = pytest.importorskip("mlflow")

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning"),  # MLflow's own
]
NAME = "callable"
TOKENS = 5
PROMPTS = ["Say red.", "What does this function do?"]
CODE = """
import json, sys
import mlflow
import pandas
model = mlflow.pyfunc.load_model("models:/callable@champion")
prompts, tokens = json.loads(sys.argv[1]), {"max_new_tokens": int(sys.argv[2])}
messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
found = [
    model.predict(prompts, params=tokens),
    model.predict(pandas.DataFrame({"prompt": prompts}), params=tokens),
    model.predict(pandas.DataFrame({"messages": messages}), params=tokens),
]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Registered:
    """The version, and what it was registered from."""

    runs: Path
    base: Path
    adapter: Path
    stored: Path
    """Folder of the version's files in the store."""


def with_adapter(summary: Summary, base: Path, folder: Path) -> Path:
    """Make a real adapter the files of rank 16; return their folder."""
    training = summary["models"]["rank-16"]["training"]
    adapter = save_adapter_of(base, folder / "train" / "adapter", seed=3)
    identity = json.loads((adapter / "adapter_identity.json").read_text())
    training["folder"] = str(adapter.parent)
    training["result"]["saved"]["adapter_sha256"] = identity["adapter_sha256"]
    (adapter.parent / "metrics.jsonl").write_text("")
    summary["base"] |= {"id": str(base), "digests": identity["base_digests"]}
    return adapter


@pytest.fixture(scope="module")
def version(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    folder = tmp_path_factory.mktemp("callable")
    summary = build(folder)
    for label in ("rank-64", "rank-4"):
        del summary["models"][label]
    summary["frontier"] = []
    base = save_sharp_base(folder)
    adapter = with_adapter(summary, base, folder)
    summary["models"]["control"]["training"]["folder"] = str(adapter.parent)
    summary["recipe"]["registry"]["model"] = NAME
    summary["recipe"]["base_model"]["quantization"] = "none"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("LORA_RUNS", str(runs))
        patch.chdir(folder)
        configure_store(runs)
        result = register(summary, runs)
        run = mlflow.MlflowClient().get_run(result.runs["rank-16"])
        stored = Path(run.info.artifact_uri.removeprefix("file://")) / "adapter"
        yield Registered(runs, base, adapter, stored)


def test_any_process_loads_the_champion_and_answers(version: Registered, tmp_path: Path) -> None:
    store = f"sqlite:///{version.runs / 'mlflow.db'}"
    environment = {"MLFLOW_TRACKING_URI": store, "LORA_RUNS": str(tmp_path / "runs")}
    ended = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(PROMPTS), str(TOKENS)],
        env={**os.environ, **environment, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    expected = [text.strip() for text in alone(version.base, version.adapter, PROMPTS, TOKENS)]
    assert expected != [text.strip() for text in alone(version.base, None, PROMPTS, TOKENS)]
    assert found == [expected] * 3


def test_only_the_adapter_is_stored(version: Registered) -> None:
    names = {path.name for path in version.stored.iterdir() if path.is_file()}
    assert names - {"registered_model_meta"} == {
        "MLmodel",
        "README.md",
        "adapter_config.json",
        "adapter_identity.json",
        "adapter_model.safetensors",
        "bom.cdx.json",
    }
    values = yaml.safe_load((version.stored / "MLmodel").read_text())
    assert values["metadata"]["base"] == str(version.base)
    assert values["metadata"]["base_fingerprints"]["dense"]
    assert [column["type"] for column in json.loads(values["signature"]["outputs"])] == ["string"]


def test_another_base_is_refused(version: Registered, tmp_path: Path) -> None:
    other = save_sharp_base(tmp_path, seed=1)
    with pytest.raises(BaseMismatchError):
        mlflow.pyfunc.load_model(f"models:/{NAME}@champion", model_config={"base": str(other)})


def test_swapped_files_are_refused(version: Registered, tmp_path: Path) -> None:
    """They agree with each other, but not with the registry."""
    other = save_adapter_of(version.base, tmp_path / "other", seed=9)
    sha256 = sha256_of_file(other / "adapter_model.safetensors")
    model = (version.stored / "MLmodel").read_text()
    own = sha256_of_file(version.adapter / "adapter_model.safetensors")
    kept = {path: path.read_bytes() for path in version.stored.iterdir() if path.is_file()}
    try:
        for path in other.iterdir():
            (version.stored / path.name).write_bytes(path.read_bytes())
        (version.stored / "MLmodel").write_text(model.replace(own, sha256))
        with pytest.raises(RegistryError, match="does not contain the adapter of its tag"):
            mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_file_that_names_other_code_is_refused(version: Registered, tmp_path: Path) -> None:
    from pipelines.tracking.mlmodel import mlmodel_objection, read_references

    values = yaml.safe_load((version.stored / "MLmodel").read_text())
    assert read_references(version.stored).base == str(version.base)
    values["flavors"]["python_function"]["loader_module"] = "os"
    (tmp_path / "MLmodel").write_text(yaml.safe_dump(values))
    problem = mlmodel_objection({}, tmp_path)
    assert problem is not None
    assert "the loader pipelines.workflow.pyfunc_model only" in problem


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["a"]},
        {"role": ["user"]},
        {"prompt": [{"role": "user", "content": "a"}]},
        {"messages": [[{"role": "user"}]]},
        {"messages": [[{"role": "nobody", "content": "a"}]]},
        {"prompt": ["a"], "messages": ["b"]},
    ],
)
def test_other_inputs_are_refused(columns: dict[str, list[object]]) -> None:
    import pandas

    from pipelines.workflow.pyfunc_model import prompts_in

    with pytest.raises(PipelineError, match="give a list of texts, or a table with one column"):
        prompts_in(pandas.DataFrame(columns))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_folder_with_the_same_logits(version: Registered, tmp_path: Path) -> None:
    """As the package's README shows it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lora_core import load_adapter
    from pipelines.tracking.registry import download

    folder = download(f"models:/{NAME}@champion", version.runs, tmp_path)
    ids = torch.arange(12).reshape(2, 6)
    base = AutoModelForCausalLM.from_pretrained(version.base)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, folder)(input_ids=ids).logits
        own = AutoModelForCausalLM.from_pretrained(version.base)
        load_adapter(own, folder)
        ours = own(input_ids=ids).logits
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
