"""What `lora check` and the report show about prepared data: lengths and previews."""

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipelines.data.usable import Indices
from pipelines.runtime.interfaces.results import LengthHistogram, Preview

BINS = 10
PREVIEWS = 3
PREVIEW_TOKENS = 300


def histogram(lengths: Indices) -> LengthHistogram:
    """Return the distribution of lengths, in tokens.

    Args:
        lengths: (N,) tokens of each example, N ≥ 1.

    Returns:
        at most BINS bins of about equal width; an integer is in exactly one.
    """
    longest = int(lengths.max())
    edges = np.unique(np.ceil(np.linspace(int(lengths.min()) - 1, longest, BINS + 1)).astype(int))
    counts, _ = np.histogram(lengths, bins=edges + 0.5)
    median, percentile_95, percentile_99 = np.percentile(lengths, (50, 95, 99), method="higher")
    return LengthHistogram(
        upper=tuple(int(edge) for edge in edges[1:]),
        counts=tuple(int(count) for count in counts),
        median=int(median),
        percentile_95=int(percentile_95),
        percentile_99=int(percentile_99),
        longest=longest,
    )


def previews(train: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Preview, ...]:
    """Return the first training examples, token by token.

    Args:
        train: the training split.
        tokenizer: decodes each token alone.

    Returns:
        at most PREVIEWS examples, each with its first PREVIEW_TOKENS tokens.
    """
    found = []
    for example in train.select(range(min(PREVIEWS, len(train)))):
        ids = example["input_ids"]
        shown = ids[:PREVIEW_TOKENS]
        preview = Preview(
            tokens=tuple(str(tokenizer.decode([token])) for token in shown),
            supervised=tuple(example["supervised"][:PREVIEW_TOKENS]),
            more_tokens=len(ids) - len(shown),
        )
        found.append(preview)
    return tuple(found)
