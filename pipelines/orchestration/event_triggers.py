"""The events that start a deployment: automations of Prefect with the action to run it.

They are found by that action, because the server does not return who owns an automation. A run
starts some seconds after an event, and further events of the same resource within that time start
no other run. What a command does not name stays.
"""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.events import DeploymentEventTrigger
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger

from pipelines.orchestration.deploy_options import RequestedEvent

RESOURCE = "prefect.resource.id"
PAGE = 200


def apply_events(
    client: SyncPrefectClient,
    deployment: UUID,
    requested: Sequence[RequestedEvent],
    *,
    recipe: str,
    removes_others: bool,
) -> list[str]:
    """Set the requested triggers; return a line for each trigger, with what was done.

    Args:
        client: of the Prefect server.
        deployment: id of the deployment.
        requested: events that start a run.
        recipe: name of the recipe, for the names of automations.
        removes_others: remove the deployment's triggers that are not requested.
    """
    existing = _automations_of(client, deployment)
    lines = []
    named = []
    for event in requested:
        new = _automation(f"{recipe} on {event.name}", event, deployment)
        current = _current(existing, event.name)
        if current is None:
            client.create_automation(new)
            lines.append(_line("added", new))
        else:
            named.append(current.id)
            lines.append(_update(client, current, new))
    for other in existing:
        if other.id in named:
            continue
        if removes_others:
            client.delete_automation(other.id)
        lines.append(_line("removed" if removes_others else "kept", other))
    return lines


def _automations_of(client: SyncPrefectClient, deployment: UUID) -> list[Automation]:
    """Return the automations that do nothing but run the deployment."""
    found = []
    page = client.read_automations(limit=PAGE)
    offset = 0
    while page:
        for automation in page:
            if _runs_only(automation, deployment):
                found.append(automation)
        offset += PAGE
        page = client.read_automations(limit=PAGE, offset=offset)
    return found


def _runs_only(automation: Automation, deployment: UUID) -> bool:
    for action in automation.actions:
        if not isinstance(action, RunDeployment) or action.deployment_id != deployment:
            return False
    return bool(automation.actions)


def _automation(name: str, event: RequestedEvent, deployment: UUID) -> AutomationCore:
    quiet = timedelta(seconds=event.debounce_seconds)
    trigger = DeploymentEventTrigger(
        name=name,
        expect={event.name},
        for_each={RESOURCE},
        within=quiet,
        schedule_after=quiet,
        parameters=event.parameters,
    )
    trigger.set_deployment_id(deployment)
    return trigger.as_automation()


def _current(existing: Sequence[Automation], event: str) -> Automation | None:
    for automation in existing:
        if _events(automation) == {event}:
            return automation
    return None


def _update(client: SyncPrefectClient, current: Automation, new: AutomationCore) -> str:
    """Change a trigger; a disabled one stays disabled."""
    new = new.model_copy(update={"enabled": current.enabled})
    before = _described(current)
    after = _described(new)
    if before == after and current.name == new.name:
        return _line("kept", new)
    # Prefect's client omits the type of the action when it updates an automation.
    client.create_automation(new)
    client.delete_automation(current.id)
    return _line("changed", new, f" (before: {before})")


def _events(automation: AutomationCore) -> set[str]:
    trigger = automation.trigger
    return trigger.expect if isinstance(trigger, EventTrigger) else set()


def _described(automation: AutomationCore) -> str:
    parts = []
    for action in automation.actions:
        if isinstance(action, RunDeployment):
            parts.append(f"a run {action.schedule_after.total_seconds():.0f} s later")
            for name, value in (action.parameters or {}).items():
                parts.append(f"{name} {value}")
    if not automation.enabled:
        parts.append("disabled")
    return ", ".join(parts)


def _line(action: str, automation: AutomationCore, note: str = "") -> str:
    events = " or ".join(sorted(_events(automation))) or automation.name
    return f"event {events}: {action}, {_described(automation)}{note}"
