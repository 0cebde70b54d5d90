"""What happened to a recipe, for a team: Prefect events, and messages to a chat.

Events have the resource `lora.recipe.NAME`. The address for messages is a secret: it is read from
the environment of the run, or else from a Secret block of Prefect, which its server stores
encrypted.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prefect.blocks.system import Secret
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import emit_event
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL
from pydantic import SecretStr

from pipelines.config.alias_names import CHAMPION, PROPOSED
from pipelines.config.recipe import load_recipe
from pipelines.console import print_status
from pipelines.errors import RecipeError, one_line, without_credentials
from pipelines.orchestration.cancellation import interrupted_by_user
from pipelines.orchestration.deploy_options import NOTIFY
from pipelines.runtime.stage import digest

if TYPE_CHECKING:
    from pipelines.comparison.document import Registered, Summary

CHAMPION_CHANGED = "lora.champion.changed"
VERSION_PROPOSED = "lora.version.proposed"
NOTHING_PASSED = "lora.nothing.passed"
RUN_FAILED = "lora.run.failed"
SECRET: Any = Secret[str]
"""Its methods also take `_sync`, which Prefect's types do not show."""
SECONDS = 10
MAX_TEXT = 1000
DIGITS = 8
"""Of the digest that tells apart recipes whose names differ in other characters only."""


def announce_result(summary: "Summary", registered: "Registered") -> None:
    """Emit what a completed run decided: nothing if the champion stays the same.

    Args:
        summary: the comparison.
        registered: the versions, and the aliases that were moved.
    """
    model = registered.model
    payload = {"model": model, "decision": summary.decision, "mlflow_run": registered.parent_run}
    moved = registered.aliases
    if CHAMPION in moved:
        text = f"version {moved[CHAMPION]} of {model} is the new champion"
        payload["version"] = str(moved[CHAMPION])
        announce(CHAMPION_CHANGED, summary.name, f"{text}: {summary.decision}", payload)
    elif PROPOSED in moved:
        text = f"version {moved[PROPOSED]} of {model} waits for a decision"
        payload["version"] = str(moved[PROPOSED])
        announce(VERSION_PROPOSED, summary.name, f"{text}: {summary.decision}", payload)
    elif summary.champion is None:
        announce(NOTHING_PASSED, summary.name, summary.decision, payload)


def announce_failure(flow: Any, flow_run: FlowRun, state: State) -> None:
    """Emit that a run failed or crashed, as a hook of its flow; not if its user ended it."""
    if interrupted_by_user():
        return
    reason = without_credentials(state.message or state.name or "")[:MAX_TEXT]
    payload = {"state": state.name or "", "reason": reason}
    name = _recipe_name(str(flow_run.parameters.get("recipe", "")))
    announce(RUN_FAILED, name, f"the run {flow_run.name!r} failed: {reason}", payload)


def announce(event: str, recipe: str, text: str, payload: dict[str, str]) -> None:
    """Emit an event, and send its text to the address for messages, if there is one.

    Args:
        event: name of the event.
        recipe: name of the recipe.
        text: what happened, in a sentence.
        payload: of the event.
    """
    resource = {"prefect.resource.id": f"lora.recipe.{recipe}", "prefect.resource.name": recipe}
    emit_event(event, resource=resource, payload=payload)
    url = os.environ.get(NOTIFY) or _stored_address(recipe)
    if url:
        notify(url, f"{recipe}: {text}")


def store_address(recipe: str, url: str) -> None:
    """Store the address for the messages of a recipe's runs; an empty one removes it."""
    SECRET(value=SecretStr(url)).save(_block_name(recipe), overwrite=True, _sync=True)


def _stored_address(recipe: str) -> str:
    """Return the stored address; empty if no server has one."""
    if PREFECT_API_URL.value() is None:
        return ""
    try:
        return str(SECRET.load(_block_name(recipe), _sync=True).get())
    except ValueError:  # there is no such block
        return ""
    except (httpx.HTTPError, PrefectException) as error:
        reason = one_line(error, with_type=False)
        print_status(f"no message is sent: the Prefect server does not answer ({reason})", mark="…")
        return ""


def _block_name(recipe: str) -> str:
    """Return the name of a recipe's block: Prefect allows lowercase letters, digits and dashes."""
    words = re.findall("[a-z0-9]+", recipe.lower())
    return "-".join(["lora-notify", *words, digest(recipe)[:DIGITS]])


def notify(url: str, text: str) -> None:
    """Post a message; a failure is printed without the address, and does not fail the run."""
    try:
        reply = httpx.post(url, json={"text": text}, timeout=SECONDS)
        problem = "" if reply.is_success else f"status {reply.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = type(error).__name__
    if problem:
        print_status(f"no message was sent to the address for messages ({problem})", mark="…")


def _recipe_name(recipe: str) -> str:
    """Return the name of a recipe; that of its file if the recipe is not valid."""
    try:
        return load_recipe(recipe).name
    except RecipeError:
        return Path(recipe).stem
