"""One base in memory for several models: it is loaded and made dense once, and adapters come and go.

An adapter is always held against the base as it is stored, whose fingerprint it names; only then do the layers that
compute take the places of the stored ones. Both stay in memory, the stored ones at an eighth of the size.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from lora_core import load_adapter
from lora_core.base.quant import quantised_kind
from lora_core.merging.dequantize import dequantize
from lora_core.modules import adapter_parts, module_at, replace_module
from pipelines.models.hardware import Hardware
from pipelines.models.loading import load_model

Layers = dict[str, nn.Module]


class Models:
    """Gives one model after the other; those that share base and quantisation share what is loaded."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._key: tuple[str, str] | None = None
        self._model: PreTrainedModel | None = None
        self._stored: Layers = {}
        self._dense: Layers = {}

    @contextmanager
    def use(
        self, paths: Mapping[str, str], quantization: str, *, trust_remote_code: bool = False
    ) -> Iterator[PreTrainedModel]:
        """Yield the model of a stage, in evaluation mode.

        Args:
            paths: the base, or a `model` that was trained whole in its place; an `adapter`, where there is one.
            quantization: nf4 or none.
            trust_remote_code: run the code that comes with the base.

        Raises:
            LoraError: the adapter does not belong to this base.
        """
        model = self._loaded(paths.get("model", paths["base"]), quantization, trust_remote_code)
        try:
            if "adapter" in paths:
                self._adapt(model, Path(paths["adapter"]))
            yield model
        except BaseException:
            self._key = self._model = (
                None  # whatever state it is in, no other stage computes with it
            )
            raise
        _strip(model)

    def _loaded(self, folder: str, quantization: str, trusted: bool) -> PreTrainedModel:
        if self._model is None or self._key != (folder, quantization):
            self._key = self._model = None
            self._stored, self._dense = {}, {}
            gc.collect()  # before the next one comes
            self._model = load_model(
                Path(folder), quantization, self.hardware, trust_remote_code=trusted
            )
            if self.hardware.device == "cpu":
                self._stored = {
                    name: module
                    for name, module in self._model.named_modules()
                    if quantised_kind(module) in ("nf4", "fp4")
                }
                dequantize(self._model, self.hardware.dtype)
                self._dense = {name: module_at(self._model, name) for name in self._stored}
            self._key = (folder, quantization)
        return self._model

    def _adapt(self, model: PreTrainedModel, folder: Path) -> None:
        """Put an adapter into the model: over the layers as they are stored, which then make room for those that compute."""
        _place(model, self._stored)
        load_adapter(model, folder)
        parts = dict(adapter_parts(model))
        _place(
            model,
            {
                f"{name}.base" if name in parts else name: module
                for name, module in self._dense.items()
            },
        )
        dequantize(
            model, self.hardware.dtype
        )  # nothing is left to be made dense; the updates take note of their new bases


def _place(model: PreTrainedModel, layers: Layers) -> None:
    for name, module in layers.items():
        replace_module(model, name, module)


def _strip(model: PreTrainedModel) -> None:
    """Take an adapter's parts out again."""
    for name, part in list(adapter_parts(model)):
        replace_module(model, name, part.base)  # type: ignore[arg-type]
