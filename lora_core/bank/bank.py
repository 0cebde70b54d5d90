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
from lora_core.adapter.renaming import Rename
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
        """The adapters' names, in the order they were added."""
        return list(self._layers)

    def add(self, name: str, config: LoraConfig, *, seed: int) -> None:
        """Add a new adapter that initially leaves the base unchanged.

        Args:
            name: of the new adapter in this bank.
            config: what it adapts.
            seed: of the random initialization.

        Raises:
            AdapterError: the name is taken.
            TargetError: see `inject`; the model and the bank are unchanged.
        """
        self._refuse_taken(name)
        with self._bare():
            targets = plan_adapter(self.model, config)
            parts = build_parts(self.model, config, targets, seed)
            self._register(name, config, parts)

    def load(
        self,
        name: str,
        folder: Path,
        *,
        check_base: bool = True,
        renames: Sequence[Rename] = (),
    ) -> None:
        """Read an adapter's files with the checks of `load_adapter`.

        Args:
            name: of the adapter in this bank.
            folder: the saved adapter.
            check_base: refuse an adapter of another base.
            renames: see `load_adapter`.

        Raises:
            AdapterError, BaseMismatchError: see `load_adapter`; the model and the bank are
                unchanged.
        """
        self._refuse_taken(name)
        with self._bare():
            config, parts = open_adapter(self.model, folder, check_base=check_base, renames=renames)
            self._register(name, config, parts)

    def save(self, name: str, folder: Path, identity: Identity) -> str:
        """Write one adapter as `save_adapter` does.

        Args:
            name: an adapter of this bank.
            folder: created or replaced.
            identity: what the sidecar records.

        Returns:
            The SHA-256 of the weights file.

        Raises:
            AdapterError: the bank has no such adapter.
        """
        with self.using(name):
            config = self._config(name)
            return save_adapter(self.model, folder, config, identity)

    def remove(self, name: str) -> None:
        """Remove an adapter; if it was active, the base is used now.

        Raises:
            AdapterError: the bank has no such adapter.
        """
        self._config(name)
        if self.active == name:
            self.use(None)
        del self._layers[name]
        del self._configs[name]

    def use(self, name: str | None) -> None:
        """Switch the model to one adapter, or to the base for None.

        Raises:
            AdapterError: the bank has no such adapter; the model is unchanged.
        """
        layers = {} if name is None else self._layers_of(name)
        self._place(layers)
        self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Use one adapter, or the base for None, inside a block; then restore the previous state.

        Yields:
            The model.

        Raises:
            AdapterError: the bank has no such adapter.
        """
        with self._restored():
            self.use(name)
            yield self.model

    @contextmanager
    def rows(
        self,
        names: Sequence[str | None],
        *,
        dim: int = BATCH,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[nn.Module]:
        """Route each row of the batches inside a block to its own adapter.

        This works in inference and training. Gradient checkpointing recomputes blocks in the
        backward pass: run the backward pass inside the block too.

        Args:
            names: for each row or segment, the name of its adapter; None is the base.
            dim: BATCH, or TOKENS if examples are concatenated in a pack (1, T, …).
            lengths: rows in each segment; 1 each if omitted.

        Yields:
            The model.

        Raises:
            AdapterError: no adapter has such a name.
            RoutingError: names and lengths do not fit each other or, inside the block, a batch has
                another number of rows.
        """
        route = routing(names, dim=dim, lengths=lengths)
        chosen = {name: self._layers_of(name) for name in route.indices}
        with self._restored():
            placed = {}
            for target, base in self._bases.items():
                placed[target] = _mixed_module(base, target, chosen, route)
            self._place(placed)
            self.active = None
            with self._expert_rows_checked(placed):
                yield self.model

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return an adapter's trained weights.

        Raises:
            AdapterError: the bank has no such adapter.
        """
        trained: list[nn.Parameter] = []
        for layer in self._layers_of(name).values():
            trained += (each for each in layer.parameters() if each.requires_grad)
        return trained

    def parameter_groups(self, learning_rates: Mapping[str, float]) -> list[dict[str, object]]:
        """Return an optimizer's parameter groups, one per adapter.

        Args:
            learning_rates: name of an adapter → its learning rate.

        Raises:
            AdapterError: the bank has no such adapter.
        """
        groups: list[dict[str, object]] = []
        for name, learning_rate in learning_rates.items():
            group = {
                "params": self.parameters(name),
                "lr": learning_rate,
                "name": name,
            }
            groups.append(group)
        return groups

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
                if not isinstance(module, MixedExperts):
                    continue
                parent_path = target.rpartition(".")[0]
                parent = module_at(self.model, parent_path)
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
        for target in parts:
            self._bases[target] = module_at(self.model, target)
        self._layers[name] = parts
        self._configs[name] = config

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        """Put `modules` at their targets and the base's modules everywhere else."""
        for target, base in self._bases.items():
            module = modules.get(target, base)
            replace_module(self.model, target, module)
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
    base: nn.Module,
    target: str,
    chosen: Mapping[str, Parts],
    route: Routing,
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
            is_inside = part.startswith(f"{other}.")
            is_around = other.startswith(f"{part}.")
            if is_inside or is_around:
                raise AdapterError(
                    f"adapter {name!r} changes {part}, and another adapter of the bank changes "
                    f"{other}; one contains the other, so use a separate bank for each"
                )
