"""The pipeline around lora_core: data, base model, training, evaluation, forgetting check,
registry, workflow.
"""
