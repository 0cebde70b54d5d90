"""Every export of an adapter with two ranks, two alphas and rsLoRA gives the adapter's logits.

The exports are read by other programs. vLLM needs a GPU: instead, its loader's rules are applied to
the folder, and its single scale to the tensors.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from parity.cases import FLOAT32, case
from parity.features import adapted, parts_of_largest
from parity.models import llama
from parity.readers import Updates, gguf_objections, gguf_updates, vllm_objections, vllm_updates
from parity.rows import Row, at_most
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_core import merge
from lora_core.export.export import export_gguf, export_merged, export_peft, export_vllm

ONE = case(
    llama,
    r=6,
    target_modules="all-linear",
    rank_pattern={"q_proj": 2},
    alpha_pattern={"layers.0.self_attn.k_proj": 3},
    use_rslora=True,
)
MAX_RANK = 16


def export_rows() -> Iterator[Row]:
    """Yield, for each export, its reader's objections and the difference of the logits."""
    with TemporaryDirectory() as scratch, torch.no_grad():
        folder = Path(scratch)
        model = adapted(ONE, folder / "adapter")
        expected = ONE.logits(model)
        for rows in (_peft_rows, _vllm_rows, _gguf_rows):
            yield from rows(folder, expected)
        yield from _merged_rows(folder, model)


def _peft_rows(folder: Path, expected: Tensor) -> Iterator[Row]:
    export_peft(folder / "adapter", folder / "peft")
    yield _logits(
        "PEFT's folder, loaded by PEFT",
        PeftModel.from_pretrained(ONE.base(), folder / "peft"),
        expected,
    )


def _vllm_rows(folder: Path, expected: Tensor) -> Iterator[Row]:
    export_vllm(folder / "adapter", folder / "vllm", max_rank=MAX_RANK)
    objections = vllm_objections(folder / "vllm", ONE.base(), MAX_RANK)
    yield at_most(
        "vLLM's folder: what its loader would refuse or misread", len(objections), 0, "objections"
    )
    yield _logits(
        "vLLM's folder, with one rank and one scale",
        _with_updates(vllm_updates(folder / "vllm")),
        expected,
    )
    yield _logits(
        "vLLM's folder, loaded by PEFT",
        PeftModel.from_pretrained(ONE.base(), folder / "vllm"),
        expected,
    )


def _gguf_rows(folder: Path, expected: Tensor) -> Iterator[Row]:
    base = ONE.base()
    (folder / "config.json").write_text(base.config.to_json_string(), encoding="utf-8")
    export_gguf(folder / "adapter", folder / "adapter.gguf", base_config=folder)
    objections = gguf_objections(folder / "adapter.gguf", base)
    yield at_most(
        "GGUF, read by gguf: what llama.cpp would refuse", len(objections), 0, "objections"
    )
    updates = gguf_updates(
        folder / "adapter.gguf", base.config.num_attention_heads, base.config.num_key_value_heads
    )
    yield _logits("GGUF, read by gguf", _with_updates(updates), expected)


def _merged_rows(folder: Path, model: nn.Module) -> Iterator[Row]:
    ONE.base().save_pretrained(folder / "base")
    export_merged(folder / "base", folder / "adapter", folder / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "merged")
    theirs = PeftModel.from_pretrained(ONE.base(), folder / "adapter").merge_and_unload()
    yield _logits("merged folder in transformers", loaded, ONE.logits(model))
    yield _logits("merged folder in transformers, PEFT's merge", loaded, ONE.logits(theirs))
    merge(model)
    yield _logits("merged folder in transformers, our merge in memory", loaded, ONE.logits(model))


def _with_updates(updates: Updates) -> nn.Module:
    """Return the base with each ΔW added to its weight."""
    model = ONE.base()
    for name, delta in updates.items():
        model.get_submodule(name).weight += delta
    return model


def _logits(what: str, model: nn.Module, expected: Tensor) -> Row:
    difference = parts_of_largest(ONE.logits(model.eval()), expected)
    return at_most(f"{what}: logits", difference, FLOAT32.logits)
