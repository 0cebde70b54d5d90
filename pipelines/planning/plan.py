"""What a recipe trains and costs, from the base's config and the data's lengths; loads no weights.

    python -m pipelines.planning.plan STAGE_FOLDER

Rejects a target that matches nothing, and a rank larger than a layer, before any training.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_core import LoraConfig, Target
from lora_core.budget.activations import FLOAT32
from lora_core.budget.budget import Budget, budget
from lora_core.budget.setup import Setup
from lora_core.init.spectral import is_spectral
from lora_core.training.losses import CHUNK_ROWS
from lora_core.validation import plan_adapter
from pipelines.config.experiments import CONTROL
from pipelines.config.sections import LoraSettings
from pipelines.errors import RecipeError
from pipelines.models.hardware import COMFORTABLE
from pipelines.models.support import check_checkpointing
from pipelines.planning.alternatives import communication, in_less_memory, scaling, traffic
from pipelines.planning.examples import Examples, LargestMicroBatch
from pipelines.planning.weights import stored_weights, targets_by_kind
from pipelines.runtime.child import execute_stage
from pipelines.runtime.interfaces.inputs import PlanInputs, StagePaths
from pipelines.runtime.interfaces.kinds import PLAN
from pipelines.runtime.interfaces.plan_result import (
    PlannedAdapter,
    PlannedSetup,
    PlanResult,
    RunCost,
    TargetKind,
)

CPU_PROCESS_BYTES = 610_000_000
"""Measured: resident memory of a rank under DeepSpeed before its first step, minus its tensors: 612
MB over an NF4 base, 589 MB over a dense one. Interpreter, libraries, and what loading leaves
behind."""
CPU_HEAP_SLACK = 1.36
"""Measured: glibc's heap keeps freed tensors and refills only some of their gaps. Resident growth
divided by the bytes kept, for one process of SmolLM2-135M with adapters at 570 to 700 tokens per
pass: 1.38 over NF4, 1.33 dense; 1.0 with MALLOC_MMAP_THRESHOLD_=1000000, which returns every large
tensor."""
GPU_PROCESS_BYTES = 1 << 30
"""An estimate, not measured here: the CUDA context and the buffers of NCCL."""


def plan(folder: Path, inputs: PlanInputs, paths: StagePaths) -> tuple[PlanResult, list[str]]:
    """Return targets by kind and rank, each run's memory by term, and the alternatives on GPUs.

    Args:
        folder: of the stage; nothing is written into it.
        inputs: the recipe's settings, and what the launch config implies.
        paths: of the base and of the prepared data.

    Returns:
        the result, and no files.

    Raises:
        RecipeError: a target matches nothing, or a rank or a learning-rate ratio has no effect.
    """
    base = str(paths.required("base"))
    model = meta_model(base, trust_remote_code=inputs.trust_remote_code)
    examples = Examples.read(paths.required("data"))
    setup = run_setup(inputs, examples.largest_micro_batch(inputs))
    if setup.checkpointing:
        check_checkpointing(model)
    lora = inputs.lora
    targets = {rank: plan_adapter(model, lora_config(lora, rank)) for rank in lora.ranks}
    check_loraplus_ratio(lora, targets[lora.ranks[0]])
    estimator = CostEstimator(model, inputs, examples)
    on_gpu = gpu_setup(setup)
    largest = targets[max(targets)]
    result = PlanResult(
        weights=stored_weights(model, largest, quantized=inputs.quantization == "nf4"),
        targets=_targets(targets, use_dora=lora.use_dora),
        runs=_runs(estimator, setup, targets),
        setup=PlannedSetup(
            sharding=setup.sharding, tokens=setup.tokens, checkpointing=setup.checkpointing
        ),
        tokens_of_a_step=examples.tokens_of_a_step(inputs),
        scaling=scaling(model, on_gpu, largest, inputs),
        comfortable_share=COMFORTABLE,
        communication=communication(model, on_gpu, largest, inputs),
    )
    return result, []


def _targets(targets: dict[int, list[Target]], *, use_dora: bool) -> tuple[TargetKind, ...]:
    """Return the targets of each rank by kind."""
    kinds = []
    for adapter_targets in targets.values():
        kinds += targets_by_kind(adapter_targets, use_dora=use_dora)
    return tuple(kinds)


def meta_model(base: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model that a folder's config describes, without weights.

    Args:
        base: folder of the base.
        trust_remote_code: run the base's own Python code.
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return model


def run_setup(inputs: PlanInputs, largest: LargestMicroBatch) -> Setup:
    """Return how the adapters are trained, as a setup of the library's budget.

    Args:
        inputs: the plan's.
        largest: the most that a process reads at once.
    """
    launch = inputs.launch
    setup = Setup(
        method="qlora" if inputs.quantization == "nf4" else "lora",
        tokens=largest.tokens,
        sharding=launch.sharding,
        processes=inputs.processes,
        checkpointing=inputs.training.gradient_checkpointing,
        dropout=inputs.lora.dropout > 0,
        dora=inputs.lora.use_dora,
        logit_rows=min(CHUNK_ROWS, max(1, largest.supervised)),
        bucket_weights=launch.bucket_weights,
    )
    if launch.device == "cpu":
        return cpu_setup(setup)
    return gpu_setup(setup, compute_bytes=4 if inputs.training.dtype == "float32" else 2)


def cpu_setup(setup: Setup) -> Setup:
    """Return the same training on a CPU, whose memory is the resident memory.

    Products in bfloat16 leave weights and states in float32. They save less of the activations, and
    full fine-tuning makes copies of its weights, so this is about right for both.

    Args:
        setup: of the training.
    """
    return replace(
        setup,
        compute_bytes=FLOAT32,
        masters=True,
        heap_slack=CPU_HEAP_SLACK,
        mapped_checkpoint=True,
        process_bytes=CPU_PROCESS_BYTES,
    )


def gpu_setup(setup: Setup, *, compute_bytes: int = 2) -> Setup:
    """Return the same training on a GPU; fully trained weights have float32 masters.

    Args:
        setup: of the training.
        compute_bytes: 4 in float32, 2 in 16 bits.
    """
    return replace(
        setup,
        compute_bytes=compute_bytes,
        masters=True,
        heap_slack=1.0,
        mapped_checkpoint=False,
        process_bytes=GPU_PROCESS_BYTES,
    )


def lora_config(settings: LoraSettings, rank: int) -> LoraConfig:
    """Return the library's config of one rank, from a recipe's lora section.

    Args:
        settings: of all ranks.
        rank: of this adapter.
    """
    return LoraConfig(
        r=rank,
        lora_alpha=settings.alpha,
        target_modules=settings.target_modules,
        target_parameters=settings.target_parameters,
        exclude_modules=settings.exclude_modules,
        layers_to_transform=settings.layers_to_transform,
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=settings.init,
    )


def check_loraplus_ratio(lora: LoraSettings, targets: list[Target]) -> None:
    """Reject LoRA+ if it changes no learning rate.

    Args:
        lora: the recipe's section.
        targets: of an adapter of any rank.

    Raises:
        RecipeError: both factors of every target have the same learning rate.
    """
    only_embeddings = all(target.layer == "embedding" for target in targets)
    if lora.loraplus_ratio != 1 and not lora.use_dora and only_embeddings:
        raise RecipeError(
            f"lora.loraplus_ratio {lora.loraplus_ratio:g} has no effect: "
            "both factors of an embedding have the same learning rate; use 1"
        )


@dataclass(frozen=True)
class CostEstimator:
    """Estimates the cost of the runs of one recipe."""

    model: nn.Module
    """Without weights."""
    inputs: PlanInputs
    """The plan's."""
    examples: Examples

    def control(self, setup: Setup) -> RunCost:
        """Return the cost of full fine-tuning."""
        return self._estimate(replace(setup, method="full"), [])

    def adapter(self, setup: Setup, targets: list[Target]) -> RunCost:
        """Return the cost of an adapter.

        Args:
            setup: how it is trained.
            targets: its own, at least one; they have its rank.
        """
        rank = targets[0].rank
        file_rank = rank
        init_weights = 0
        if is_spectral(self.inputs.lora.init):
            file_rank = 2 * rank
            init_weights = sum(target.trained_weights for target in targets)
        adapter = PlannedAdapter(rank=rank, scale=targets[0].scale, file_rank=file_rank)
        return self._estimate(setup, targets, adapter, init_weights)

    def _estimate(
        self,
        setup: Setup,
        targets: list[Target],
        adapter: PlannedAdapter | None = None,
        init_weights: int = 0,
    ) -> RunCost:
        """Return a run's budget, its alternatives, and what a rank sends.

        The alternatives are the other setting of gradient checkpointing, and the recipe changes
        that need less memory.

        Args:
            setup: how it is trained.
            targets: the adapter's; none for the control.
            adapter: what is known of it; None for the control.
            init_weights: weights of an initialization that is kept next to the trained factors, in
                memory and in the file.
        """

        def memory_of(configuration: Setup) -> int:
            cost = budget(self.model, configuration, targets)
            return _with_init_weights(cost, configuration, init_weights).memory_bytes

        cost = _with_init_weights(budget(self.model, setup, targets), setup, init_weights)
        other = replace(setup, checkpointing=not setup.checkpointing)
        return RunCost(
            **asdict(cost),
            memory_bytes=cost.memory_bytes,
            other_checkpointing_bytes=memory_of(other),
            less=in_less_memory(setup, self.inputs, self.examples, memory_of),
            sent_bytes=traffic(self.model, setup, targets, self.inputs).wire_bytes,
            adapter=adapter,
        )


def _with_init_weights(cost: Budget, setup: Setup, init_weights: int) -> Budget:
    return replace(
        cost,
        file_bytes=cost.file_bytes + FLOAT32 * init_weights,
        weight_bytes=cost.weight_bytes + setup.held_bytes * init_weights,
    )


def _runs(
    estimator: CostEstimator, setup: Setup, targets: dict[int, list[Target]]
) -> dict[str, RunCost]:
    """Return the cost of each adapter and of the control."""
    runs = {}
    for rank, adapter_targets in targets.items():
        runs[f"rank-{rank}"] = estimator.adapter(setup, adapter_targets)
    runs[CONTROL] = estimator.control(setup)
    return runs


if __name__ == "__main__":
    execute_stage(PLAN, plan)
