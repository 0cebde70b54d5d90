"""Several adapters on one base: use one, use none, mix them in a batch, or train them together.

The bank owns the adapters' layers and decides which modules are in the model: the base's modules,
one adapter's layers, or `Mixed` modules that combine several. An inactive adapter is absent and
costs nothing, and with one active adapter the model is an ordinary adapted model: save it, merge
it, analyze its spectrum.
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
from lora_core.saving import guard_methods
from lora_core.validation import plan_adapter


class Bank:
    """The adapters of one model, by name.

    Attributes:
        model: the model; the bank only exchanges modules in it.
        names: the adapters' names, in the order they were added.
        active: the adapter in the model now; None for the base alone and while rows are routed.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start a bank over `model`, which carries no adapter."""
        if any(True for _ in adapter_parts(model)):
            raise AdapterError(
                "the model carries an adapter that no bank owns; load a fresh base, or merge the "
                "adapter first"
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
        """Add a new adapter that initially leaves the base unchanged.

        Raises:
            AdapterError: the name is taken.
            TargetError: see `inject`; the model and the bank are unchanged.
        """
        self._refuse_taken(name)
        with self._bare():
            targets = plan_adapter(self.model, config)
            self._register(name, config, build_parts(self.model, config, targets, seed))

    def load(self, name: str, folder: Path, *, check_base: bool = True) -> None:
        """Read an adapter's files with the checks of `load_adapter`.

        Raises:
            AdapterError, BaseMismatchError: see `load_adapter`; the model and the bank are
                unchanged.
        """
        self._refuse_taken(name)
        with self._bare():
            config, parts = open_adapter(self.model, folder, check_base=check_base)
            self._register(name, config, parts)

    def save(self, name: str, folder: Path, identity: Identity) -> str:
        """Write one adapter as `save_adapter` does; return the SHA-256 of its weights file."""
        with self.using(name):
            return save_adapter(self.model, folder, self._config(name), identity)

    def remove(self, name: str) -> None:
        """Remove an adapter; if it was active, the base is used now."""
        self._config(name)
        if self.active == name:
            self.use(None)
        del self._layers[name]
        del self._configs[name]

    def use(self, name: str | None) -> None:
        """Switch the model to one adapter, or to the base for None."""
        self._place({} if name is None else self._layers_of(name))
        self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Use one adapter, or None, inside a block; afterwards restore the previous state."""
        with self._restored():
            self.use(name)
            yield self.model

    @contextmanager
    def rows(
        self, names: Sequence[str | None], *, dim: int = BATCH, lengths: Sequence[int] | None = None
    ) -> Iterator[nn.Module]:
        """Route each row of the batches inside a block to its own adapter.

        This works in inference and training. Gradient checkpointing recomputes blocks in the
        backward pass: run the backward pass inside the block too.

        Args:
            names: for each row or segment, the name of its adapter; None is the base.
            dim: BATCH, or TOKENS if examples are concatenated in a pack (1, T, …).
            lengths: rows in each segment; 1 each if omitted.

        Raises:
            AdapterError: no adapter has such a name.
            RoutingError: names and lengths do not fit each other or, inside the block, a batch has
                another number of rows.
        """
        route = routing(names, dim=dim, lengths=lengths)
        chosen = {name: self._layers_of(name) for name in route.indices}
        with self._restored():
            placed = {
                target: _mixed_module(base, target, chosen, route)
                for target, base in self._bases.items()
            }
            self._place(placed)
            self.active = None
            with self._expert_rows_checked(placed):
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
        """Return an optimizer's parameter groups, one per adapter with its own learning rate."""
        return [
            {"params": self.parameters(name), "lr": learning_rate, "name": name}
            for name, learning_rate in learning_rates.items()
        ]

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Use the base's modules inside a block; a failure inside leaves the bank unchanged."""
        with self._restored():
            self.use(None)
            yield

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore the model's modules after a block."""
        placed = self._placed
        active = self.active
        try:
            yield
        finally:
            if active is not None and active not in self._layers:  # removed inside the block
                placed = {}
                active = None
            self._place(placed)
            self.active = active

    @contextmanager
    def _expert_rows_checked(self, placed: Parts) -> Iterator[None]:
        """Check, inside a block, the rows of each module that encloses mixed experts.

        The experts themselves see flattened tokens.
        """
        with ExitStack() as hooks:
            for target, module in placed.items():
                if isinstance(module, MixedExperts):
                    parent = module_at(self.model, target.rpartition(".")[0])
                    hook = parent.register_forward_pre_hook(module.check_rows, with_kwargs=True)
                    hooks.callback(hook.remove)
            yield

    def _register(self, name: str, config: LoraConfig, parts: Parts) -> None:
        """Store an adapter's parts and the modules that they replace; freeze the base."""
        _refuse_nested(name, parts, self._bases)
        disable_cpu_repacking(self.model)
        guard_methods(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._bases |= {target: module_at(self.model, target) for target in parts}
        self._layers[name] = parts
        self._configs[name] = config

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        """Put `modules` at their targets and the base's modules everywhere else."""
        for target, base in self._bases.items():
            replace_module(self.model, target, modules.get(target, base))
        self._placed = {**modules}

    def _config(self, name: str) -> LoraConfig:
        self._layers_of(name)
        return self._configs[name]

    def _layers_of(self, name: str) -> Parts:
        if name not in self._layers:
            known = ", ".join(self._layers) or "none"
            raise AdapterError(f"the bank has no adapter {name!r}; it has {known}")
        return self._layers[name]

    def _refuse_taken(self, name: str) -> None:
        if name in self._layers:
            raise AdapterError(
                f"the bank already has an adapter {name!r}; remove it first, or choose another name"
            )


def _mixed_module(
    base: nn.Module, target: str, chosen: Mapping[str, Parts], route: Routing
) -> nn.Module:
    """Return the base's module, combined with the adapters that have an update there, if any."""
    layers = {name: parts[target] for name, parts in chosen.items() if target in parts}
    return mixed(base, layers, route) if layers else base


def _refuse_nested(name: str, parts: Iterable[str], others: Iterable[str]) -> None:
    """Refuse a part that is inside, or around, a module that another adapter replaces.

    Such adapters cannot be mixed.
    """
    replaced = list(others)
    for part in parts:
        for other in replaced:
            if part.startswith(f"{other}.") or other.startswith(f"{part}."):
                raise AdapterError(
                    f"adapter {name!r} changes {part}, and another adapter of the bank changes "
                    f"{other}; one contains the other, so use a separate bank for each"
                )
