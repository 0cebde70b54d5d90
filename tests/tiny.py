"""A tiny random Llama with a chat template, and a recipe for it: a complete run in seconds."""

import json
from pathlib import Path
from typing import Any

TEXT = [
    "Question: What does this function do? Answer: it returns the number of items in a list.",
    "def area(width, height): return width * height",
    "The quick brown fox jumps over the lazy dog while 0123456789 sheep look on.",
]
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 320


def save_tiny_model(folder: Path, *, seed: int = 0, template: bool = True) -> Path:
    """Write a two-layer Llama with a byte-level tokenizer; the same seed gives the same weights."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bytes_and_merges = ByteLevelBPETokenizer()
    bytes_and_merges.train_from_iterator(
        TEXT, vocab_size=VOCABULARY, special_tokens=["<|start|>", "<|end|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_merges._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pairs(path: Path, rows: int = 60) -> Path:
    """Write prompts and completions that a tiny model can learn: the completion repeats a word."""
    words = ["red", "green", "blue", "left", "right", "north", "south", "east", "west", "up"]
    with path.open("w") as stream:
        for number in range(rows):
            word = words[number % len(words)]
            row = {"prompt": f"Say {word} {number}.", "completion": f"{word} {word}."}
            stream.write(json.dumps(row) + "\n")
    return path


def tiny_recipe(model: Path, data: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain values; `changes` are merged into its sections."""
    recipe: dict[str, Any] = {
        "name": "pairs_tiny_cpu",
        "base_model": {"id": str(model), "quantization": "nf4"},
        "data": {"source": str(data), "validation_examples": 8, "max_tokens": 64},
        "lora": {"ranks": [2, 4], "alpha": 8, "learning_rate": 0.01},
        "control": {"learning_rate": 0.001},
        "training": {
            "steps": 6,
            "batch_size": 4,
            "checkpoint_every": 2,
            "checkpoint_time_fraction": 1,
        },
        "launch": {"config": "cpu_single", "processes": 1, "evaluations_at_once": 2},
        "evaluation": {"items_per_benchmark": 4, "generations": 2, "max_new_tokens": 4},
        "registry": {"model": "pairs-tiny"},
    }
    for section, values in changes.items():
        if isinstance(values, dict):
            values = {**recipe[section], **values}
        recipe[section] = values
    return recipe
