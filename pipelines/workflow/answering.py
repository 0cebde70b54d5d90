"""A base with one adapter that answers prompts as training formatted them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_core import load_adapter
from lora_core.adapter.json_files import read_identity
from pipelines.data.conversation import Message
from pipelines.errors import PipelineError
from pipelines.evaluation.generation import generate
from pipelines.models.checked import CheckedReader
from pipelines.models.hardware import detect
from pipelines.models.loading import load_model
from pipelines.models.renames import weight_renames
from pipelines.runtime import launcher
from pipelines.workflow.serving.prompts import chat_tokens, text_tokens
from pipelines.workflow.stages import base_stage
from pipelines.workflow.trained_prompts import TrainedPrompts, trained_prompts

Prompt = str | Sequence[Message]
"""A user's turn, or a conversation up to where the answer begins."""


@dataclass(frozen=True)
class AnsweringModel:
    """A base with an adapter, in memory."""

    reader: CheckedReader
    trained: TrainedPrompts

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Return the greedy answer to each prompt.

        Args:
            prompts: formatted with the base's chat template, if it has one.
            max_new_tokens: maximum length of an answer.

        Raises:
            PipelineError: there are messages, and the base has no chat template.
        """
        tokens = [self._tokens(prompt) for prompt in prompts]
        generated = generate(
            self.reader,
            self.trained.tokenizer,
            tokens,
            max_new_tokens,
            end_tokens=self.trained.end_tokens,
        )
        return [answer.text.strip() for answer in generated]

    def _tokens(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt as in training."""
        tokenizer = self.trained.tokenizer
        if isinstance(prompt, str):
            if not tokenizer.chat_template:
                return text_tokens(tokenizer, prompt)
            prompt = [Message("user", prompt)]
        if not tokenizer.chat_template:
            raise PipelineError(
                "the base has no chat template, so that it cannot read messages; give the prompt "
                "as a text"
            )
        return chat_tokens(tokenizer, prompt)


def load_answering_model(
    folder: Path, *, base: str | None, runs: Path, trust_remote_code: bool = False
) -> AnsweringModel:
    """Load an adapter over the base that its sidecar names.

    Args:
        folder: of the adapter.
        base: replaces the base that the sidecar names; its weights must be those that the adapter
            was trained on.
        runs: folder of all runs.
        trust_remote_code: run the Python code that comes with the base.

    Raises:
        BaseMismatchError: the base is not the one that the adapter was trained on.
        PipelineError: the adapter names no base, and none is given; or the chat template is not
            the one of the training.
    """
    identity = read_identity(folder) or {}
    name = base or identity.get("base", "")
    revision = identity.get("revision")
    prepared = _prepare_base(name, revision, runs, trust_remote_code=trust_remote_code)
    lineage = identity.get("lineage", {})
    quantization = str(lineage.get("quantization", "none"))
    model = load_model(prepared, quantization, detect(), trust_remote_code=trust_remote_code)
    load_adapter(model, folder, renames=weight_renames(model))
    trained = trained_prompts(folder, prepared, trust_remote_code=trust_remote_code)
    return AnsweringModel(CheckedReader(model), trained)


def _prepare_base(base: str, revision: str | None, runs: Path, *, trust_remote_code: bool) -> Path:
    if not base:
        raise PipelineError(
            "the adapter does not name the base that it was trained on; name it with --base"
        )
    stage = base_stage(base, revision, runs, trust_remote_code=trust_remote_code)
    return Path(launcher.ensure_result(stage, threads=1).folder)
