"""The pipeline around lora_core: data, base model, training, evaluation, registry, workflow."""
