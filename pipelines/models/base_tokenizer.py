"""The tokenizer of a base without its weights: all that preparing data needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.errors import BaseModelError, one_line
from pipelines.models.base_model import load_config, locate
from pipelines.models.support import check_supported, context_tokens
from pipelines.models.tokenizer import (
    load_tokenizer,
    quiet,
    template_digest,
    vocabulary_digest,
)
from pipelines.runtime.interfaces.inputs import BaseIdentity

TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken"]


@dataclass(frozen=True)
class BaseTokenizer:
    """The tokenizer of a base whose weights are not loaded; see `TokenizerFacts`."""

    folder: str
    tokenizer_sha256: str
    template_sha256: str
    context_tokens: int | None


@contextmanager
def base_tokenizer(identity: BaseIdentity) -> Iterator[BaseTokenizer]:
    """Yield the tokenizer of a base; its folder may be temporary.

    Raises:
        BaseModelError: the base is not supported, or its tokenizer cannot be loaded.
    """
    quiet()
    with TemporaryDirectory() as scratch:
        folder = _folder(identity, Path(scratch))
        is_trusted = identity.trust_remote_code
        config = load_config(folder, trust_remote_code=is_trusted)
        check_supported(config)
        try:
            tokenizer = load_tokenizer(folder, trust_remote_code=is_trusted)
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"the tokenizer of base model {identity.id!r} cannot be loaded "
                f"({one_line(error, with_type=False)}); save it next to config.json with "
                "save_pretrained"
            ) from error
        yield BaseTokenizer(
            folder=str(folder),
            tokenizer_sha256=vocabulary_digest(tokenizer),
            template_sha256=template_digest(tokenizer),
            context_tokens=context_tokens(config),
        )


def _folder(identity: BaseIdentity, scratch: Path) -> Path:
    """Return a folder with the base's config and tokenizer."""
    if identity.kind == "gguf":
        return _from_gguf(locate(identity), scratch)
    if identity.kind == "hub":
        return _download(identity.id, identity.revision or "main")
    return locate(identity)


def _from_gguf(file: Path, scratch: Path) -> Path:
    from transformers import AutoConfig, AutoTokenizer

    parent = str(file.parent)
    AutoTokenizer.from_pretrained(parent, gguf_file=file.name).save_pretrained(str(scratch))
    config = AutoConfig.from_pretrained(parent, gguf_file=file.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(str(scratch))
    return scratch


def _download(model_id: str, revision: str) -> Path:
    """Return the cached or downloaded files of a hub model, without its weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model_id, revision=revision, allow_patterns=TOKENIZER_FILES)
        return Path(found)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise BaseModelError(
            f"the tokenizer of base model {model_id!r} at {revision!r} is not in the local cache "
            f"and the hub cannot be reached{offline}; give a local folder, or fetch it once while "
            "online"
        ) from error
