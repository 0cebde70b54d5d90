"""One base in memory for several models: load and dequantize it once, swap the adapters.

An adapter is always checked against the base as it is stored, whose fingerprint it names. Only then
do the dense layers that compute replace the stored ones. Both stay in memory, the stored ones at an
eighth of the size.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from lora_core import load_adapter
from lora_core.base.quant import quantized_kind
from lora_core.merging.dequantize import dequantize
from lora_core.modules import adapter_parts, module_at, replace_module
from pipelines.models.hardware import Hardware
from pipelines.models.loading import load_model
from pipelines.models.renames import weight_renames
from pipelines.runtime.interfaces.inputs import StagePaths

Layers = dict[str, nn.Module]


class Models:
    """Provides one model after the other; those with equal base and quantization share it."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._key: tuple[str, str] | None = None
        self._model: PreTrainedModel | None = None
        self._stored: Layers = {}
        self._dense: Layers = {}

    @contextmanager
    def use(
        self, paths: StagePaths, quantization: str, *, trust_remote_code: bool = False
    ) -> Iterator[PreTrainedModel]:
        """Yield the model of a stage, in evaluation mode.

        Args:
            paths: the base, or a fully fine-tuned `model` that replaces it; an optional `adapter`.
            quantization: nf4 or none.
            trust_remote_code: run the code that comes with the base.

        Raises:
            LoraError: the adapter does not belong to this base.
        """
        model = self._loaded(str(paths.weights), quantization, trust_remote_code)
        try:
            if paths.adapter is not None:
                self._adapt(model, Path(paths.adapter))
            yield model
        except BaseException:
            # the state of the model is unknown, so no other stage may compute with it
            self._key = None
            self._model = None
            raise
        _remove_adapter(model)

    def _loaded(self, folder: str, quantization: str, is_trusted: bool) -> PreTrainedModel:
        if self._model is not None and self._key == (folder, quantization):
            return self._model
        self._key = None
        self._model = None
        self._stored = {}
        self._dense = {}
        gc.collect()  # before the next one is loaded
        model = load_model(Path(folder), quantization, self.hardware, trust_remote_code=is_trusted)
        self._model = model
        if self.hardware.device == "cpu":
            self._stored = _quantized_layers(model)
            dequantize(model, self.hardware.dtype)
            self._dense = {name: module_at(model, name) for name in self._stored}
        self._key = (folder, quantization)
        return model

    def _adapt(self, model: PreTrainedModel, folder: Path) -> None:
        """Load an adapter over the stored layers, then replace these with the dense ones."""
        _replace(model, self._stored)
        load_adapter(model, folder, renames=weight_renames(model))
        adapted = dict(adapter_parts(model))
        dense = {}
        for name, module in self._dense.items():
            dense[f"{name}.base" if name in adapted else name] = module
        _replace(model, dense)
        # all layers are dense already; this makes the adapter's parts register their new bases
        dequantize(model, self.hardware.dtype)


def _quantized_layers(model: PreTrainedModel) -> Layers:
    found = {}
    for name, module in model.named_modules():
        if quantized_kind(module) in ("nf4", "fp4"):
            found[name] = module
    return found


def _replace(model: PreTrainedModel, layers: Layers) -> None:
    for name, module in layers.items():
        replace_module(model, name, module)


def _remove_adapter(model: PreTrainedModel) -> None:
    for name, part in list(adapter_parts(model)):
        replace_module(model, name, part.base)  # type: ignore[arg-type]
