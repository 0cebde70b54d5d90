"""Parts of a synthetic summary: effects, scores, models, a frontier, spectra and item records.

Its values are invented but consistent: gains add up, intervals contain their means, and the
frontier ends in the models.
"""

from math import exp, log, sqrt
from pathlib import Path
from typing import Any, Literal

from pipelines.comparison.record_files import write_items
from pipelines.comparison.record_types import (
    GenerationRecord,
    ItemRecord,
    LeftOutRecord,
    TaskRecord,
)
from pipelines.config.recipe import parse_recipe

Summary = dict[str, Any]
BENCHMARKS = ("hellaswag", "piqa", "lambada")
HOSTILE = "<script>alert('x')</script>\u2028& <b>bold</b>"
METRICS = ("chrf", "exact_match")
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
LAYERS = 6
ODD = '../50% of <b>|"it\'s"//'
"""Name of a benchmark that must be escaped in a path, in HTML, in Markdown and in a query."""
DIGEST = "ef" * 32
HELD_OUT = TaskRecord(id=0, prompt_sha256=DIGEST, nll=1.0, tokens=2)


def interval(mean: float, reach: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": round(mean - reach, 6), "high": round(mean + reach, 6)}


def change(gain: float, general: float, kl: float | None = 0.05) -> Summary:
    tested = {
        name: {**interval(general), "p_value": 0.02, "adjusted_p": 0.06 - 0.05 * (name == "piqa")}
        for name in BENCHMARKS
    }
    return {
        "task_gain": interval(gain, 0.1),
        "choice_probability": interval(general),
        "accuracy": interval(round(2 * general, 6), 0.05),
        "margin": interval(round(general / 2, 6), 0.01),
        "text_loss": interval(round(general / 4, 6), 0.004),
        "chat_loss": interval(round(general * 2, 6), 0.03),
        "generation": {
            "chrf": interval(round(10 * gain, 6), 3.0),
            "exact_match": interval(0.0, 0.0),
        },
        "benchmarks": tested,
        "kl": kl,
        "kl_interval": None if kl is None else interval(kl, 0.01),
    }


def scores(loss: float, general: float = 0.0) -> Summary:
    p = round(0.512345 + general, 6)
    one = {"choice_probability": p, "accuracy": 0.425, "items": 40, "left_out": 0}
    return {
        "task_loss": loss,
        "perplexity": round(exp(loss), 6),
        "generation": {"chrf": round(60 - 10 * loss, 3), "exact_match": 0.0},
        "corpus": {"bleu": 4.1, "chrf": 31.0},
        "unfinished_answers": 3,
        "choice_probability": p,
        "accuracy": 0.425,
        "margin": 0.04,
        "text_loss": 0.812,
        "chat_loss": 2.25,
        "benchmarks": {
            name: {**one, "left_out": 2 if name == "lambada" else 0} for name in BENCHMARKS
        },
        "errors": {},
    }


def trained(rank: int | None, gain: float, general: float) -> Summary:
    weights = 305_280 * rank if rank else 134_515_008
    file_bytes = 1_228_217 * rank if rank else 269_060_552
    training = {
        "rank": rank,
        "key": "5a" * 32,
        "folder": "x",
        "result": {
            "facts": facts(weights),
            "totals": totals(round(3.6 - gain, 6)),
            "saved": {
                "file_bytes": file_bytes,
                "adapter_sha256": f"{rank:02d}" * 32 if rank else None,
                "file_rank": rank,
                "spectrum": spectrum(rank) if rank else [],
            },
            "checkpoints": {"written": 1, "seconds": 0.2, "background_seconds": 0.1},
            "peak_memory_bytes": 2_594_799_616,
        },
    }
    return {
        "training": training,
        "scores": scores(round(3.6 - gain, 6), general),
        "change": change(round(gain + 0.4, 6) if rank else gain, general),
        "total": change(gain, round(general - 0.01, 6) if rank else general),
    }


def facts(weights: int) -> Summary:
    return {
        "trained_weights": weights,
        "processor": "CPU",
        "optimizer": "AdamW",
        "attention": "flash",
        "choices": "device cpu, float32, gloo, flash attention, AdamW (on a CPU), 1 threads",
        "forward": verified(),
    }


def verified(path: str = "packed", rejected: tuple[str, ...] = ()) -> Summary:
    """Return how well a reader agrees with the model's own forward."""
    return {
        "path": path,
        "own_head": False,
        "examples": 4,
        "longest": 208,
        "loss_difference": 1e-5,
        "gradient_difference": 6e-6,
        "loss_tolerance": 1e-4,
        "gradient_tolerance": 1e-3,
        "rejected": list(rejected),
    }


def totals(loss: float) -> Summary:
    return {
        "steps": 15,
        "tokens": 17_901,
        "supervised_tokens": 1_934,
        "first_loss": 3.9,
        "last_loss": loss,
        "tokens_per_second": 207.5,
        "training_seconds": 86.2,
    }


def adapter(rank: int, gain: float, general: float, status: str) -> Summary:
    rules = [
        {
            "name": "learned enough",
            "status": "pass",
            "reason": f"{gain / 0.86:.0%} of the control's gain (0.500 to 0.900; at least 50%)",
        },
        {
            "name": "forgot little",
            "status": status,
            "reason": f"general change {general:+.3f} (−0.023 to +0.017; no less than −0.030)",
        },
    ]
    verdict = {"status": status, "reason": f"forgot little: {general:+.3f}", "rules": rules}
    gain_share = interval(round(gain / 0.86, 6), 0.1)
    one = {"items": 40, "needed": 30 + rank, "smallest_drop": 0.045, "enough": rank <= 10}
    power = {"items": 120, "needed": 90 + rank, "smallest_drop": 0.026, "enough": rank <= 30}
    power |= {"benchmarks": dict.fromkeys(BENCHMARKS, one)}
    judgment = {"gain_share": gain_share, "beyond_control": interval(0.0), "verdict": verdict}
    return {**trained(rank, gain, general), "judgment": judgment, "power": power}


def recipe(ranks: list[int]) -> Summary:
    """Return a recipe as a summary stores it, with the value of every setting."""
    values = {
        "name": "tiny_run",
        "base_model": {"id": "tiny"},
        "data": {"source": "rows.jsonl"},
        "lora": {"ranks": ranks, "learning_rate": 2e-3},
        "control": {"learning_rate": [1e-4, 3e-4]},
        "frontier": {"snapshots": [5, 10], "learning_rates": [5e-4], "cuts": [2, 8]},
        "training": {"steps": 15, "batch_size": 10},
        "registry": {"model": "tiny-model"},
    }
    return parse_recipe(values).model_dump(mode="json")


def frontier(models: Summary) -> list[Summary]:
    """Return each model at several steps, at other learning rates, and truncated to lower ranks."""
    rows = []
    for label, model in models.items():
        if "total" not in model:
            continue
        gain = model["total"]["task_gain"]["mean"]
        general = model["change"]["choice_probability"]["mean"]
        rank = model["training"]["rank"]
        lora = {
            "method": "lora" if rank else "full",
            "rank": rank,
            "learning_rate": 2e-3 if rank else 1e-4,
            "cut_from": None,
        }
        at = {5: (0.3 * gain - 0.15, 0.1 * general), 10: (0.75 * gain - 0.05, 0.5 * general)}
        rows += [
            row(f"{label}@{step}", {**lora, "step": step}, *place) for step, place in at.items()
        ]
        ends = {
            "gain": model["total"]["task_gain"],
            "general": model["change"]["choice_probability"],
        }
        rows.append({"label": label, **lora, "step": 15, "trained": True, **ends})
        if rank:
            slower = {**lora, "step": 15, "learning_rate": 5e-4}
            rows.append(row(f"{label} lr 0.0005", slower, 0.7 * gain, 0.3 * general))
    if "control" in models:
        faster = {
            "method": "full",
            "rank": None,
            "step": 15,
            "learning_rate": 3e-4,
            "cut_from": None,
        }
        rows.append(row("control lr 0.0003", faster, 0.9, -0.045))
    cut = {"method": "lora", "step": 15, "learning_rate": 2e-3, "cut_from": 64}
    rows += [
        row(f"rank-64→{rank}", {**cut, "rank": rank}, gain, -0.01 * rank**0.5)
        for rank, gain in ((2, 0.31), (8, 0.55))
    ]
    return rows


def row(label: str, settings: Summary, gain: float, general: float) -> Summary:
    return {
        "label": label,
        **settings,
        "trained": False,
        "gain": interval(round(gain, 6), 0.1),
        "general": interval(round(general, 6)),
    }


def spectrum(rank: int) -> list[Summary]:
    """Return spectra that fall more slowly in deeper layers, of which every second was counted."""
    modules = []
    for layer in range(LAYERS):
        for index, kind in enumerate(KINDS):
            values = [0.5 * (index + 1) * exp(-number / (2 + layer)) for number in range(rank)]
            fractions = [value / sum(values) for value in values]
            entropy = -sum(fraction * log(fraction) for fraction in fractions)
            modules.append(
                {
                    "module": f"model.layers.{layer}.{kind}",
                    "rank": rank,
                    "effective_rank": exp(entropy),
                    "values": values,
                    "intruders": layer if layer % 2 == 0 else None,
                }
            )
    return modules


def write_answers(path: Path, label: str) -> Path:
    """Write six answers, the second of which was stopped, a held-out example, and skipped items."""
    records: list[ItemRecord] = [HELD_OUT]
    for index in range(6):
        answer = GenerationRecord(
            id=index,
            benchmark="answers",
            prompt_sha256=DIGEST,
            prompt=f"Question {index} {HOSTILE}",
            reference=f"r{index}",
            answer=f"{label} {HOSTILE}",
            metrics={"chrf": 40.0 + sqrt(index), "exact_match": 0.0},
            errors={},
            ended=index != 1,
        )
        records.append(answer)
    long = "613 tokens exceed the context of 512"
    records += [
        left_out("general", "lambada", "lambada/0", long),
        left_out("general", "lambada", "lambada/1", long),
        left_out("text", "passages", "passages/0", long),
        left_out("generation", "answers", 6, f"its answer had no end {HOSTILE}"),
    ]
    write_items(path, records)
    return path


def left_out(
    kind: Literal["generation", "general", "text", "chat"],
    benchmark: str,
    name: int | str,
    reason: str,
) -> LeftOutRecord:
    return LeftOutRecord(
        kind=kind, id=name, benchmark=benchmark, prompt_sha256=DIGEST, left_out=reason
    )
