"""Real adapters of a tiny base in a real registry, and what each of them answers alone."""

import json
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny import save_tiny_model

SHARPER = 4.0
"""Factor of the weights: a random model hardly uses its prompt, so a wrong one would not show."""
STRENGTH = 0.06
TARGETS = ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class SmallRegistry:
    """What is registered."""

    runs: Path
    base: Path
    folders: dict[str, Path]
    """Name → the adapter's folder; `later` is not registered."""


@dataclass(frozen=True)
class RunningServer:
    """A `lora serve` that answers."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def interrupt(self) -> int:
        """Send Ctrl-C; return the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


def save_sharp_base(folder: Path, *, seed: int = 0, template: bool = True) -> Path:
    """Write the tiny model with larger weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = save_tiny_model(folder / "plain", seed=seed, template=template)
    model = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(SHARPER)
    model.save_pretrained(folder / "sharp")
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder / "sharp")
    return folder / "sharp"


def save_adapter_of(
    base: Path, folder: Path, *, seed: int, template_sha256: str = "", **changes: object
) -> Path:
    """Write an adapter of rank 4 that changes the answers of a base.

    Args:
        base: its folder.
        folder: of the adapter.
        seed: of its weights.
        template_sha256: of the chat template that its sidecar names; empty for none.
        changes: of its config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lora_core import LoraConfig, inject, save_adapter
    from lora_core.adapter.io import Identity

    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **changes}
    config = LoraConfig(**settings)  # type: ignore[arg-type]
    inject(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(STRENGTH * torch.randn(parameter.shape, generator=generator))
    lineage = {"quantization": "none"}
    if template_sha256:
        lineage["template_sha256"] = template_sha256
    save_adapter(model, folder, config, Identity(base=str(base), lineage=lineage))
    return folder


def register_adapter(runs: Path, name: str, folder: Path, **changes: str) -> str:
    """Register an adapter's folder as a new champion; return its number.

    Args:
        runs: folder of all runs.
        name: of the registered model.
        folder: the adapter.
        changes: other tags than those of its files.
    """
    from mlflow import MlflowClient

    from pipelines.tracking.runs import experiment_id
    from pipelines.tracking.tag_names import stored_tags
    from pipelines.tracking.version_files import file_tags

    client = MlflowClient()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    identity = json.loads((folder / "adapter_identity.json").read_text())
    tags = {
        "adapter_sha256": identity["adapter_sha256"],
        "base": identity["base"],
        "quantization": identity["lineage"]["quantization"],
        **file_tags(folder),
    }
    for kind, digest in identity["base_digests"].items():
        tags[f"base_fingerprint.{kind}"] = digest
    tags |= changes
    run = client.create_run(experiment_id(client, name, runs)).info
    client.log_artifacts(run.run_id, str(folder), "adapter")
    source = f"{run.artifact_uri}/adapter"
    created = client.create_model_version(name, source, run.run_id, tags=stored_tags(tags))
    client.set_registered_model_alias(name, "champion", created.version)
    return str(created.version)


def alone(base: Path, adapter: Path | None, prompts: Sequence[str], tokens: int) -> list[str]:
    """Return the greedy answers of one adapter, each prompt alone, by the model's own forward."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_core import load_adapter

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    if adapter is not None:
        load_adapter(model, adapter)
    answers = []
    for prompt in prompts:
        text = f"<|start|>user\n{prompt}<|end|>\n<|start|>assistant\n"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        start = len(ids)
        while len(ids) < start + tokens:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        answers.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return answers
