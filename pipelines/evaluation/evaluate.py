"""Score one model: the base, the base in 4 bits, the control, or an adapter on its base.

    python -m pipelines.evaluation.evaluate STAGE_FOLDER

items.jsonl keeps what was seen item by item, in the same order for every model, so that models are compared in pairs and
anyone can compute the figures again.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_core import load_adapter
from lora_core.base.dequantise import dequantise
from lora_core.files import write_text
from pipelines.child import run_stage
from pipelines.evaluation.benchmarks import sample
from pipelines.evaluation.scoring import score_examples, score_items
from pipelines.hardware import detect, peak_memory_bytes
from pipelines.model import load_model
from pipelines.tokenizer import load_tokenizer

ITEMS = "items.jsonl"
GENERATION_BATCH = 24


def evaluate(folder: Path, inputs: dict[str, Any], paths: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Write items.jsonl for the model that the inputs name."""
    hardware, settings = detect(), inputs["evaluation"]
    tokenizer = load_tokenizer(Path(paths["base"]))
    items = [item for name in settings["general"] for item in sample(name, settings["items_per_benchmark"], inputs["seed"])]
    examples = list(load_from_disk(str(Path(paths["data"]) / "validation")))
    model = load_model(Path(paths.get("model", paths["base"])), inputs["quantization"], hardware)
    if "adapter" in paths:
        load_adapter(model, Path(paths["adapter"]))
    if hardware.device == "cpu":
        dequantise(model, hardware.dtype)
    records = [*score_examples(model, examples), *score_items(model, tokenizer, items)]
    records += generate_and_score(model, tokenizer, examples[: settings["generations"]], settings["max_new_tokens"])
    write_text(folder / ITEMS, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return {"items": len(records), "peak_memory_bytes": peak_memory_bytes()}, [ITEMS]


def generate_and_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield, for each example with a prompt, the greedy answer with its chrF and ROUGE-L F1, both of 100."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    chrf, rouge = CHRF(), RougeScorer(["rougeL"], use_stemmer=False)
    prompted = [(place, example) for place, example in enumerate(examples) if example["prompt_tokens"] > 0 and example["reference"]]
    for start in range(0, len(prompted), GENERATION_BATCH):
        part = prompted[start : start + GENERATION_BATCH]
        answers = generate(model, tokenizer, [example["input_ids"][: example["prompt_tokens"]] for _, example in part], max_new_tokens)
        for (place, example), answer in zip(part, answers, strict=True):
            reference = example["reference"]
            yield {
                "kind": "generation",
                "id": place,
                "prompt": str(tokenizer.decode(example["input_ids"][: example["prompt_tokens"]], skip_special_tokens=True)).strip(),
                "answer": answer,
                "reference": reference,
                "chrf": round(chrf.sentence_score(answer, [reference]).score, 3),
                "rouge_l": round(100 * rouge.score(reference, answer)["rougeL"].fmeasure, 3),
            }


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Answer token prompts greedily, as one batch padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[filler] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    packed = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=filler,
            eos_token_id=tokenizer.eos_token_id,
        )
    finally:
        model.set_attn_implementation(packed)
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


if __name__ == "__main__":
    run_stage(evaluate)
