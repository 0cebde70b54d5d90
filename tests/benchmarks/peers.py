"""The other contestants of the benchmark: PEFT in a short loop, and TRL's SFTTrainer over PEFT.

    python tests/benchmarks/peers.py peft|trl|trl-float32 TASK.json RESULT.json

They get the same frozen NF4 base, computed in float32 with PyTorch's attention and loaded with
`from_pretrained`, and the same adapter, steps and AdamW.
"""

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from ours import Record, Task, run_contestant
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pipelines.models.tokenizer import load_tokenizer
from pipelines.training.step import FINAL_LR_MULTIPLIER, lr_multiplier

IGNORED = -100
"""Label of a token that is not supervised."""


def peft_loop(task: Task) -> Record:
    """Train in the usual way: padded batch, logits at every position, the model's loss, AdamW."""
    model, record = adapted(task), Record()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=task.inputs.learning_rate,
        weight_decay=task.inputs.training.weight_decay,
    )
    schedule = LambdaLR(optimizer, partial(lr_multiplier, warmup_steps=0, steps=task.steps))
    for examples in task.batches():
        loss = model(**padded(examples)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        record.losses.append(loss.item())
        record.step_ended()
    return record


def trl_as_it_is(task: Task) -> Record:
    """Train with SFTTrainer unchanged: over a 4-bit base it converts the adapter to bfloat16."""
    return sft(task, keeps_float32=False)


def trl_float32(task: Task) -> Record:
    """Train with SFTTrainer and the adapter restored to float32, as in the other contestants."""
    return sft(task, keeps_float32=True)


def adapted(task: Task) -> PeftModel:
    """Return the base with the common adapter in PEFT, ready to train, all in float32."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        str(task.paths.base), dtype=torch.float32, quantization_config=quantization
    )
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, str(task.paths.adapter), is_trainable=True)
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


def sft(task: Task, *, keeps_float32: bool) -> Record:
    """Train with SFTTrainer, configured to do nothing but the steps."""
    model, record = adapted(task), Record()
    initial = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = SFTTrainer(
        model=model,
        args=sft_config(task),
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


def sft_config(task: Task) -> SFTConfig:
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
        gradient_checkpointing=False,
        bf16=False,
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


if __name__ == "__main__":
    run_contestant({"peft": peft_loop, "trl": trl_as_it_is, "trl-float32": trl_float32})
