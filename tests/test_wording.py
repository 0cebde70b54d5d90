"""Comments, docstrings, messages and documentation use standard terms; class names are unique."""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "lora_core").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "lora_core/*.md", "pipelines/**/*.md", "infra/*.md", "tests/*.md")
    for path in ROOT.glob(pattern)
)
INSTEAD = {
    r"anew": "again",
    r"ask(s|ed|ing)?": "evaluate, request, require",
    r"beside": "next to, with",
    r"besides": "in addition",
    r"begun": "started",
    r"(goes|go|going|went) on": "continues, resumes",
    r"lies|lay|stands?|stood": "is, is in",
    r"mend(s|ed)?": "fix",
    r"sa(y|ys|id)": "report, state, print",
    r"tells? whether": "returns whether",
    r"of (one's|its|their|his) own": "custom, separate",
    r"(is|are|was) no (?!longer|more|such|\w+er\b)\w+": "is not a",
    r"learnt": "learned",
    r"(de)?(quantis|normalis|initialis|optimis|tokenis|summaris|serialis|recognis)\w+": "-ize",
    r"behaviour|colour\w*": "behavior, color",
}
"""Wording to avoid, as a regular expression → what to write instead."""
AVOIDED = re.compile(rf"\b({'|'.join(INSTEAD)})\b", re.IGNORECASE)
PER_THOUSAND_WORDS = 1.0


def prose_of(source: str) -> str:
    """Return the comments and the strings with a space of a Python file."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = (tokenize.COMMENT, tokenize.STRING)
    return "\n".join(
        token.string for token in tokens if token.type in kinds and " " in token.string
    )


def hits_in(text: str) -> list[str]:
    return [match.group(0).lower() for match in AVOIDED.finditer(text)]


def words_in(text: str) -> int:
    return len(re.findall(r"[A-Za-z']+", text))


def test_sources_use_standard_terms() -> None:
    prose = {path: prose_of(path.read_text(encoding="utf-8")) for path in SOURCES}
    hits = {path: hits_in(text) for path, text in prose.items()}
    number = sum(len(found) for found in hits.values())
    total = sum(words_in(text) for text in prose.values())
    worst = sorted(hits, key=lambda path: -len(hits[path]))[:5]
    found = {str(path.relative_to(ROOT)): hits[path] for path in worst}
    assert 1000 * number / total <= PER_THOUSAND_WORDS, found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_standard_terms(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(hits_in(text)) <= max(1, words_in(text) // 1000), hits_in(text)


def test_wording_to_avoid_is_found() -> None:
    text = "It asks whether the file lies beside it, and says that this is no YAML."
    assert hits_in(text) == ["asks", "lies", "beside", "says", "is no yaml"]
    assert hits_in("The task is in the lane; a mask is no longer used.") == []


def test_class_names_are_unique() -> None:
    names: Counter[str] = Counter()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, times in names.items() if times > 1] == []
