"""Read the settings of a YAML file; a key that is written twice is an error.

YAML forbids duplicate keys, and PyYAML keeps the last value without a warning.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipelines.errors import RecipeError


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        RecipeError: the file is not UTF-8 text or not valid YAML, or repeats a key.
    """
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        repeated = list(_repeated_keys(node, "", set()))
        if repeated:
            raise RecipeError(f"{file}: {'; '.join(repeated)}")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{file} is not valid YAML: {reason}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error


def _repeated_keys(node: Node | None, prefix: str, seen: set[int]) -> Iterator[str]:
    """Yield a sentence for each key that a mapping contains twice.

    Args:
        node: a composed document or a part of it.
        prefix: the keys that lead to it, with a dot at the end.
        seen: ids of the nodes that were visited; an alias leads to the same node.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for number, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{prefix}{number}.", seen)
    if isinstance(node, MappingNode):
        yield from _repeated_in_mapping(node, prefix)
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else "?"
            yield from _repeated_keys(value, f"{prefix}{name}.", seen)


def _repeated_in_mapping(node: MappingNode, prefix: str) -> Iterator[str]:
    line_of: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            continue
        identity = (key.tag, key.value)
        line = key.start_mark.line + 1
        if identity in line_of:
            first = line_of[identity]
            yield f"key '{prefix}{key.value}' is on line {first} and again on line {line}; keep one"
        line_of[identity] = line
