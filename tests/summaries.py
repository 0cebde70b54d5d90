"""A synthetic summary of a comparison, and unusual variants of it, for its readers' tests.

It has two effects, three ranks, a frontier and a grid of the control's learning rates; see
`summary_parts`.
"""

from pathlib import Path

from summary_parts import (
    BENCHMARKS,
    HELD_OUT,
    HOSTILE,
    KINDS,
    LAYERS,
    METRICS,
    ODD,
    Summary,
    adapter,
    change,
    frontier,
    interval,
    recipe,
    scores,
    spectrum,
    trained,
    verified,
    write_answers,
)

from pipelines.comparison import document
from pipelines.comparison.record_files import write_items

__all__ = [
    "BENCHMARKS",
    "HOSTILE",
    "KINDS",
    "LAYERS",
    "METRICS",
    "ODD",
    "Summary",
    "interval",
    "parsed",
    "spectrum",
]


def build(folder: Path) -> Summary:
    """Return a comparison over a 4-bit base with unordered ranks; write its item files.

    It has the plain values of summary.json, which a test may change before it parses them; see
    `parsed`.
    """
    models: Summary = {
        "base": {"scores": scores(3.6)},
        "base-nf4": {"scores": scores(4.0, -0.01), "change": change(-0.4, -0.01)},
        "control": trained(None, 0.86, -0.001),
        "rank-64": adapter(64, 0.7, -0.06, "reject"),
        "rank-4": adapter(4, 0.6, -0.004, "can't tell"),
        "rank-16": adapter(16, 0.723456, -0.0031, "pass"),
    }
    counts = {
        "train_examples": 2201,
        "validation_examples": 64,
        "train_tokens": 263276,
        "template_sha256": "56" * 32,
        "supervised_tokens": 28168,
        "cut": 0,
        "cut_held_out": 0,
        "left_out": 3,
        "rows": 2268,
        "tuning_examples": 0,
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
            "folder": "x",
            "id": "tiny",
            "revision": "",
            "forward": verified(),
            "trust_remote_code": False,
            "context_tokens": 512,
            "digests": {"dense": "12" * 32},
            "weights": 134_515_008,
            "tokenizer_sha256": "34" * 32,
            "template_sha256": "56" * 32,
        },
        "data": {**counts, "digest": "cd" * 32},
        "items": {label: str(write_answers(folder / f"{label}.jsonl", label)) for label in models},
        "stages": [{"name": "data rows", "seconds": 16.0, "cached": True, "folder": "x"}],
        "seconds": 760.2,
        "models": models,
        "control": {
            "method": "full",
            "rates": {"0.0001": 2.91, "0.0003": 3.02},
            "chosen": 1e-4,
            "words": "The control is full fine-tuning at 0.0001, the better of two rates on "
            "examples kept for that.",
        },
        "registered_champion": None,
        "general_metric": "choice_probability",
        "forward": {},
        "frontier": frontier(models),
        "recommended": {"label": "rank-16", "reason": "rank-16 is the only one that passes"},
        "candidate": "rank-16",
        "champion": "rank-16",
        "decision": "rank-16 passes and gains most on the task (+0.723 nats a token over the base)",
    }


def parsed(summary: Summary) -> document.Summary:
    """Return the typed summary, as the pipeline passes it to reports and to the registry."""
    return document.Summary.model_validate(summary)


def one_rank(summary: Summary) -> None:
    for label in ("rank-4", "rank-64"):
        del summary["models"][label]
    summary["frontier"] = [row for row in summary["frontier"] if row["rank"] in (None, 16)]


def dense(summary: Summary) -> None:
    del summary["models"]["base-nf4"]


def no_champion(summary: Summary) -> None:
    summary["champion"] = summary["recommended"] = None


def nothing_kept(summary: Summary) -> None:
    summary["champion"] = summary["candidate"] = summary["recommended"] = None


def no_answers(summary: Summary) -> None:
    path = Path(summary["items"]["rank-4"])
    write_items(path, [HELD_OUT])


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
        summary["models"][label]["judgment"] |= {"gain_share": None, "beyond_control": None}


def control_by_lora(summary: Summary) -> None:
    summary["models"]["control"]["training"]["rank"] = 128
    summary["control"]["method"] = "lora"
    summary["recipe"]["control"] |= {"method": "lora", "rank": 128}


def no_frontier(summary: Summary) -> None:
    summary["frontier"] = [row for row in summary["frontier"] if row["trained"]]


def a_rate_that_diverged(summary: Summary) -> None:
    summary["control"]["rates"]["0.001"] = None


def figures_of_any_scale(summary: Summary) -> None:
    """Give a custom metric and a custom benchmark extreme values and names that need escaping."""
    for index, model in enumerate(summary["models"].values()):
        model["scores"]["generation"]["my|metrics:a<b>"] = (-1.0) ** index * 1e30
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
    """Leave only questions with one answer, so that accuracy measures general abilities."""
    summary["general_metric"] = "accuracy"
    for model in summary["models"].values():
        model["scores"] |= {"choice_probability": None, "margin": None}
        for effect in {"change", "total"} & model.keys():
            model[effect] |= {"choice_probability": None, "margin": None}


def no_general_ability(summary: Summary) -> None:
    """Leave out every question."""
    no_choices(summary)
    nothing_kept(summary)
    for model in summary["models"].values():
        model["scores"] |= {"accuracy": None, "benchmarks": {}}
        for effect in {"change", "total"} & model.keys():
            model[effect] |= {"accuracy": None, "benchmarks": {}}
        model["power"] = None
        if "judgment" in model:
            model["judgment"]["beyond_control"] = None
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
