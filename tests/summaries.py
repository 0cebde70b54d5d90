"""A comparison as judging leaves it, for what reads one: two effects, three ranks, a frontier, a grid of control rates.

Its figures are made up, but agree with each other: gains add up, intervals hold their means, the frontier ends in the models.
"""

import json
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

from pipelines.config.recipe import parse_recipe

Summary = dict[str, Any]
BENCHMARKS = ("hellaswag", "piqa", "lambada")
HOSTILE = "<script>alert('x')</script>\u2028& <b>bold</b>"
METRICS = ("chrf", "exact_match")
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
LAYERS = 6
ODD = '../50% of <b>|"it\'s"//'
"""Name of a benchmark that is none of a file, of HTML, of Markdown, or of a query."""


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
    weights, size = (305_280 * rank, 1_228_217 * rank) if rank else (134_515_008, 269_060_552)
    figures = {
        "trained_weights": weights,
        "file_bytes": size,
        "tokens_per_second": 207.5,
        "peak_memory_bytes": 2_594_799_616,
        "steps": 15,
        "tokens": 17_901,
        "supervised_tokens": 1_934,
        "first_loss": 3.9,
        "last_loss": round(3.6 - gain, 6),
        "training_seconds": 86.2,
        **({"adapter_sha256": f"{rank:02d}" * 32} if rank else {}),
    }
    return {
        "label": f"rank-{rank}" if rank else "control",
        "rank": rank,
        "key": "5a" * 32,
        "folder": "x",
        "figures": figures,
        "scores": scores(round(3.6 - gain, 6), general),
        "change": change(round(gain + 0.4, 6) if rank else gain, general),
        "total": change(gain, round(general - 0.01, 6) if rank else general),
    }


