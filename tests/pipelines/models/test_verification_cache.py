"""A verification is shared by what is read in the same way, and by nothing else."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lora_core import LoraConfig, inject
from pipelines.models import verification_cache
from pipelines.models.checked import Architecture
from pipelines.models.measurement import Probe
from pipelines.models.packs import Pack, pack
from pipelines.models.support import enable_checkpointing
from pipelines.models.verification_cache import (
    VerificationCache,
    architecture_key,
    training_key,
)
from pipelines.runtime.interfaces.verified import Verified

Family = Callable[..., PreTrainedModel]
VERIFIED = Verified(
    path="one by one",
    own_head=True,
    examples=4,
    longest=90,
    loss_difference=1e-6,
    gradient_difference=None,
    loss_tolerance=1e-4,
    gradient_tolerance=1e-3,
    rejected=("not packed: it has a recurrent state",),
)


def test_a_verification_is_read_as_it_was_written(tmp_path: Path) -> None:
    cache = VerificationCache(tmp_path / "runs" / "train" / "rank-4-0123")
    cache.save("a" * 64, VERIFIED)
    cache.save("b" * 64, Architecture(longest={False: 90, True: 12}, is_packed=False))
    other = VerificationCache(tmp_path / "runs" / "train" / "rank-16-4567")
    assert other.load("a" * 64, Verified) == VERIFIED
    architecture = other.load("b" * 64, Architecture)
    assert architecture is not None
    assert (architecture.longest, architecture.is_packed) == ({False: 90, True: 12}, False)


@pytest.mark.parametrize("text", ["", "{", '{"path": "packed"}', "[]", '{"longest": {}}'])
def test_a_damaged_file_is_no_verification(tmp_path: Path, text: str) -> None:
    cache = VerificationCache(tmp_path / "runs" / "train" / "rank-4-0123")
    assert cache.load("a" * 64, Verified) is None
    cache.save("a" * 64, VERIFIED)
    (file,) = (tmp_path / "runs" / "verified").iterdir()
    file.write_text(text)
    assert cache.load("a" * 64, Verified) is None


def test_an_architecture_is_its_config_and_its_dtype(family: Family) -> None:
    keys = {
        "the same": architecture_key(family("mistral")),
        "another window": architecture_key(family("mistral", sliding_window=5)),
        "another dtype": architecture_key(family("mistral").to(torch.bfloat16)),
        "another family": architecture_key(family("llama")),
    }
    assert len(set(keys.values())) == 4
    renamed = family("mistral")
    renamed.config._name_or_path = "elsewhere"
    assert architecture_key(renamed) == keys["the same"]


def key_of(
    family: Family,
    examples: Pack,
    *,
    rank: int = 4,
    targets: str | tuple[str, ...] = "all-linear",
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    **settings: Any,
) -> str:
    model = family("llama")
    inject(model, LoraConfig(r=rank, lora_alpha=8, target_modules=targets), seed=rank)
    if checkpointing:
        enable_checkpointing(model)
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    probes = [Probe(examples, gradient=True)]
    return training_key(model, probes, trained, dtype=dtype, settings=settings)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_trainings_share_a_verification_whatever_their_rank(
    family: Family, examples_pack: Pack
) -> None:
    first = key_of(family, examples_pack, base="one")
    assert key_of(family, examples_pack, base="one", rank=16) == first
    other = pack([{"input_ids": [1, 2, 3], "supervised": [False, True, True]}], "cpu")
    keys = [
        first,
        key_of(family, other, base="one"),
        key_of(family, examples_pack, base="another"),
        key_of(family, examples_pack, base="one", targets=("q_proj",)),
        key_of(family, examples_pack, base="one", dtype=torch.bfloat16),
        key_of(family, examples_pack, base="one", checkpointing=True),
    ]
    assert len(set(keys)) == len(keys)


def test_a_verification_is_of_the_code_that_reads(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of this software, or of the code that comes with a base, is verified again."""
    model = family("mistral")
    before = architecture_key(model)
    module = sys.modules[type(model).__module__]
    with monkeypatch.context() as patch:
        patch.setattr(module, "__transformers_module_hash__", "another", raising=False)
        assert architecture_key(model) != before
    monkeypatch.setattr(verification_cache, "_code_digest", lambda: "another")
    assert architecture_key(model) != before
