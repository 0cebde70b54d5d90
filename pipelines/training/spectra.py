"""The spectrum and the intruder dimensions of each update of a trained adapter."""

from collections.abc import Mapping
from pathlib import Path

from lora_core.errors import AdapterError, LoraError
from lora_core.inspection.intrusion import Sample, count_intruders
from lora_core.spectrum.intruders import Intruders
from lora_core.spectrum.spectrum import effective_rank, singular_values
from lora_core.spectrum.updates import read_updates
from pipelines.models.renames import checkpoint_renames
from pipelines.runtime.interfaces.results import ModuleSpectrum

INTRUDER_SAMPLE = Sample(layers=5, work=1.5e12)
"""Where intruder dimensions are counted after a training: at most 5 layers of each kind of module.

For SmolLM2-135M, that takes about 4 s on one core. The limit of the work is about two minutes on
one core: one layer of each kind of a base of 7B, and none of larger ones.
"""


def spectrum(adapter: Path, base: Path) -> tuple[ModuleSpectrum, ...]:
    """Return the singular values, effective rank and intruder dimensions of each module's ΔW.

    It is empty if more than ΔW was trained: with DoRA, biases or fully trained modules, no
    product of two factors is the complete update.

    Args:
        adapter: folder of the adapter.
        base: folder of the base in full precision, also if it was quantized for the training.
    """
    try:
        updates = read_updates(adapter)
    except AdapterError:
        return ()
    intruders = _intruders(adapter, base)
    modules = []
    for name, update in updates.items():
        values = singular_values(update)
        counted = intruders.get(name)
        found = ModuleSpectrum(
            module=name,
            rank=len(values),
            effective_rank=round(effective_rank(values), 3),
            values=tuple(float(f"{value:.4g}") for value in values.tolist()),
            intruders=None if counted is None else counted.left,
        )
        modules.append(found)
    return tuple(modules)


def _intruders(adapter: Path, base: Path) -> Mapping[str, Intruders]:
    """Return the counts; none for a base whose files do not have the adapted weights as such.

    They can be pickles or be quantized.
    """
    try:
        return count_intruders(
            adapter, base, sample=INTRUDER_SAMPLE, renames=checkpoint_renames(base)
        )
    except LoraError:
        return {}
