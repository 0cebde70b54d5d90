"""The other contestants of the benchmark: PEFT in a short loop, and TRL's SFTTrainer over PEFT.

    python tests/benchmarks/peers.py CONTESTANT TASK.json RESULT.json

    peft-float32          base, adapter and computation in float32
    peft-bfloat16         base in bfloat16, computed under autocast; the adapter is float32
    trl-float32           SFTTrainer over a float32 base; it converts an adapter over 4 bits to
                          bfloat16
    trl-float32-adapter   the same with the adapter restored to float32
    trl-bfloat16          SFTTrainer with bf16=True over a base in bfloat16

They get the same base with PyTorch's attention, loaded with `from_pretrained`, and the same
adapter, steps and AdamW. Full fine-tuning trains float32 weights, in bfloat16 under autocast.
"""

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from ours import Contestant, Record, Task, run_contestant
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pipelines.models.tokenizer import load_tokenizer
from pipelines.training.step import FINAL_LR_MULTIPLIER, lr_multiplier

IGNORED = -100
"""Label of a token that is not supervised."""


def peft_loop(task: Task, dtype: torch.dtype) -> Record:
    """Train in the usual way: padded batch, logits at every position, the model's loss, AdamW."""
    model, record = model_of(task, dtype), Record()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=task.inputs.learning_rate,
        weight_decay=task.inputs.training.weight_decay,
        fused=True,
    )
    schedule = LambdaLR(optimizer, partial(lr_multiplier, warmup_steps=0, steps=task.steps))
    for examples in task.batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model(**padded(examples)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        record.losses.append(loss.item())
        record.step_ended()
    return record


def model_of(task: Task, dtype: torch.dtype) -> Any:
    """Return the base with the common adapter in PEFT, or all weights, ready to train.

    Args:
        task: of all contestants.
        dtype: of the base's weights that are not quantized, and of its products; weights that are
            trained are float32.
    """
    options: dict[str, Any] = {"dtype": torch.float32 if task.is_full else dtype}
    if task.inputs.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(str(task.paths.base), **options)
    model.config.use_cache = False
    if task.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not task.is_full:
        model = PeftModel.from_pretrained(model, str(task.paths.adapter), is_trainable=True)
    model.train()
    return model


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the examples as a batch, padded on the right to the longest."""
    longest = max(len(example["input_ids"]) for example in examples)

    def table(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

    return {
        "input_ids": table([example["input_ids"] for example in examples], 0),
        "attention_mask": table([[1] * len(example["input_ids"]) for example in examples], 0),
        "labels": table([labels(example) for example in examples], IGNORED),
    }


def labels(example: dict[str, Any]) -> list[int]:
    """Return the supervised tokens, and the ignored label at all other positions."""
    return [
        token if supervised else IGNORED
        for token, supervised in zip(example["input_ids"], example["supervised"], strict=True)
    ]


def sft(task: Task, dtype: torch.dtype, *, keeps_float32: bool = False) -> Record:
    """Train with SFTTrainer, configured to do nothing but the steps.

    Args:
        task: of all contestants.
        dtype: see `model_of`.
        keeps_float32: restore the adapter, which SFTTrainer converts over a 4-bit base.
    """
    model, record = model_of(task, dtype), Record()
    initial = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = SFTTrainer(
        model=model,
        args=sft_config(task, dtype),
        train_dataset=sft_dataset(task),
        processing_class=load_tokenizer(task.paths.required("base")),
        callbacks=[Timer(record)],
    )
    if keeps_float32:
        for name, values in initial.items():
            model.get_parameter(name).data = values
    trainer.train()
    record.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return record


def sft_config(task: Task, dtype: torch.dtype) -> SFTConfig:
    """Return TRL's config of the task, without checkpoints, evaluation, reports or workers."""
    return SFTConfig(
        output_dir=str(task.paths.required("adapter").parent / "trl"),
        max_steps=task.steps,
        per_device_train_batch_size=task.inputs.training.batch_size,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=task.inputs.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": FINAL_LR_MULTIPLIER},
        weight_decay=task.inputs.training.weight_decay,
        max_grad_norm=0.0,  # no clipping
        gradient_checkpointing=task.checkpointing,
        bf16=dtype is torch.bfloat16,
        use_cpu=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
    )


def sft_dataset(task: Task) -> Dataset:
    """Return the examples in step order, tokenized and labeled: TRL supervises the same tokens."""
    examples = [example for batch in task.batches() for example in batch]
    return Dataset.from_list(
        [{"input_ids": example["input_ids"], "labels": labels(example)} for example in examples]
    )


class Timer(TrainerCallback):
    """Records the end of each step."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.record.step_ended()


CONTESTANTS: dict[str, Contestant] = {
    "peft-float32": partial(peft_loop, dtype=torch.float32),
    "peft-bfloat16": partial(peft_loop, dtype=torch.bfloat16),
    "trl-float32": partial(sft, dtype=torch.float32),
    "trl-float32-adapter": partial(sft, dtype=torch.float32, keeps_float32=True),
    "trl-bfloat16": partial(sft, dtype=torch.bfloat16),
}

if __name__ == "__main__":
    run_contestant(CONTESTANTS)
