"""One case in both libraries: the models and files that the checks compare, each made once."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from parity.cases import Case
from parity.features import parts_of_largest, shake, trained
from parity.matrix.comparison import Bits, bits_of, equal_bits, logged
from parity.matrix.configurations import Configuration
from parity.matrix.outcome import Absent, ReferenceDiffers, ReferenceRefuses, Wrong, of_peft
from parity.matrix.subjects import Subject
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core import Identity, LoraConfig, LoraError, inject, load_adapter, save_adapter
from lora_core.errors import ConfigError
from lora_core.modules import adapter_parts

SETTINGS = frozenset(field.name for field in fields(LoraConfig))


@dataclass(frozen=True)
class Start:
    """The adapter before training."""

    logits: Tensor
    shapes: Mapping[str, tuple[int, ...]]
    """Key in the file → shape, for everything that is trained."""


class Base:
    """A subject's model, which is never changed.

    Attributes:
        model: the model.
        folder: an empty folder for its files.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model = model
        self.folder = folder

    @cached_property
    def checkpoint(self) -> Path:
        """The folder in which transformers saved the model.

        Raises:
            Absent: it is not a model of transformers.
        """
        if not isinstance(self.model, PreTrainedModel):
            raise Absent("not a model of transformers")
        folder = self.folder / "base"
        self.model.save_pretrained(folder)
        return folder


