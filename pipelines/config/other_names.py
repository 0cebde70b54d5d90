"""Names of settings in other fine-tuning tools, and the keys of a recipe that replace them."""

NAMES: dict[str, tuple[str, ...]] = {
    "training.epochs": ("num_train_epochs", "num_epochs", "n_epochs"),
    "training.steps": ("max_steps", "num_steps", "train_steps", "total_steps", "max_iters"),
    "training.batch_size": (
        "micro_batch_size",
        "per_device_train_batch_size",
        "train_batch_size",
        "global_batch_size",
    ),
    "training.gradient_accumulation_steps": ("grad_accum", "grad_accum_steps", "accumulate_steps"),
    "training.warmup_steps": ("warmup_ratio", "warmup", "num_warmup_steps"),
    "training.evaluate_every": ("eval_steps", "eval_interval", "evaluation_strategy"),
    "training.early_stopping_patience": ("patience", "early_stopping"),
    "training.checkpoint_every": ("save_steps", "save_interval", "save_strategy"),
    "training.checkpoints_kept": ("save_total_limit",),
    "training.max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad_norm"),
    "data.max_tokens": (
        "sequence_len",
        "sequence_length",
        "seq_length",
        "seq_len",
        "max_seq_length",
        "max_seq_len",
        "max_length",
        "model_max_length",
        "cutoff_len",
        "block_size",
    ),
    "data.source or data.sources": (
        "dataset",
        "datasets",
        "dataset_name",
        "dataset_path",
        "data_path",
        "data_files",
        "train_file",
        "train_data",
    ),
    "data.split": ("train_split", "dataset_split"),
    "data.config": ("dataset_config", "dataset_config_name", "subset"),
    "data.validation_examples or data.validation_source": (
        "val_set_size",
        "test_size",
        "validation_size",
        "eval_dataset",
        "test_datasets",
        "validation_file",
        "val_data",
    ),
    "data.supervise": ("train_on_inputs", "train_on_prompt", "mask_prompt", "completion_only_loss"),
    "data.eos_token": ("special_tokens",),
    "data.columns": (
        "field_instruction",
        "field_input",
        "field_output",
        "field_messages",
        "field_system",
        "field",
        "dataset_text_field",
        "text_field",
        "text_column",
        "prompt_column",
        "response_column",
        "message_field",
        "messages_field",
        "column_mapping",
    ),
    "data.roles": ("role_mapping", "message_property_mappings", "roles_mapping"),
    "data.chat_template": ("prompt_template", "conversation_template", "prompt_format"),
    "data.max_rows": ("max_samples", "max_train_samples", "num_samples"),
    "lora.ranks": ("r", "rank", "lora_r", "lora_rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.target_modules": ("lora_target", "lora_target_modules", "lora_target_linear", "targets"),
    "lora.init": ("init_lora_weights", "init_weights"),
    "lora.use_dora": ("dora", "peft_use_dora"),
    "lora.use_rslora": ("rslora", "peft_use_rslora"),
    "lora.layers_to_transform": ("num_layers", "lora_layers", "peft_layers_to_transform"),
    "lora.loraplus_ratio": ("loraplus_lr_ratio",),
    "lora.learning_rate": ("lr", "peak_lr", "max_lr"),
    "base_model.id": (
        "model",
        "model_id",
        "model_name",
        "model_name_or_path",
        "base_model_name",
        "base_model_id",
        "pretrained_model_name_or_path",
    ),
    "base_model.revision": ("model_revision", "revision_of_model"),
    "base_model.quantization": (
        "load_in_4bit",
        "load_in_8bit",
        "bnb_4bit_quant_type",
        "quantization_bit",
        "quantization_config",
        "quantize",
    ),
    "launch.config": ("deepspeed", "fsdp", "fsdp_config", "accelerate_config", "distributed"),
    "launch.processes": ("num_processes", "nproc_per_node", "world_size", "num_gpus"),
    "launch.machines": ("num_machines", "nnodes", "num_nodes"),
    "registry.experiment": ("mlflow_experiment_name", "experiment_name", "wandb_project"),
    "registry.model": ("hub_model_id", "registered_model_name"),
    "name": ("run_name", "wandb_name", "wandb_run_id"),
}
"""Key of a recipe → names in other tools."""
NOTES = {
    "training.batch_size": "examples per step over all processes",
    "training.warmup_steps": "a number of steps",
    "data.columns": "such as `prompt: question`",
    "data.supervise": "assistant, last or all",
    "data.chat_template": "chatml or a Jinja file",
    "base_model.quantization": "nf4 for 4 bits, or none",
    "launch.config": "a file of infra/accelerate, or your own",
}
"""Key of a recipe → what its value means."""
DERIVED: dict[str, tuple[str, ...]] = {
    "the dtype follows from the hardware; remove it": (
        "bf16",
        "fp16",
        "tf32",
        "dtype",
        "torch_dtype",
        "compute_dtype",
        "bnb_4bit_compute_dtype",
    ),
    "the optimizer is AdamW, in 8 bits only if the GPU is too small; remove it": (
        "optim",
        "optimizer",
        "optimizers",
    ),
    "the learning rate rises over training.warmup_steps and falls along a cosine to a tenth; "
    "remove it": ("lr_scheduler", "lr_scheduler_type", "scheduler", "lr_schedule"),
    "examples are packed without padding wherever the base allows it; remove it": (
        "packing",
        "sample_packing",
        "pad_to_sequence_len",
        "group_by_length",
    ),
    "the attention kernel follows from the hardware; remove it": (
        "flash_attention",
        "flash_attn",
        "attn_implementation",
        "xformers_attention",
        "sdp_attention",
    ),
    "results are in the folder that the environment variable LORA_RUNS names; remove it": (
        "output_dir",
        "save_dir",
        "out_dir",
        "output_path",
        "logging_dir",
    ),
    "every step is logged, to MLflow; remove it": ("logging_steps", "report_to", "log_interval"),
    "this fine-tunes with LoRA and compares with control.method; remove it": (
        "adapter",
        "finetuning_type",
        "peft_type",
        "stage",
        "task_type",
        "use_peft",
    ),
}
"""What replaces a setting that a recipe does not have → its names in other tools."""


def _by_name(names_of: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {name: key for key, names in names_of.items() for name in names}


KEY_OF = _by_name(NAMES)
"""Name in another tool → key of a recipe."""
REASON_OF = _by_name(DERIVED)
"""Name in another tool → why a recipe does not have it."""
