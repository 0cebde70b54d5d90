"""Whether the folder of a model and the model loaded from it have one fingerprint, by architecture.

Every causal language model that transformers can build small, and encoders, encoder-decoders and
vision models. transformers renames, fuses and transposes weights of some of them on loading.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from families.configs import families, tiny_config
from families.measure import built
from parity.matrix.catalog import BOTH, CLASSIFIER, ENCODER, SUBJECTS, VISION
from parity.models import Build
from parity.rows import Row, at_most, figure
from torch import nn
from transformers import PreTrainedModel

from lora_core import fingerprint, fingerprint_of_folder

KINDS = (CLASSIFIER, ENCODER, BOTH, VISION)
"""Kinds of models in the matrix that are no causal language models."""
QUICK = ("gpt_neox", "mixtral")
"""The families of --quick."""


@dataclass(frozen=True)
class Comparison:
    """What was found for one architecture."""

    folder_agrees: bool
    """The folder has the fingerprint of the model that was saved in it."""
    reload_agrees: bool
    """The model loaded from the folder has it too."""
    is_restored: bool
    """The loaded model has the weights of the saved one."""


def fingerprint_rows() -> Iterator[Row]:
    """Yield the number of architectures that agree, and each that does not."""
    builders: dict[str, Build] = {name: partial(_family, name) for name in families()}
    for subject in SUBJECTS:
        if subject.kind in KINDS:
            builders[f"{subject.name} ({subject.kind})"] = subject.build
    yield from _rows(builders)


def quick_fingerprint_rows() -> Iterator[Row]:
    """Yield the same for a few families whose weights transformers renames or fuses."""
    yield from _rows({name: partial(_family, name) for name in QUICK})


def _rows(builders: Mapping[str, Build]) -> Iterator[Row]:
    found: dict[str, Comparison] = {}
    failed = 0
    for name, build in builders.items():
        model = _model_or_none(build)
        failed += model is None
        if isinstance(model, PreTrainedModel):
            found[name] = compared(model)
    yield figure("architectures compared", len(found))
    yield figure("not constructible at this size", failed)
    others = [name for name, one in found.items() if not one.folder_agrees]
    yield at_most(_named("folder and model differ", others), len(others), 0)
    altered = [name for name, one in found.items() if not one.is_restored]
    others = [name for name, one in found.items() if not one.reload_agrees]
    wrong = sorted(set(others) ^ set(altered))
    yield at_most(_named("reloaded model recognized wrongly", wrong), len(wrong), 0)
    yield figure(_named("transformers loads other weights than it saved", altered), len(altered))


def compared(model: PreTrainedModel) -> Comparison:
    """Save a model, and compare its fingerprint with those of its folder and of a reloaded one."""
    expected = fingerprint(model)
    with TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        again = type(model).from_pretrained(scratch)
        loaded = again.state_dict()
        pairs = [(tensor, loaded[name]) for name, tensor in model.state_dict().items()]
        return Comparison(
            folder_agrees=fingerprint_of_folder(Path(scratch)) == expected,
            reload_agrees=fingerprint(again) == expected,
            is_restored=all(torch.equal(tensor, other) for tensor, other in pairs),
        )


def _model_or_none(build: Build) -> nn.Module | None:
    """Return a model; None if transformers cannot build it from a small config."""
    try:
        return build()
    except Exception:  # noqa: BLE001 - transformers raises errors of every kind
        return None


def _family(name: str) -> PreTrainedModel:
    return built(tiny_config(name))


def _named(what: str, names: list[str]) -> str:
    return f"{what} ({', '.join(names)})" if names else what
