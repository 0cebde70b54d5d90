"""The adapters of a run in llama.cpp and here: the exported GGUF on the run's base, in float32.

llama.cpp rounds the inputs of a quantized base to 8 bits, so the base is written again with its
dequantized values. llama.cpp is not a dependency: if it cannot be imported, the section is omitted.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from parity.peft_rows import TOLERANCE, held_out, largest, our_logits
from parity.rows import LeftOut, Row, at_least, at_most, has_rank
from torch import Tensor

from lora_core.export.export import export_gguf
from pipelines.models.base_model import EMBEDDED_PREFIX, embedded_file

EXAMPLES = 2


def llama_cpp_rows(summary: Row) -> Iterator[Row]:
    """Yield the difference of llama.cpp's logits from ours, for the base and each adapter.

    Raises:
        LeftOut: llama.cpp is not installed, or the base is not a GGUF file.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise LeftOut("llama_cpp is not importable; `pip install llama-cpp-python` compiles it")
    folder, sequences = Path(summary["base"]["folder"]), held_out(summary)[:EXAMPLES]
    with TemporaryDirectory() as scratch:
        base = write_dense(gguf_of(summary), Path(scratch) / "base.gguf")
        plain = llama_cpp_logits(base, None, sequences)
        yield at_most(
            "base: llama.cpp's logits less ours",
            largest(plain, our_logits(folder, None, "none", sequences)),
            TOLERANCE,
        )
        for label, model in summary["models"].items():
            if not has_rank(model):
                continue
            adapter, exported = (
                Path(model["training"]["folder"]) / "adapter",
                Path(scratch) / f"{label}.gguf",
            )
            export_gguf(adapter, exported, base_config=folder)
            found = llama_cpp_logits(base, exported, sequences)
            ours = our_logits(folder, adapter, "none", sequences)
            yield at_least(
                f"{label}: llama.cpp's logits less its base's", largest(found, plain), 1.0
            )
            yield at_most(f"{label}: llama.cpp's logits less ours", largest(found, ours), TOLERANCE)


def gguf_of(summary: Row) -> Path:
    """Return the file that the run's base was read from."""
    name = summary["base"]["id"]
    if name.startswith(EMBEDDED_PREFIX):
        return embedded_file(name.removeprefix(EMBEDDED_PREFIX))
    if not name.endswith(".gguf"):
        raise LeftOut(f"the base {name} is not a GGUF file; run a recipe on one")
    return Path(name)


def write_dense(source: Path, destination: Path) -> Path:
    """Write a GGUF model with each tensor dequantized to float32, and all else unchanged."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (
            "general.architecture",
            "general.file_type",
        ):
            writer.add_key_value(name, field.contents(), *field.types[:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return destination


def llama_cpp_logits(base: Path, adapter: Path | None, sequences: list[Tensor]) -> list[Tensor]:
    """Return llama.cpp's logits with keys and values in float32."""
    import llama_cpp

    options: dict[str, Any] = {
        "n_ctx": max(map(len, sequences)),
        "logits_all": True,
        "verbose": False,
        "flash_attn": False,
        "n_threads": os.cpu_count(),
    }
    model = llama_cpp.Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        **options,
    )
    found = []
    for tokens in sequences:
        model.reset()
        model.eval(tokens.tolist())
        found.append(torch.tensor(model.scores[: len(tokens)]))
    model.close()
    return found