def adapter(rank: int, gain: float, general: float, status: str) -> Summary:
    rules = [
        {
            "name": "learnt enough",
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
    share = interval(round(gain / 0.86, 6), 0.1)
    one = {"items": 40, "needed": 30 + rank, "smallest_drop": 0.045, "enough": rank <= 10}
    power = {"items": 120, "needed": 90 + rank, "smallest_drop": 0.026, "enough": rank <= 30}
    power |= {"benchmarks": dict.fromkeys(BENCHMARKS, one)}
    return {
        **trained(rank, gain, general),
        "gain_share": share,
        "beyond_control": interval(0.0),
        "verdict": verdict,
        "power": power,
    }


def recipe(ranks: list[int]) -> Summary:
    """Return a recipe as a summary keeps it: with every setting spelt out."""
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
    """Return each trained model on its way, at another rate, and the highest rank cut lower."""
    rows = []
    for label, model in models.items():
        if "total" not in model:
            continue
        gain, general, rank = (
            model["total"]["task_gain"]["mean"],
            model["change"]["choice_probability"]["mean"],
            model["rank"],
        )
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
    """Return spectra that fall more slowly the deeper the layer lies."""
    modules = []
    for layer in range(LAYERS):
        for place, kind in enumerate(KINDS):
            values = [0.5 * (place + 1) * exp(-number / (2 + layer)) for number in range(rank)]
            shares = [value / sum(values) for value in values]
            effective = exp(-sum(share * log(share) for share in shares))
            modules.append(
                {
                    "module": f"model.layers.{layer}.{kind}",
                    "rank": rank,
                    "effective_rank": effective,
                    "values": values,
                }
            )
    return modules


def build(folder: Path) -> Summary:
    """Return a comparison over a 4-bit base whose ranks stand out of order, with its item files in the folder."""
    adapters = [
        adapter(64, 0.7, -0.06, "reject"),
        adapter(4, 0.6, -0.004, "can't tell"),
        adapter(16, 0.723456, -0.0031, "pass"),
    ]
    models: Summary = {
        "base": {"scores": scores(3.6)},
        "base-nf4": {"scores": scores(4.0, -0.01), "change": change(-0.4, -0.01)},
        "control": trained(None, 0.86, -0.001),
        **{model["label"]: model for model in adapters},
    }
    counts = {
        "train_examples": 2201,
        "validation_examples": 64,
        "train_tokens": 263276,
        "supervised_tokens": 28168,
        "cut": 0,
        "left_out": 3,
    }
    return {
        "name": "tiny_run",
        "key": "ab" * 32,
        "seed": 7,
        "recipe": recipe([64, 4, 16]),
        "commit": "0123456789ab",
        "versions": {"torch": "2.13.0"},
        "machine": "2 cores, x86_64, Linux",
        "base": {
            "id": "tiny",
            "revision": "",
            "digests": {"dense": "12" * 32},
            "weights": 134_515_008,
            "tokenizer_sha256": "34" * 32,
            "template_sha256": "56" * 32,
        },
        "data": {**counts, "digest": "cd" * 32},
        "items": {label: str(write_items(folder / f"{label}.jsonl", label)) for label in models},
        "stages": [{"name": "data rows", "seconds": 16.0, "cached": True, "folder": "x"}],
        "seconds": 760.2,
        "models": models,
        "control": {
            "method": "full",
            "rates": {"0.0001": 2.91, "0.0003": 3.02},
            "chosen": 1e-4,
            "words": "The control is full fine-tuning at 0.0001, the better of two rates on examples kept for that.",
        },
        "incumbent": None,
        "general_figure": "choice_probability",
        "frontier": frontier(models),
        "recommended": {"label": "rank-16", "reason": "rank-16 is the only one that passes"},
        "spectrum": {f"rank-{rank}": spectrum(rank) for rank in (64, 4, 16)},
        "candidate": "rank-16",
        "champion": "rank-16",
        "decision": "rank-16 passes and gains most on the task (+0.723 nats a token over the base)",
    }


def write_items(path: Path, label: str) -> Path:
    """Write six answers, of which the second was stopped, a held-out example, and what was left out."""
    answers = [
        {
            "kind": "generation",
            "id": place,
            "prompt": f"ask {place} {HOSTILE}",
            "prompt_sha256": "ef" * 32,
            "answer": f"{label} {HOSTILE}",
            "reference": f"r{place}",
            "ended": place != 1,
            "metrics": {"chrf": 40.0 + sqrt(place), "exact_match": 0},
            "errors": {},
        }
        for place in range(6)
    ]
    long = {"left_out": "613 tokens exceed the context of 512"}
    left_out = [
        *(
            {"kind": "general", "benchmark": "lambada", "id": f"lambada/{place}", **long}
            for place in range(2)
        ),
        {"kind": "text", "benchmark": "passages", "id": "passages/0", **long},
        {"kind": "generation", "id": 6, "left_out": f"its answer had no end {HOSTILE}"},
    ]
    records = [{"kind": "task", "id": 0, "nll": 1.0, "tokens": 2}, *answers, *left_out]
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding="utf-8",
    )
    return path


def one_rank(summary: Summary) -> None:
    for label in ("rank-4", "rank-64"):
        del summary["models"][label], summary["spectrum"][label]
    summary["frontier"] = [row for row in summary["frontier"] if row["rank"] in (None, 16)]


def dense(summary: Summary) -> None:
    del summary["models"]["base-nf4"]


def no_champion(summary: Summary) -> None:
    summary["champion"] = summary["recommended"] = None


def nothing_kept(summary: Summary) -> None:
    summary["champion"] = summary["candidate"] = summary["recommended"] = None


def no_answers(summary: Summary) -> None:
    path = Path(summary["items"]["rank-4"])
    path.write_text(
        json.dumps({"kind": "task", "id": 0, "nll": 1.0, "tokens": 2}) + "\n", encoding="utf-8"
    )


def no_prompts(summary: Summary) -> None:
    no_answers(summary)
    for model in summary["models"].values():
        model["scores"] |= {"generation": {}, "corpus": {}, "unfinished_answers": 0}
        for effect in ("change", "total"):
            model.get(effect, {})["generation"] = {}


def no_chat(summary: Summary) -> None:
    for model in summary["models"].values():
        model["scores"] |= {"chat_loss": None, "text_loss": None}
        for effect in {"change", "total"} & model.keys():
            model[effect] |= {"chat_loss": None, "text_loss": None, "kl": None, "kl_interval": None}


def no_control(summary: Summary) -> None:
    summary["control"] = {
        "method": "none",
        "rates": {},
        "chosen": None,
        "words": "There is no control.",
    }
    summary["recipe"]["control"]["method"] = "none"
    del summary["models"]["control"], summary["items"]["control"]
    summary["frontier"] = [
        row for row in summary["frontier"] if not row["label"].startswith("control")
    ]
    for label in ("rank-64", "rank-4", "rank-16"):
        summary["models"][label] |= {"gain_share": None, "beyond_control": None}


def control_by_lora(summary: Summary) -> None:
    summary["models"]["control"]["rank"] = 128
    summary["control"]["method"] = "lora"
    summary["recipe"]["control"] |= {"method": "lora", "rank": 128}


def no_frontier(summary: Summary) -> None:
    summary["frontier"] = [row for row in summary["frontier"] if row["trained"]]


def a_rate_that_diverged(summary: Summary) -> None:
    summary["control"]["rates"]["0.001"] = None


def figures_of_any_scale(summary: Summary) -> None:
    """Give a metric of one's own, and a task that rates itself, names and values that nobody foresaw."""
    for place, model in enumerate(summary["models"].values()):
        model["scores"]["generation"]["my|metrics:a<b>"] = (-1.0) ** place * 1e30
        model["scores"]["benchmarks"][ODD] = {
            "choice_probability": None,
            "accuracy": -123456.789,
            "items": 12,
            "left_out": 0,
        }
        for effect in {"change", "total"} & model.keys():
            model[effect]["generation"]["my|metrics:a<b>"] = {
                "mean": -2e30,
                "low": -3e30,
                "high": 1e-9,
            }
            model[effect]["benchmarks"][ODD] = {
                "mean": -98765.4,
                "low": -2e9,
                "high": 0.0,
                "p_value": 0.5,
                "adjusted_p": 0.5,
            }


def questions_without_choices(summary: Summary) -> None:
    for model in summary["models"].values():
        model["scores"]["benchmarks"]["mine"] = {
            "choice_probability": None,
            "accuracy": None,
            "items": 12,
            "left_out": 0,
        }
        for effect in {"change", "total"} & model.keys():
            model[effect]["benchmarks"]["mine"] = {
                "mean": 0.1,
                "low": 0.0,
                "high": 0.2,
                "p_value": 0.0004,
                "adjusted_p": 0.0004,
            }


def a_gate_that_allows_no_drop(summary: Summary) -> None:
    for label in ("rank-64", "rank-4", "rank-16"):
        power = summary["models"][label]["power"]
        for one in (power, *power["benchmarks"].values()):
            one |= {"needed": None, "enough": None}


def no_choices(summary: Summary) -> None:
    """Leave only questions of one answer: right or wrong stands for general abilities."""
    summary["general_figure"] = "accuracy"
    for model in summary["models"].values():
        model["scores"] |= {"choice_probability": None, "margin": None}
        for effect in {"change", "total"} & model.keys():
            model[effect] |= {"choice_probability": None, "margin": None}


def no_general_ability(summary: Summary) -> None:
    """Leave every question out."""
    no_choices(summary)
    nothing_kept(summary)
    for model in summary["models"].values():
        model["scores"] |= {"accuracy": None, "benchmarks": {}}
        for effect in {"change", "total"} & model.keys():
            model[effect] |= {"accuracy": None, "benchmarks": {}}
        model["power"] = model["beyond_control"] = None
    for row in summary["frontier"]:
        row["general"] = None


UNUSUAL = (
    one_rank,
    dense,
    no_champion,
    no_answers,
    no_prompts,
    no_chat,
    no_control,
    control_by_lora,
    no_frontier,
    a_rate_that_diverged,
    figures_of_any_scale,
    questions_without_choices,
    a_gate_that_allows_no_drop,
    no_choices,
    no_general_ability,
)
