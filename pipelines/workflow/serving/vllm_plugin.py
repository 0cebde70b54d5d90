"""A LoRA resolver for vLLM: the model `models:/NAME@ALIAS` of a request is pulled and verified.

vLLM calls each resolver when a request names an adapter that it has not loaded. Its interface is

    vllm.lora.resolver.LoRAResolver     async resolve_lora(base_model_name: str, lora_name: str)
                                        -> LoRARequest | None
    vllm.lora.request.LoRARequest       LoRARequest(lora_name=…, lora_int_id=…, lora_path=…)
    vllm.lora.resolver.LoRAResolverRegistry     register_resolver(name, resolver)

where `base_model_name` is the folder or hub id that vLLM was started with. The entry point
`vllm.general_plugins` calls `register_resolver` in each of vLLM's processes, so this file imports
no large library. Start vLLM with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.

vLLM keeps a resolved adapter under its name: a moved alias counts after `/v1/unload_lora_adapter`
or a restart. A version, as in `models:/NAME/3`, is always the same adapter.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core.errors import LoraError
from pipelines.config.registry_names import REGISTERED
from pipelines.errors import PipelineError
from pipelines.paths import runs_root

NAME = "lora registry"
"""Of the resolver in vLLM's registry."""
ID_DIGITS = 15
"""Hexadecimal digits of a digest in an adapter's number, which must fit 63 bits."""
log = logging.getLogger(__name__)
NewRequest = Callable[..., Any]
"""vLLM's LoRARequest, called with keywords."""


class RegistryResolver:
    """Resolves references to registered adapters; other names are left to other resolvers."""

    def __init__(self, new_request: NewRequest, runs: Path) -> None:
        """Resolve from the registry of MLFLOW_TRACKING_URI, or the one in a folder of runs.

        Args:
            new_request: vLLM's LoRARequest.
            runs: folder of all runs; adapters are pulled into its folder pulled/.
        """
        self._new_request = new_request
        self._runs = runs

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return the request for a verified adapter; None, with an error in the log, if refused.

        Args:
            base_model_name: folder or hub id of vLLM's base.
            lora_name: such as models:/tickets@champion.
        """
        if not lora_name.startswith(REGISTERED):
            return None
        try:
            folder, sha256 = await asyncio.to_thread(self._pull, base_model_name, lora_name)
        except (PipelineError, LoraError, OSError) as error:
            log.error("%s is not served: %s", lora_name, error)
            return None
        return self._new_request(
            lora_name=lora_name,
            lora_int_id=max(1, int(sha256[:ID_DIGITS], 16)),
            lora_path=folder,
        )

    def _pull(self, base_name: str, lora_name: str) -> tuple[str, str]:
        """Return the folder of a verified export, and the digest of the registered weights."""
        from pipelines.workflow.serving.vllm_pull import pull_for_vllm

        pulled = pull_for_vllm(base_name, lora_name, self._runs)
        return pulled.folder, pulled.lock.adapter_sha256


def register_resolver() -> None:
    """Add the resolver to vLLM's registry; vLLM's plugin loader calls this."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver(NAME, RegistryResolver(LoRARequest, runs_root()))
