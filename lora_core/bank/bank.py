"""Several adapters on one base: take one up, put all down, mix them in a batch, or train them side by side.

The bank owns the adapters' layers and decides what stands in the model: the base's own modules, one adapter's layers,
or `Mixed` modules that hold several. What is off is not there, so a model in use costs nothing for the others, and with
one adapter taken up it is an ordinary adapted model: save it, merge it, look at its spectrum.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from lora_core.adapter.io import Identity, open_adapter, save_adapter
from lora_core.bank.mixing import MixedExperts, mixed
from lora_core.bank.routing import BATCH, Routing, routing
from lora_core.base.quant import disable_cpu_repacking
from lora_core.config import LoraConfig
from lora_core.errors import AdapterError
from lora_core.injection import Parts, build_parts
from lora_core.modules import adapter_parts, module_at, replace_module
from lora_core.validation import plan_adapter


class Bank:
    """The adapters of one model, by name.

    Attributes:
        model: what computes; the bank changes which modules stand in it and nothing else.
        names: of the adapters, in the order they came.
        active: the adapter that stands in the model now; None for the base alone, and where rows have adapters of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start a bank over `model`, which carries no adapter."""
        if any(True for _ in adapter_parts(model)):
            raise AdapterError(
                "the model carries an adapter that no bank owns; load a fresh base, or merge it first"
            )
        self.model = model
        self.active: str | None = None
        self._layers: dict[str, Parts] = {}
        self._configs: dict[str, LoraConfig] = {}
        self._bases: Parts = {}
        self._placed: Parts = {}

    @property
    def names(self) -> list[str]:
        return list(self._layers)

    def add(self, name: str, config: LoraConfig, *, seed: int) -> None:
        """Make a new adapter that starts as the base; it is trained under the name.

        Raises:
            AdapterError: the name is taken.
            TargetError: see `inject`; the model and the bank are unchanged.
        """
        self._refuse_taken(name)
        with self._bare():
            self._take_in(
                name,
                config,
                build_parts(self.model, config, plan_adapter(self.model, config), seed),
            )

    def load(self, name: str, folder: Path, *, check_base: bool = True) -> None:
        """Read an adapter's files, checked as `load_adapter` checks them.

        Raises:
            AdapterError, BaseMismatchError: see `load_adapter`; the model and the bank are unchanged.
        """
        self._refuse_taken(name)
        with self._bare():
            self._take_in(name, *open_adapter(self.model, folder, check_base=check_base))

    def save(self, name: str, folder: Path, identity: Identity) -> str:
        """Write one adapter as `save_adapter` does; return the SHA-256 of its weights file."""
        with self.using(name):
            return save_adapter(self.model, folder, self._config(name), identity)

    def remove(self, name: str) -> None:
        """Forget an adapter; where it stood in the model, the base does now."""
        self._config(name)
        if self.active == name:
            self.use(None)
        del self._layers[name], self._configs[name]

    def use(self, name: str | None) -> None:
        """Let the model compute with one adapter, or, for None, as the base."""
        self._place({} if name is None else self._layers_of(name))
        self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Compute with one adapter, or with None, inside a block; afterwards with what was there before."""
        with self._restored():
            self.use(name)
            yield self.model

    @contextmanager
    def rows(
        self, names: Sequence[str | None], *, dim: int = BATCH, lengths: Sequence[int] | None = None
    ) -> Iterator[nn.Module]:
        """Give each row of the batches inside a block an adapter of its own; for inference and for training.

        Under gradient checkpointing the backward pass, which computes blocks again, belongs inside the block as well.

        Args:
            names: for each row, or stretch, the name of its adapter; None is the base.
            dim: BATCH, or TOKENS where examples stand one after the other in a pack (1, T, …).
            lengths: rows in each stretch; one where it is left out.

        Raises:
            AdapterError: no adapter has such a name.
            RoutingError: names and lengths do not fit each other, or, inside the block, a batch of another number of rows.
        """
        route = routing(names, dim=dim, lengths=lengths)
        chosen = {name: self._layers_of(name) for name in route.places}
        with self._restored():
            placed = {
                target: _mixed(base, target, chosen, route) for target, base in self._bases.items()
            }
            self._place(placed)
            self.active = None
            with self._rows_checked(placed):
                yield self.model

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return an adapter's trained weights."""
        return [
            parameter
            for layer in self._layers_of(name).values()
            for parameter in layer.parameters()
            if parameter.requires_grad
        ]

    def parameter_groups(self, learning_rates: Mapping[str, float]) -> list[dict[str, object]]:
        """Return an optimiser's groups, one for each adapter with its own rate."""
        return [
            {"params": self.parameters(name), "lr": rate, "name": name}
            for name, rate in learning_rates.items()
        ]

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Put the base's own modules in place for a block; a failure inside leaves the bank as it was."""
        with self._restored():
            self.use(None)
            yield

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Put back after a block what stood in the model before it."""
        placed, active = self._placed, self.active
        try:
            yield
        finally:
            gone = active is not None and active not in self._layers  # removed inside the block
            self._place({} if gone else placed)
            self.active = None if gone else active

    @contextmanager
    def _rows_checked(self, placed: Parts) -> Iterator[None]:
        """Let the modules around mixed experts, which see rows where experts see tokens, check them inside a block."""
        with ExitStack() as hooks:
            for target, module in placed.items():
                if isinstance(module, MixedExperts):
                    around = module_at(self.model, target.rpartition(".")[0])
                    hooks.callback(
                        around.register_forward_pre_hook(module.check_rows, with_kwargs=True).remove
                    )
            yield

    def _take_in(self, name: str, config: LoraConfig, parts: Parts) -> None:
        """Keep the parts of an adapter, and what stands in their places without it; the base is frozen."""
        _refuse_nested(name, parts, self._bases)
        disable_cpu_repacking(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._bases |= {target: module_at(self.model, target) for target in parts}
        self._layers[name], self._configs[name] = parts, config

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        """Put modules at their targets and the base's own everywhere else."""
        for target, base in self._bases.items():
            replace_module(self.model, target, modules.get(target, base))
        self._placed = {**modules}

    def _config(self, name: str) -> LoraConfig:
        self._layers_of(name)
        return self._configs[name]

    def _layers_of(self, name: str) -> Parts:
        if name not in self._layers:
            raise AdapterError(
                f"the bank has no adapter {name!r}; it has {', '.join(self._layers) or 'none'}"
            )
        return self._layers[name]

    def _refuse_taken(self, name: str) -> None:
        if name in self._layers:
            raise AdapterError(
                f"the bank has an adapter {name!r}; remove it first, or take another name"
            )


def _mixed(base: nn.Module, target: str, chosen: Mapping[str, Parts], route: Routing) -> nn.Module:
    """Return the base's module, or one that mixes the adapters which have an update there."""
    layers = {name: layers[target] for name, layers in chosen.items() if target in layers}
    return mixed(base, layers, route) if layers else base


def _refuse_nested(name: str, parts: Iterable[str], others: Iterable[str]) -> None:
    """Refuse a part that lies inside a module which another adapter replaces, or around one: they could not be mixed."""
    taken = list(others)
    for part in parts:
        inside = next(
            (
                other
                for other in taken
                if part.startswith(f"{other}.") or other.startswith(f"{part}.")
            ),
            None,
        )
        if inside is not None:
            raise AdapterError(
                f"adapter {name!r} changes {part}, and another of the bank changes {inside}; one lies inside the other, so give them "
                "banks of their own"
            )
