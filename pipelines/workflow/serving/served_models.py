"""The models of a server: adapters from the registry, verified, and the base.

An adapter that is named by an alias follows it. A request keeps the adapter that it was given.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_core.errors import LoraError
from pipelines.console import print_status
from pipelines.errors import PipelineError, RegistryError
from pipelines.evaluation.generation import all_end_tokens
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model
from pipelines.models.support import context_tokens
from pipelines.models.tokenizer import load_tokenizer
from pipelines.tracking.connection import connect, reading
from pipelines.tracking.pull_lock import LockedBase
from pipelines.tracking.pulled import PulledAdapter, PullRequest, pull, registered_digests
from pipelines.tracking.references import Reference
from pipelines.workflow.adapter_base import named_base
from pipelines.workflow.local_base import base_finder
from pipelines.workflow.serving.batch_engine import BankAdapter, GenerationEngine
from pipelines.workflow.serving.options import ServeOptions
from pipelines.workflow.trained_prompts import trained_prompts

VERIFIED_TOKENS = 256
"""Prompts of up to so many tokens are verified at the start."""


@dataclass(frozen=True)
class ServedModel:
    """What the `model` field of a request names."""

    id: str
    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[int, ...]
    """Tokens that end an answer."""
    adapter: BankAdapter | None = None
    """None for the base."""
    version: str = ""
    """Of the registered model; empty for the base."""
    adapter_sha256: str = ""
    """Of the registered weights; empty for the base."""
    reload_error: str = ""
    """Why a newer version is not served; empty if there is none."""


@dataclass(frozen=True)
class AdapterSource:
    """Where adapters come from."""

    runs: Path
    """Folder of all runs."""
    options: ServeOptions

    def pull(self, reference: Reference) -> PulledAdapter:
        """Return an adapter's verified folder.

        Raises:
            RegistryError: see `pipelines.tracking.pulled.pull`.
        """
        folder = Path(self.options.to) if self.options.to else self.runs / "pulled"
        finder = base_finder(self.runs, self.options.base)
        return pull(PullRequest(str(reference), folder, "peft", finder), self.runs)

    def registered(self, reference: Reference) -> tuple[str, str]:
        """Return version and digests of what a reference names in the registry now.

        Raises:
            RegistryError: there is no such version, or the server does not answer.
        """
        with connect(self.runs, reading(reference.name)) as client:
            version = reference.resolve(client)
            return str(version.version), registered_digests(version)


@dataclass
class Catalog:
    """The served models by id."""

    source: AdapterSource
    engine: GenerationEngine
    base_folder: Path
    base: LockedBase
    """As the registry describes it."""
    models: dict[str, ServedModel] = field(default_factory=dict)
    """Replaced, never changed, so that other threads can read it."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer."""
        limit = context_tokens(self.engine.model.config)
        own = self.source.options.context
        return own if limit is None else min(own, limit)

    def add_base(self) -> None:
        """Serve the base alone, under its hub id or the name of its folder or file."""
        is_path = Path(self.base.id).exists() or self.base.id.startswith("/")
        model_id = Path(self.base.id).name if is_path else self.base.id
        trusted = self.source.options.trust_remote_code
        tokenizer = load_tokenizer(self.base_folder, trust_remote_code=trusted)
        ends = all_end_tokens(self.engine.model, tokenizer, ())
        self._put(ServedModel(model_id, tokenizer, ends))

    def add(self, reference: Reference, pulled: PulledAdapter) -> None:
        """Load a pulled adapter and serve it from now on, instead of what had its name.

        Raises:
            PipelineError: it was trained on another base or on one that is stored in another way,
                or its chat template is not the one of its training.
            LoraError: its files are not valid.
        """
        self._check_base(reference, pulled)
        folder = Path(pulled.folder)
        trusted = self.source.options.trust_remote_code
        trained = trained_prompts(folder, self.base_folder, trust_remote_code=trusted)
        lock = pulled.lock
        adapter = self.engine.load(lock.registered_digests, folder)
        served = ServedModel(
            id=str(reference),
            tokenizer=trained.tokenizer,
            end_tokens=all_end_tokens(self.engine.model, trained.tokenizer, trained.end_tokens),
            adapter=adapter,
            version=lock.version,
            adapter_sha256=lock.adapter_sha256,
        )
        self._put(served)
        self._keep_served()

    def follow(self, reference: Reference) -> None:
        """Serve another version if the alias has moved; if that fails, keep the present one."""
        present = self.models[str(reference)]
        assert present.adapter is not None, "a reference names an adapter"
        try:
            version, digests = self.source.registered(reference)
            if digests != present.adapter.digests:
                self.add(reference, self.source.pull(reference))
                new = self.models[str(reference)]
                print_status(f"{reference}: version {new.version} replaces {present.version}")
            elif (version, "") != (present.version, present.reload_error):
                self._put(replace(present, version=version, reload_error=""))
        except (PipelineError, LoraError, OSError) as error:
            reason = str(error)
            if reason != present.reload_error:
                print_status(f"{reference}: still version {present.version}: {reason}")
            self._put(replace(present, reload_error=reason))

    def _check_base(self, reference: Reference, pulled: PulledAdapter) -> None:
        base = pulled.lock.base
        if not base.fingerprints:
            raise RegistryError(
                f"{reference} has no fingerprint of its base, so that the base cannot be verified; "
                "serve a version that `lora run` registered"
            )
        is_same = base.fingerprints.items() & self.base.fingerprints.items()
        if not is_same or storage_of(base) != storage_of(self.base):
            raise RegistryError(
                f"{reference} was trained on {base.id!r} with quantization {storage_of(base)}, and "
                f"this server has {self.base.id!r} with {storage_of(self.base)}; serve it with "
                "another `lora serve`"
            )

    def _put(self, model: ServedModel) -> None:
        self.models = {**self.models, model.id: model}

    def _keep_served(self) -> None:
        adapters = [model.adapter for model in self.models.values()]
        self.engine.keep([adapter.digests for adapter in adapters if adapter is not None])


