"""Everything about prepared data that may be unintended: for the terminal, the report and Prefect.

Imports no torch.
"""

from collections.abc import Sequence

from pipelines.config.data_section import DataSection
from pipelines.data.notes import MEANING
from pipelines.runtime.interfaces.results import CheckResult, DataResult

CUT_FRACTION = 0.05
"""Fraction of truncated examples above which a warning is given."""


def data_warnings(result: DataResult, check: CheckResult, settings: DataSection) -> tuple[str, ...]:
    """Return what may be unintended, each with a suggested fix.

    Args:
        result: what preparation counted.
        check: which evaluation items the training data contain.
        settings: the recipe's, with the limits that the fixes name.
    """
    found = [*_length_warnings(result, settings), *_split_warnings(result)]
    for source in result.sources:
        if source.unused_columns:
            names = ", ".join(source.unused_columns)
            found.append(
                f"{source.source}: not used are the columns {names}; name a column in "
                "data.columns if it should be"
            )
    if result.bad_rows:
        found.append(
            f"{result.bad_rows:,} rows cannot be learned as written and are removed "
            "(data.bad_rows: error lists them)"
        )
    for note, count in result.notes.items():
        found.append(f"{count:,} examples: {MEANING[note]}")
    for name, count in check.contaminated.items():
        found.append(
            f"{count} items of {name} are in the training data, so that they do not measure what "
            "is forgotten; remove those rows, or the benchmark"
        )
    return tuple(found)


def data_markdown(result: DataResult, warnings: Sequence[str]) -> str:
    """Return the sources, counts and warnings as Markdown.

    Args:
        result: what preparation counted.
        warnings: as `data_warnings` returns them; each becomes an item of a list.
    """
    lines = [
        "| source | format | rows | schema | used | not used |",
        "|---|---|---|---|---|---|",
    ]
    for source in result.sources:
        cells = [
            source.source,
            source.format,
            f"{source.rows:,}",
            source.schema_name,
            ", ".join(source.used_columns),
            ", ".join(source.unused_columns),
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    lines += [
        "",
        f"{result.train_examples:,} training examples with {result.train_tokens:,} tokens, of "
        f"which {result.supervised_tokens:,} are supervised; {result.validation_examples:,} "
        f"held-out examples; {result.cut:,} truncated; median length "
        f"{result.lengths.median:,} tokens, longest {result.lengths.longest:,}.",
        "",
    ]
    lines += [f"- {warning}" for warning in warnings]
    return "\n".join(lines)


def _length_warnings(result: DataResult, settings: DataSection) -> list[str]:
    found = []
    usable = sum(result.lengths.counts)
    if usable and result.cut > CUT_FRACTION * usable:
        found.append(
            f"{result.cut:,} of {usable:,} examples are truncated to data.max_tokens "
            f"{settings.max_tokens}, so that their ends are not learned; "
            f"{result.lengths.percentile_99} would keep 99 % of them complete"
        )
    if result.left_out:
        found.append(
            f"{result.left_out:,} examples are left out, because no supervised token is within "
            f"data.max_tokens {settings.max_tokens} or because they are longer; raise it"
        )
    missing = result.train_examples - result.ends_supervised - result.cut
    if result.train_examples and missing > 0:
        found.append(
            f"the token that ends an answer is not supervised in {missing:,} training examples, "
            "so the model does not learn to stop there; check data.eos_token and the chat template"
        )
    return found


def _split_warnings(result: DataResult) -> list[str]:
    found = []
    overlap = result.overlap
    if overlap.exact or overlap.near:
        examples = "; ".join(overlap.examples)
        counts = []
        if overlap.exact:
            counts.append(f"{overlap.exact} held-out examples are also in the training examples")
        if overlap.near:
            counts.append(f"{overlap.near} held-out examples nearly equal a training example")
        found.append(
            f"{' and '.join(counts)} ({examples}), so that scores are too good; remove "
            "duplicates, or name a data.group_column"
        )
    if result.excluded_examples:
        found.append(
            f"{result.excluded_examples:,} training examples are excluded, because validation "
            "rows start with the same question"
        )
    if result.unused_examples:
        found.append(
            f"{result.unused_examples:,} examples are neither trained on nor scored: they share a "
            "group with held-out examples, or a weight below 1 leaves them out; raise "
            "data.validation_examples to score more of them"
        )
    return found
