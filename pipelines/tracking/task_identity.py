"""What a version's task is, as tags: only versions of the same task can be compared.

The champion is scored on the held-out items of the new adapters. That is a comparison only if both
learned the same task from the same source, split and measured in the same way; with another split,
the champion may have been trained on these items.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipelines.config.recipe import Recipe

NOT_SCORED = {"execute_seconds"}
"""Evaluation settings that do not affect a score."""
NOT_A_SOURCE = {"weight", "revision"}
"""Settings that a source may change and still be the same, as a file may get other rows."""
NAMES = {
    "task.source": "data source",
    "task.group_column": "group column",
    "task.held_out": "held-out examples",
    "task.format": "format of the examples",
    "task.evaluation": "evaluation settings",
}
"""Tag → what it identifies."""
FORMAT = (
    "supervise",
    "supervise_empty_thinking",
    "chat_template",
    "eos_token",
    "template_arguments",
    "max_tokens",
    "long_examples",
)
HELD_OUT = ("validation_source", "validation_split", "validation_examples")
MAX_TEXT = 120
"""Longer values are replaced by their digest."""


def task_tags(recipe: Recipe) -> dict[str, str]:
    """Return the tags that identify the task of a recipe's adapters."""
    data = recipe.data
    sources = []
    for source in data.all_sources:
        settings = source.model_dump(mode="json", exclude=NOT_A_SOURCE, exclude_defaults=True)
        sources.append(settings)
    values = data.model_dump(mode="json")
    return {
        "task.source": _compact(sources),
        "task.group_column": _compact(data.group_column),
        "task.held_out": _compact({name: values[name] for name in HELD_OUT}),
        "task.format": _compact({name: values[name] for name in FORMAT}),
        "task.evaluation": _compact(recipe.evaluation.model_dump(mode="json", exclude=NOT_SCORED)),
    }


def task_objection(recipe: Recipe, tags: Mapping[str, str]) -> str | None:
    """Return why a version with these tags is of another task; None if it is of the recipe's."""
    for tag, expected in task_tags(recipe).items():
        found = tags.get(tag)
        if found is None:
            return (
                f"its version does not record its {NAMES[tag]} (the tag {tag}), so that it may "
                "have learned another task; run the recipe that registered it once more, which "
                "records it"
            )
        if found != expected:
            return (
                f"it belongs to another task: its {NAMES[tag]} is {found}, and this recipe's is "
                f"{expected}; give each task its own registry.model"
            )
    return None


def _compact(value: Any) -> str:
    """Return a value as JSON, or its digest if that is long."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if len(text) <= MAX_TEXT:
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