def storage_of(base: LockedBase) -> str:
    """Return nf4 or none: how the weights of a base are stored in memory."""
    return base.quantization or "none"


def open_catalog(references: Sequence[Reference], source: AdapterSource) -> Catalog:
    """Pull adapters, load their base, and return the models that are served.

    Args:
        references: at least one; the first one determines the base.
        source: where they come from.

    Raises:
        RegistryError: one does not exist, is not verified, or belongs to another base.
        LoraError: the files of one are not valid.
    """
    options = source.options
    pulled = [source.pull(reference) for reference in references]
    base = pulled[0].lock.base
    folder = Path(pulled[0].base) if pulled[0].base else named_base(base.id, source.runs)
    print_status(f"loading {base.id}")
    trusted = options.trust_remote_code
    model = load_model(folder, storage_of(base), detect(), trust_remote_code=trusted)
    engine = GenerationEngine(model, batch=options.batch, queue=options.queue)
    catalog = Catalog(source, engine, folder, base)
    engine.verify(max(2, min(catalog.context // 2, VERIFIED_TOKENS)))
    catalog.add_base()
    for reference, adapter in zip(references, pulled, strict=True):
        catalog.add(reference, adapter)
    return catalog


class AliasWatcher:
    """A thread that follows the aliases of a catalog."""

    def __init__(self, catalog: Catalog, references: Sequence[Reference], seconds: float) -> None:
        """Start to look, every few seconds, where the aliases are; versions do not move."""
        self._catalog = catalog
        self._references = [reference for reference in references if reference.alias]
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="aliases", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """End the thread; wait for it, in case it is loading a version.

        Args:
            seconds: to wait; a registry may not answer for longer.
        """
        self._ended.set()
        self._thread.join(seconds)

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            for reference in self._references:
                if not self._ended.is_set():
                    self._catalog.follow(reference)
