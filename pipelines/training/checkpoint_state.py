"""The state of a run that a checkpoint keeps, and how a run resumes from it.

A run that was stopped on two ranks resumes on one, or four. A rank that existed before continues
its random sequence; a new rank starts one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipelines.errors import PipelineError
from pipelines.training.adam_state import KEYS, full_moments, full_weights, restore
from pipelines.training.checkpoint import RANDOM, WEIGHTS, LoadedCheckpoint, Tensors
from pipelines.training.engine import Engine

SUBTRACTED = (".init_A", ".init_B")
"""Endings of the buffers with a layer's initial A and B, which are subtracted from its update."""


def resume(engine: Engine, checkpoint: LoadedCheckpoint | None, seed: int) -> int:
    """Restore optimizer and random state; the model already has the weights.

    Every rank calls it. Returns the number of steps in the checkpoint, 0 without one.

    Args:
        engine: over a model that has the weights of the checkpoint.
        checkpoint: None to start a training.
        seed: of the recipe; a rank that did not exist before starts its random sequence from it.
    """
    if checkpoint is None:
        return 0
    moments = {key: checkpoint.tensors[key] for key in KEYS}
    restore(engine, checkpoint.tensors[WEIGHTS], moments, checkpoint.step)
    rank = engine.accelerator.process_index
    if rank < checkpoint.ranks:
        set_random_state(_of_rank(checkpoint.tensors[RANDOM], rank))
    else:
        torch.manual_seed(seed + rank + 1000 * checkpoint.step)
    return checkpoint.step


@torch.no_grad()
def load_trained_weights(model: nn.Module, weights: Tensors) -> None:
    """Copy trained weights and initial factors into a model that is not yet under an engine.

    Args:
        model: changed in place.
        weights: trained weights and buffers of an initialization, by name.

    Raises:
        PipelineError: the model lacks one of them, as with a checkpoint of another version.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    unknown = sorted(weights.keys() - own.keys())
    if unknown:
        raise PipelineError(
            f"the checkpoint contains {unknown[0]}, which the model does not have; it was written "
            "by another version of this pipeline: resume with that version, or delete the stage's "
            "checkpoints folder to train from the start"
        )
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def full_state(engine: Engine, random_states: list[Tensors]) -> Iterator[tuple[str, Tensors]]:
    """Yield the name and tensors of each file: complete on rank 0, empty elsewhere.

    Under ZeRO, every rank iterates to the end: each parameter is gathered from all ranks.

    Args:
        engine: what is trained.
        random_states: each rank's, by rank.
    """
    weights = _on_first(engine, full_weights(engine))
    if engine.is_first:
        weights |= init_buffers(engine.model)
    yield WEIGHTS, weights
    for key in KEYS:
        yield key, _on_first(engine, full_moments(engine, key))
    yield RANDOM, _by_rank(random_states)


def _on_first(engine: Engine, tensors: Iterator[tuple[str, Tensor]]) -> Tensors:
    return {name: tensor for name, tensor in tensors if engine.is_first}


def init_buffers(model: nn.Module) -> Tensors:
    """Return the initial factors that layers subtract; another machine may compute other signs."""
    return {
        name: buffer.detach().to("cpu", copy=True)
        for name, buffer in model.named_buffers()
        if name.endswith(SUBTRACTED)
    }


def random_state() -> Tensors:
    """Return this rank's random state."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Tensors) -> None:
    """Continue the random sequence of a rank."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _by_rank(random_states: list[Tensors]) -> Tensors:
    named: Tensors = {}
    for rank, states in enumerate(random_states):
        named |= {f"{rank}.{name}": state for name, state in states.items()}
    return named


def _of_rank(named: Tensors, rank: int) -> Tensors:
    prefix = f"{rank}."
    return {
        name.removeprefix(prefix): state for name, state in named.items() if name.startswith(prefix)
    }
