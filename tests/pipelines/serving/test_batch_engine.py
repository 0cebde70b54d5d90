"""The engine in this process: which requests share a batch, and which adapter answers them."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import served_adapters
import torch
from served_adapters import SmallRegistry, alone, register_adapter, save_adapter_of

from lora_core.adapter.json_files import read_identity
from pipelines.data.conversation import Message
from pipelines.errors import PipelineError, RegistryError
from pipelines.models.hardware import Hardware
from pipelines.models.loading import load_model
from pipelines.models.tokenizer import load_tokenizer
from pipelines.tracking.pull_lock import LockedBase
from pipelines.tracking.references import Reference
from pipelines.workflow.serving.answer_row import AnswerEvent, AnswerFailure, AnswerRow, TextPiece
from pipelines.workflow.serving.batch_engine import BankAdapter, GenerationEngine, GenerationJob
from pipelines.workflow.serving.options import ServeOptions
from pipelines.workflow.serving.prompts import chat_tokens
from pipelines.workflow.serving.sampling import SamplingOptions
from pipelines.workflow.serving.served_models import AdapterSource, Catalog

pytest.importorskip("mlflow")
CPU = Hardware("cpu", torch.float32, "gloo")
PROMPT = "Say red."
TOKENS = 12
FAILED = "failed: "


class Waiting:
    """Submits requests while the engine is busy, and collects their answers."""

    def __init__(self, engine: GenerationEngine, base: Path) -> None:
        self._engine = engine
        self._tokenizer = load_tokenizer(base)
        self._ended: list[threading.Event] = []
        self._pieces: list[list[str]] = []

    def submit(self, adapter: BankAdapter | None) -> None:
        ended = threading.Event()
        pieces: list[str] = []

        def emit(event: AnswerEvent) -> None:
            if isinstance(event, TextPiece):
                pieces.append(event.text)
                return
            if isinstance(event, AnswerFailure):
                pieces.append(f"{FAILED}{event.message}")
            ended.set()

        tokens = chat_tokens(self._tokenizer, [Message("user", PROMPT)])
        options = SamplingOptions(TOKENS, temperature=0)
        ends = [int(self._tokenizer.eos_token_id)]
        row = AnswerRow(tokens, options, self._tokenizer, ends, emit)
        self._ended.append(ended)
        self._pieces.append(pieces)
        self._engine.submit(GenerationJob(adapter, row))

    def answers(self) -> list[str]:
        assert all(ended.wait(240) for ended in self._ended)
        texts = ["".join(pieces) for pieces in self._pieces]
        assert not any(FAILED in text for text in texts), texts
        return texts


@pytest.fixture
def engine(sharp_base: Path) -> Iterator[GenerationEngine]:
    engine = GenerationEngine(load_model(sharp_base, "none", CPU), batch=8, queue=8)
    yield engine
    engine.close()


def load(engine: GenerationEngine, folder: Path) -> BankAdapter:
    identity = read_identity(folder) or {}
    return engine.load(identity["adapter_sha256"], folder)


def expected(base: Path, *folders: Path | None) -> list[str]:
    return [alone(base, folder, [PROMPT], TOKENS)[0] for folder in folders]


def test_a_request_that_waits_keeps_an_adapter_that_is_no_longer_served(
    engine: GenerationEngine, small_registry: SmallRegistry
) -> None:
    old_folder = small_registry.folders["sales"]
    new_folder = small_registry.folders["later"]
    waiting = Waiting(engine, small_registry.base)
    old = load(engine, old_folder)
    engine.keep([old.digests])
    waiting.submit(old)
    new = load(engine, new_folder)
    waiting.submit(old)
    waiting.answers()  # a batch ends while the new one is loaded and not yet served
    engine.keep([new.digests])
    waiting.submit(old)  # of a request that was given the old one before
    waiting.submit(new)
    old_text, new_text = expected(small_registry.base, old_folder, new_folder)
    assert waiting.answers() == [old_text, old_text, old_text, new_text]
    assert old_text != new_text
    engine.keep([new.digests])
    waiting.submit(old)
    with pytest.raises(AssertionError, match="send it again"):
        waiting.answers()


def test_adapters_that_cannot_be_mixed_are_answered_in_separate_batches(
    engine: GenerationEngine,
    small_registry: SmallRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_adapters, "STRENGTH", 0.5)
    sales = small_registry.folders["sales"]
    weights = save_adapter_of(
        small_registry.base,
        tmp_path / "weights",
        seed=4,
        target_modules=(),
        target_parameters=("mlp.gate_proj.weight",),
    )
    unmixable = load(engine, weights)
    mixable = load(engine, sales)
    assert (unmixable.is_mixable, mixable.is_mixable) == (False, True)
    waiting = Waiting(engine, small_registry.base)
    for adapter in (None, unmixable, mixable, unmixable, None):
        waiting.submit(adapter)
    base_text, weights_text, sales_text = expected(small_registry.base, None, weights, sales)
    assert waiting.answers() == [base_text, weights_text, sales_text, weights_text, base_text]
    assert len({base_text, weights_text, sales_text}) == 3
    assert engine.status.largest_mix <= 2


def test_adapters_of_another_base_or_template_are_not_served(
    engine: GenerationEngine, small_registry: SmallRegistry, tmp_path: Path
) -> None:
    base = small_registry.base
    runs = small_registry.runs
    source = AdapterSource(runs, ServeOptions(to=str(tmp_path / "pulled")))
    sales = source.pull(Reference("sales", version="1"))
    catalog = Catalog(source, engine, base, sales.lock.base)
    catalog.add(Reference("sales", version="1"), sales)
    _check_other_scale(catalog, small_registry, tmp_path / "scale")
    assert set(catalog.models) == {"sales/1", "scale@champion"}
    elsewhere = LockedBase(
        id="other", revision="", quantization="none", fingerprints={"dense": "values-1:0"}
    )
    for changes, reason in (
        ({"base": elsewhere}, "serve it with another `lora serve`"),
        ({"base": sales.lock.base.model_copy(update={"quantization": "nf4"})}, "quantization nf4"),
        ({"base": sales.lock.base.model_copy(update={"fingerprints": {}})}, "no fingerprint"),
    ):
        other = sales.model_copy(update={"lock": sales.lock.model_copy(update=changes)})
        with pytest.raises(RegistryError, match=reason):
            catalog.add(Reference("sales", version="1"), other)
    folder = save_adapter_of(base, tmp_path / "template", seed=7, template_sha256="ab" * 32)
    register_adapter(runs, "template", folder)
    pulled = source.pull(Reference("template", version="1"))
    with pytest.raises(PipelineError, match="trained with the chat template abababababab"):
        catalog.add(Reference("template", version="1"), pulled)


def _check_other_scale(catalog: Catalog, registry: SmallRegistry, folder: Path) -> None:
    """A version with the same weights and another scale is pulled again and served."""
    reference = Reference("scale", alias="champion")
    for alpha in (8, 16):
        save_adapter_of(registry.base, folder, seed=1, lora_alpha=alpha)
        version = register_adapter(registry.runs, "scale", folder)
        if alpha == 8:
            catalog.add(reference, catalog.source.pull(reference))
        else:
            catalog.follow(reference)
        served = catalog.models["scale@champion"]
        assert (served.version, served.reload_error) == (version, "")
        assert served.adapter_sha256 == catalog.models["sales/1"].adapter_sha256
        pulled = catalog.source.pull(reference)
        config = json.loads(Path(pulled.folder, "adapter_config.json").read_text())
        assert config["lora_alpha"] == alpha
        assert served.adapter is not None
        assert served.adapter.digests == pulled.lock.registered_digests
