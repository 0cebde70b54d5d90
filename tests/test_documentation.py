"""What the documentation refers to exists: links, images, make targets, commands, quickstart."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from command import lora

from pipelines.cli import app
from pipelines.config.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "*/README.md", "pipelines/recipes/README.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TARGET = re.compile(r"`make ([a-z]+)")
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)

each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def lora_commands(path: Path) -> list[list[str]]:
    """Return the `lora` commands of code blocks and table cells, word by word."""
    text = text_of(path)
    blocks = [line for _, body in BLOCK.findall(text) for line in body.splitlines()]
    lines = [line.partition("#")[0].strip() for line in blocks]
    lines += re.findall(r"`(lora [a-z][^`]*)`", BLOCK.sub("", text))
    return [line.split() for line in lines if line.startswith("lora ")]


@each_document
def test_relative_links_and_images_exist(path: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(text_of(path))]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


@each_document
def test_make_targets_exist(path: Path) -> None:
    rules = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    assert set(TARGET.findall(text_of(path))) <= rules


@each_document
def test_lora_commands_and_their_options_exist(path: Path) -> None:
    for words in lora_commands(path):
        command: Any = typer.main.get_command(app)
        for word in words[1:]:
            command = getattr(command, "commands", {word: command})[word]
        known = {name for option in command.params for name in option.opts}
        given = {word for word in words[2:] if word.startswith("--")}
        assert given <= known, words


def test_every_target_is_documented() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", text_of(ROOT / "Makefile"), re.MULTILINE)
    assert phony is not None
    texts = "\n".join(text_of(path) for path in DOCUMENTS)
    documented = set(re.findall(r"make ([a-z]+)", texts))
    assert set(phony[1].split()) - documented <= {"clean", "format"}


def test_the_front_page_is_short_and_links_to_the_rest() -> None:
    text = text_of(README)
    words = len(text.split())
    headings = len(re.findall(r"^#+ ", text, re.MULTILINE))
    assert words <= 900
    assert words / headings <= 130
    assert len(LINK.findall(text)) >= 20
    assert len(re.findall(r"!\[", text)) >= 3


def quickstart() -> tuple[str, str]:
    """Return the example row and the recipe of the README's quickstart."""
    bodies = {}
    for language, body in re.findall(r"```(json|yaml)\n(.*?)```", text_of(README), re.DOTALL):
        bodies[language] = "\n".join(line.removeprefix("   ") for line in body.splitlines())
    return bodies["json"], bodies["yaml"]


def test_the_quickstart_recipe_is_valid() -> None:
    row, recipe = quickstart()
    assert set(json.loads(row)) == {"prompt", "completion"}
    assert parse_recipe(yaml.safe_load(recipe)).data.source == "tickets.jsonl"


@pytest.mark.slow
def test_the_quickstart_is_planned_on_the_embedded_model(tmp_path: Path) -> None:
    row, recipe = quickstart()
    values = json.loads(row)
    rows = [{**values, "prompt": f"{number}. {values['prompt']}"} for number in range(200)]
    lines = [json.dumps(one) for one in rows]
    (tmp_path / "tickets.jsonl").write_text("\n".join(lines))
    (tmp_path / "tickets.yaml").write_text(recipe)
    ended = lora(tmp_path, "plan", "tickets.yaml")
    assert ended.returncode == 0, ended.stderr
    assert "fast path (packed) matches the model's own forward" in " ".join(ended.stdout.split())
