"""Convert an adapter whose weights are a pickle, adapter_model.bin, to safetensors.

The pickle is read without running code; see `lora_core.base.pickled_tensors`.
"""

from pathlib import Path

from safetensors.torch import save_file

from lora_core.adapter.adapter_files import check_values
from lora_core.adapter.json_files import CONFIG, WEIGHTS, read_json
from lora_core.adapter.peft_keys import plain_keys
from lora_core.base.pickled_tensors import read_pickled_tensors
from lora_core.errors import AdapterError
from lora_core.files import atomic_folder, overlap, sha256_of_file

PICKLE = "adapter_model.bin"


def convert_pickled_adapter(adapter: Path, destination: Path) -> str:
    """Write an adapter of an old PEFT with safetensors; return the SHA-256 of its weights.

    Args:
        adapter: folder with adapter_model.bin and adapter_config.json; only read.
        destination: created or replaced.

    Raises:
        AdapterError: a file is missing or malformed, the pickle holds more than tensors, a tensor
            is not finite, or the destination overlaps the adapter.
    """
    if overlap(destination, adapter):
        raise AdapterError(
            f"{destination} overlaps {adapter}, which is only read; choose another destination"
        )
    read_json(adapter / CONFIG)
    path = adapter / PICKLE
    found = read_pickled_tensors(path, AdapterError, advice="save the adapter again as safetensors")
    tensors = plain_keys(found, str(path))
    check_values(tensors, str(path))
    copies = {key: tensor.clone().contiguous() for key, tensor in sorted(tensors.items())}
    with atomic_folder(destination) as aside:
        save_file(copies, str(aside / WEIGHTS), metadata={"format": "pt"})
        (aside / CONFIG).write_bytes((adapter / CONFIG).read_bytes())
        return sha256_of_file(aside / WEIGHTS)