class Trial:
    """A case, with its models and files; nothing that it returns may be changed.

    Attributes:
        case: the model and the settings.
        base: the model, which all cases of a subject share.
        folder: an empty folder for the files.
        announced: the warnings of our save.
    """

    def __init__(self, case: Case, base: Base, folder: Path) -> None:
        self.case = case
        self.base = base
        self.folder = folder
        self.announced: list[str] = []

    @property
    def config(self) -> LoraConfig:
        """The settings as our config.

        Raises:
            ConfigError: our config lacks one of them, or refuses its value.
        """
        unknown = sorted(self.case.fields.keys() - SETTINGS)
        if unknown:
            raise ConfigError(f"LoraConfig has no setting {unknown[0]}")
        return self.case.config

    @cached_property
    def base_logits(self) -> Tensor:
        return self.logits(self.base.model)

    @cached_property
    def bits(self) -> Bits:
        return bits_of(self.base.model)

    @cached_property
    def start(self) -> Start:
        return self._ours[1]

    @property
    def ours(self) -> nn.Module:
        """Our adapter, changed from its initialization."""
        return self._ours[0]

    @cached_property
    def our_logits(self) -> Tensor:
        return self.logits(self.ours)

    @cached_property
    def our_file(self) -> Path:
        return self.saved(self.ours, "ours")

    @cached_property
    def theirs(self) -> PeftModel:
        """PEFT's adapter, changed from its initialization."""
        return self._theirs[0]

    @cached_property
    def their_start(self) -> Start:
        return self._theirs[1]

    @cached_property
    def their_logits(self) -> Tensor:
        with of_peft():
            return self.logits(self.theirs)

    @cached_property
    def their_file(self) -> Path:
        folder = self.folder / "theirs"
        model = self.theirs
        options: dict[str, Any] = {}
        if self.case.is_spectral:
            options = {"path_initial_model_for_weight_conversion": str(self._their_start_file)}
        with of_peft():
            model.save_pretrained(str(folder), **options)
        return folder

    @cached_property
    def in_peft(self) -> PeftModel:
        """Our file, loaded by PEFT.

        Raises:
            Wrong: PEFT refuses our file, but not its own.
        """
        folder = self.our_file
        try:
            return self.loaded_by_peft(folder).eval()
        except ReferenceRefuses as error:
            self.loaded_by_peft(self.their_file)
            raise Wrong(f"PEFT cannot load our file: {error}") from error

    @cached_property
    def logits_in_peft(self) -> Tensor:
        """What PEFT computes with our file.

        Raises:
            Wrong: PEFT raises with our file, but not with its own.
        """
        model = self.in_peft
        try:
            return self.logits(model)
        except (TypeError, ValueError, RuntimeError) as error:
            self.their_logits  # noqa: B018 - raises if PEFT refuses the case itself
            raise Wrong(f"PEFT raises with our file: {error}") from error

    @cached_property
    def here(self) -> nn.Module:
        """PEFT's file, loaded by us.

        Raises:
            ReferenceRefuses: neither we nor PEFT load it.
            ReferenceDiffers: we do not load it, and PEFT loads something else than it saved.
        """
        try:
            return self.loaded(self.their_file)
        except LoraError:
            again = self.logits(self.loaded_by_peft(self.their_file).eval())
            if not parts_of_largest(again, self.their_logits) <= self.case.tolerance.logits:
                raise ReferenceDiffers("PEFT does not load what it saved") from None
            raise

    @cached_property
    def pair(self) -> tuple[nn.Module, PeftModel]:
        """Both with our file and the gradients of one loss; without dropout, in training."""
        if self.case.is_spectral:
            raise Absent("our file has twice the rank of what is trained")
        self.logits_in_peft  # noqa: B018 - raises if PEFT cannot run the model with our file
        pair = (deepcopy(self.ours), deepcopy(self.in_peft))
        for model in pair:
            model.train(self.in_training)
            self.loss(model).backward()
        return pair

    def fresh(self) -> nn.Module:
        """Return another copy of the base."""
        return deepcopy(self.base.model)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        return self.case.logits(model).detach().clone()

    @property
    def in_training(self) -> bool:
        """Whether gradients are compared in training mode: not with dropout."""
        return not self.config.lora_dropout

    def loss(self, model: nn.Module) -> Tensor:
        """Return a loss that no norm at the end of the model makes constant."""
        logits = self.case.logits(model)
        generator = torch.Generator().manual_seed(7)
        return ((logits * torch.randn(logits.shape, generator=generator)) ** 2).mean()

    def loaded(self, folder: Path) -> nn.Module:
        """Return a model that loaded a file; a refusal must leave it unchanged."""
        model = self.fresh()
        with self.unchanged_if_refused(model):
            load_adapter(model, folder)
        return model

    def saved(self, model: nn.Module, name: str) -> Path:
        """Save our adapter in a new folder."""
        folder = self.folder / name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save_adapter(model, folder, self.config, Identity())
        self.announced += [str(warning.message) for warning in caught]
        return folder

    def loaded_by_peft(self, folder: Path) -> PeftModel:
        """Return PEFT's model with a file, to be trained further."""
        with of_peft():
            return PeftModel.from_pretrained(self.fresh(), str(folder), is_trainable=True)

    @contextmanager
    def unchanged_if_refused(self, model: nn.Module) -> Iterator[None]:
        """Check that a refusal inside the block leaves `model` as the base is."""
        trainable = [parameter.requires_grad for parameter in model.parameters()]
        try:
            yield
        except LoraError:
            if next(adapter_parts(model), None) is not None:
                raise Wrong("a refusal left parts of an adapter in the model") from None
            if not equal_bits(bits_of(model), self.bits):
                raise Wrong("a refusal changed weights") from None
            if [parameter.requires_grad for parameter in model.parameters()] != trainable:
                raise Wrong("a refusal changed what is trained") from None
            raise

    @cached_property
    def _ours(self) -> tuple[nn.Module, Start]:
        model = self.fresh()
        with self.unchanged_if_refused(model), logged() as messages:
            inject(model, self.config, seed=1)
        self.announced += messages
        start = self._start_of(model)
        shake(trained(model))
        return model, start

    @cached_property
    def _theirs(self) -> tuple[PeftModel, Start]:
        with of_peft():
            model = get_peft_model(self.fresh(), self.case.in_peft).eval()
            start = self._start_of(model)
            if self.case.is_spectral:
                model.save_pretrained(str(self._their_start_file))
            shake(trained(model))
        return model, start

    @property
    def _their_start_file(self) -> Path:
        return self.folder / "start"

    def _start_of(self, model: nn.Module) -> Start:
        shapes = {key: tuple(tensor.shape) for key, tensor in trained(model).items()}
        return Start(self.logits(model), shapes)


def trial_of(
    subject: Subject, configuration: Configuration, base: nn.Module, folder: Path
) -> Trial:
    """Return the trial of a configuration on a subject, whose model is `base`."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": subject.targets}
    case = Case(
        build=subject.build,
        fields={**settings, **configuration.fields(subject)},
        peft={**subject.peft, **configuration.peft(subject)},
        tolerance=subject.tolerance,
        inputs=subject.inputs,
    )
    return Trial(case, base, folder)
