"""The resolver follows vLLM's published interface: verified exports, and None for all others.

vLLM is not installed here. A stand-in has the two classes that the plugin uses, with the signatures
that vLLM publishes.
"""

import asyncio
import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from safetensors.torch import load_file
from served_adapters import SmallRegistry, register_adapter, save_adapter_of, save_sharp_base

pytest.importorskip("mlflow")
PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"
WEIGHTS = "adapter_model.safetensors"


@dataclass
class StandInForLoRARequest:
    """The fields of vLLM's LoRARequest that a resolver sets; there it is a msgspec struct."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1, "vLLM refuses smaller numbers"
        assert self.lora_path, "vLLM refuses an empty path"


@dataclass
class StandInForLoRAResolverRegistry:
    """vLLM's registry of resolvers."""

    resolvers: dict[str, Any] = field(default_factory=dict)

    def register_resolver(self, resolver_name: str, resolver: Any) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def resolver(small_registry: SmallRegistry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The resolver that the entry point registers in the stand-in for vLLM."""
    registry = StandInForLoRAResolverRegistry()
    for name, contents in {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": StandInForLoRARequest},
        "vllm.lora.resolver": {"LoRAResolverRegistry": registry},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    [entry_point] = project["entry-points"]["vllm.general_plugins"].values()
    module_name, _, function = entry_point.partition(":")
    getattr(importlib.import_module(module_name), function)()
    [found] = registry.resolvers.values()
    yield found


def resolve(resolver: Any, base: Path, name: str) -> Any:
    return asyncio.run(resolver.resolve_lora(str(base), name))


def test_signature_is_the_published_one(resolver: Any) -> None:
    method = resolver.resolve_lora
    assert inspect.iscoroutinefunction(method)
    assert list(inspect.signature(method).parameters) == ["base_model_name", "lora_name"]
    hints = get_type_hints(method)
    assert (hints["base_model_name"], hints["lora_name"]) == (str, str)


@pytest.mark.parametrize("name", ["models:/sales@champion", "models:/sales/1"])
def test_a_registered_adapter_is_exported_with_scale_1(
    resolver: Any, small_registry: SmallRegistry, name: str
) -> None:
    request = resolve(resolver, small_registry.base, name)
    assert request.lora_name == name
    plain = load_file(small_registry.folders["sales"] / WEIGHTS)
    exported = load_file(Path(request.lora_path) / WEIGHTS)
    assert exported.keys() == plain.keys()
    other = resolve(resolver, small_registry.base, "models:/support@champion")
    assert other.lora_int_id != request.lora_int_id


@pytest.mark.parametrize("name", ["sales", "sales@champion", "some/path", ""])
def test_other_names_are_left_to_other_resolvers(
    resolver: Any, small_registry: SmallRegistry, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve(resolver, small_registry.base, name) is None
    assert caplog.records == []


def refusal(caplog: pytest.LogCaptureFixture) -> str:
    [message] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    return message


@pytest.mark.parametrize(
    "name", ["models:/absent@champion", "models:/sales@nobody", "models:/../x"]
)
def test_what_is_not_registered_is_refused(
    resolver: Any, small_registry: SmallRegistry, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve(resolver, small_registry.base, name) is None
    assert refusal(caplog).startswith(f"{name} is not served: ")


def test_another_base_in_vllm_is_refused(
    resolver: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_sharp_base(tmp_path, seed=5)
    for _ in range(2):  # also if it was pulled before
        caplog.clear()
        assert resolve(resolver, other, "models:/sales@champion") is None
        assert "vLLM has another base" in refusal(caplog)
    caplog.clear()
    assert resolve(resolver, tmp_path / "absent", "models:/sales@champion") is None
    assert "start vLLM with the folder of the base" in refusal(caplog)


def test_what_vllm_cannot_serve_is_refused(
    resolver: Any,
    small_registry: SmallRegistry,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = save_adapter_of(small_registry.base, tmp_path / "dora", seed=1, use_dora=True)
    register_adapter(small_registry.runs, "dora", folder)
    assert resolve(resolver, small_registry.base, "models:/dora@champion") is None
    assert "vLLM does not support DoRA" in refusal(caplog)


def test_changed_bytes_are_refused(
    resolver: Any, small_registry: SmallRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    request = resolve(resolver, small_registry.base, "models:/support@champion")
    weights = Path(request.lora_path) / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert resolve(resolver, small_registry.base, "models:/support@champion") is None
    assert "it was changed" in refusal(caplog)
    weights.write_bytes(content)
