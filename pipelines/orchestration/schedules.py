"""The schedules of a deployment: what a command names is set, and everything else stays.

A schedule is identified by its slug. A paused one stays paused.
"""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import (
    SCHEDULE_TYPES,
    CronSchedule,
    IntervalSchedule,
    RRuleSchedule,
)

from pipelines.errors import PipelineError
from pipelines.orchestration.deploy_options import RequestedSchedule


def schedule_of(requested: RequestedSchedule) -> SCHEDULE_TYPES:
    """Return Prefect's schedule.

    Raises:
        PipelineError: the cron string is malformed.
    """
    if requested.interval_seconds is not None:
        return IntervalSchedule(interval=timedelta(seconds=requested.interval_seconds))
    try:
        return CronSchedule(cron=requested.cron or "", timezone=requested.timezone)
    except ValueError as error:
        raise PipelineError(
            f"cron {requested.cron!r} is malformed; give five fields, such as '0 2 * * *' for "
            "2 o'clock every night"
        ) from error


def apply_schedules(
    client: SyncPrefectClient,
    deployment: UUID,
    requested: Sequence[RequestedSchedule],
    *,
    removes_others: bool,
) -> list[str]:
    """Set the requested schedules; return a line for each schedule, with what was done.

    Args:
        client: of the Prefect server.
        deployment: id of the deployment.
        requested: schedules to add, or to replace one with the same slug.
        removes_others: remove the schedules that are not requested.
    """
    existing = client.read_deployment_schedules(deployment)
    lines = []
    named = []
    for one in requested:
        current = _current(existing, one)
        if current is None:
            lines.append(_create(client, deployment, one))
        else:
            named.append(current.id)
            lines.append(_update(client, deployment, current, one))
    for other in existing:
        if other.id in named:
            continue
        if removes_others:
            client.delete_deployment_schedule(deployment, other.id)
        action = "removed" if removes_others else "kept"
        lines.append(_line(action, other.slug, _described(other)))
    return lines


def _current(
    existing: Sequence[DeploymentSchedule], requested: RequestedSchedule
) -> DeploymentSchedule | None:
    """Return the schedule with the slug, or the same schedule without a slug."""
    for one in existing:
        if one.slug == requested.slug:
            return one
    for one in existing:
        if one.slug is None and _is_same_time(one.schedule, schedule_of(requested)):
            return one
    return None


def _create(client: SyncPrefectClient, deployment: UUID, requested: RequestedSchedule) -> str:
    new = DeploymentScheduleCreate(
        schedule=schedule_of(requested),
        active=True,
        slug=requested.slug,
        parameters=requested.parameters,
    )
    [created] = client.create_deployment_schedules(deployment, [new])
    return _line("added", requested.slug, _described(created))


def _update(
    client: SyncPrefectClient,
    deployment: UUID,
    current: DeploymentSchedule,
    requested: RequestedSchedule,
) -> str:
    """Change a schedule; an interval that stays the same keeps its anchor."""
    schedule = schedule_of(requested)
    if _is_same_time(current.schedule, schedule):
        schedule = current.schedule
    new = current.model_copy(update={"schedule": schedule, "parameters": requested.parameters})
    before = _described(current)
    after = _described(new)
    if before == after and current.slug == requested.slug:
        return _line("kept", requested.slug, after)
    client.update_deployment_schedule(
        deployment,
        current.id,
        schedule=schedule,
        parameters=requested.parameters,
        slug=requested.slug,
    )
    return _line("changed", requested.slug, f"{after} (before: {before})")


def _is_same_time(one: SCHEDULE_TYPES, other: SCHEDULE_TYPES) -> bool:
    if isinstance(one, CronSchedule) and isinstance(other, CronSchedule):
        return (one.cron, one.timezone or "UTC") == (other.cron, other.timezone or "UTC")
    if isinstance(one, IntervalSchedule) and isinstance(other, IntervalSchedule):
        return one.interval == other.interval
    return False


def _described(schedule: DeploymentSchedule) -> str:
    time = schedule.schedule
    text = str(time)
    if isinstance(time, CronSchedule):
        text = f"'{time.cron}' in {time.timezone or 'UTC'}"
    elif isinstance(time, IntervalSchedule):
        text = f"every {time.interval.total_seconds():.0f} s"
    elif isinstance(time, RRuleSchedule):
        text = time.rrule
    parameters = [f"{name} {value}" for name, value in schedule.parameters.items()]
    state = [] if schedule.active else ["paused"]
    return ", ".join([text, *parameters, *state])


def _line(action: str, slug: str | None, text: str) -> str:
    return f"schedule {slug or 'without a name'}: {action}, {text}"
