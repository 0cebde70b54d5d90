"""Answers compared with their references: each metric is a number for one answer.

The built-in metrics range from 0 to 100:

    chrf         character n-grams (Popović 2015)
    bleu         word n-grams up to the length of the answer, so that a short answer does not score
                 zero (Papineni et al. 2002)
    rouge_l      F1 of the longest common subsequence of words, of any script, and of symbols
                 (Lin 2004)
    exact_match  100 if the texts are equal except for blanks around them

A custom metric is `module:function`, called with answer, reference and prompt. Higher is better, as
in the built-in ones, so a metric that counts errors returns them below zero. An exception in it is
kept with the answer, and the other metrics continue.
"""

import difflib
import importlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipelines.errors import RecipeError
from pipelines.paths import listed

Metric = Callable[[str, str, str], float]
"""(answer, reference, prompt) → value; higher is better."""
UNSPACED = (
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
"""Characters of Chinese and Japanese, which have no blanks between words."""
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|\S")
"""One of them, a word, or a symbol."""


def load_metrics(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Metric]:
    """Return the metrics that a recipe names.

    Args:
        names: of built-in metrics, or `module:function`.
        folders: searched for modules before the installed packages.

    Raises:
        RecipeError: there is no such metric.
    """
    return {name: _imported(name, folders) if ":" in name else _built_in(name) for name in names}


def measure(
    metrics: Mapping[str, Metric], answer: str, reference: str, prompt: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Return each metric's value, and the error of each metric that failed.

    Args:
        metrics: by name, see `metrics_of`.
        answer: of the model, without outer white space.
        reference: the answer in the data.
        prompt: that was answered.

    Returns:
        name → value, and name → error; each metric is in one of them.
    """
    values: dict[str, float] = {}
    errors: dict[str, str] = {}
    for name, metric in metrics.items():
        try:
            values[name] = _number(metric(answer, reference, prompt))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a custom metric may raise even SystemExit
            errors[name] = f"{type(error).__name__}: {error}"
    return values, errors


def _number(value: object) -> float:
    number = round(float(value), 3)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ValueError(f"the value is {number}; return a finite number")
    return number


def _built_in(name: str) -> Metric:
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(
            f"evaluation.metrics has no {name!r}; {guess}use one of {', '.join(BUILT_IN)}, "
            "or a custom `module:function`"
        )
    return BUILT_IN[name]()


def _imported(name: str, folders: Sequence[Path]) -> Metric:
    module, _, function = name.partition(":")
    sys.path[:0] = [str(folder) for folder in folders if str(folder) not in sys.path]
    try:
        metric: Metric = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # a custom module may raise anything
        raise RecipeError(
            f"evaluation.metrics {name!r} cannot be imported ({type(error).__name__}: {error}); "
            f"put {module}.py into {listed(folders)}, or install the package"
        ) from error
    if not callable(metric):
        raise RecipeError(
            f"evaluation.metrics {name!r} is {metric!r}; "
            "name a function of answer, reference and prompt"
        )
    return metric


def _chrf() -> Metric:
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    return lambda answer, reference, prompt: chrf.sentence_score(answer, [reference]).score


def _bleu() -> Metric:
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)
    return lambda answer, reference, prompt: bleu.sentence_score(answer, [reference]).score


class _Tokenizer:
    """Splits a text for ROUGE, whose default tokenizer keeps only a to z and 0 to 9."""

    def tokenize(self, text: str) -> list[str]:
        return TOKEN.findall(text.lower())


def _rouge_l() -> Metric:
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
    return lambda answer, reference, prompt: 100 * rouge.score(reference, answer)["rougeL"].fmeasure


def _exact_match() -> Metric:
    return lambda answer, reference, prompt: 100.0 * (answer.strip() == reference.strip())


BUILT_IN: dict[str, Callable[[], Metric]] = {
    "chrf": _chrf,
    "rouge_l": _rouge_l,
    "bleu": _bleu,
    "exact_match": _exact_match,
}
