"""What preparing data depends on, of a base or of its tokenizer alone. Imports no torch."""

from typing import Protocol


class TokenizerFacts(Protocol):
    """What preparing data depends on; the result of a base's stage has it too."""

    @property
    def folder(self) -> str:
        """Folder of the tokenizer."""

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of the vocabulary."""

    @property
    def template_sha256(self) -> str:
        """Digest of the chat template."""

    @property
    def context_tokens(self) -> int | None:
        """Longest context; None if it has no limit."""
