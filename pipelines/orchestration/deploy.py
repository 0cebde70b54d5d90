"""Deploy a recipe with Prefect: a worker on the GPU host runs it on a schedule or on an event."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectAlreadyExists
from prefect.schedules import Cron, Interval, Schedule

from pipelines.config.recipe import load_recipe
from pipelines.errors import PipelineError
from pipelines.paths import runs_root
from pipelines.runtime.launcher import REPOSITORY

ENTRYPOINT = "pipelines/workflow/flows.py:finetune"
ONE_AT_A_TIME = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
"""A run that is due while another is in progress waits, then reuses the cached results of the
first."""


@dataclass(frozen=True)
class Triggers:
    """What starts a run; without any, a person does."""

    cron: str | None = None
    interval_seconds: int | None = None
    event: str | None = None
    """Name of a Prefect event, such as `data.arrived`."""


def deploy_recipe(recipe: str, triggers: Triggers, pool: str) -> str:
    """Create or update the deployment `finetune/<recipe name>`; return the next steps as text.

    Args:
        recipe: a file or the name of one in pipelines/recipes; the worker needs it under the same
            path.
        triggers: schedules and events that start a run.
        pool: a process work pool, created if it is missing.

    Raises:
        PipelineError: the cron string is malformed, or the server does not answer.
    """
    name = load_recipe(recipe).name
    path = str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe
    try:
        _ensure_pool(pool)
        remote: Any = flow.from_source(source=str(REPOSITORY), entrypoint=ENTRYPOINT)
        remote.deploy(
            name=name,
            work_pool_name=pool,
            parameters={"recipe": path, "ranks": []},
            schedules=_schedules(triggers),
            triggers=_event_triggers(name, triggers),
            concurrency_limit=ONE_AT_A_TIME,
            job_variables={"env": {"LORA_RUNS": str(runs_root())}},
            build=False,
            push=False,
            print_next_steps=False,
            ignore_warnings=True,
        )
    except httpx.HTTPError as error:
        raise PipelineError(
            f"the Prefect server does not answer ({error}); check PREFECT_API_URL"
        ) from error
    return (
        f"deployed finetune/{name} to the work pool {pool}\n"
        f"on the host that trains:  prefect worker start --pool {pool}\n"
        f"to run it now:            prefect deployment run finetune/{name}"
    )


def _schedules(triggers: Triggers) -> list[Schedule]:
    schedules: list[Schedule] = []
    if triggers.cron is not None:
        try:
            schedules.append(Cron(triggers.cron))
        except ValueError as error:
            raise PipelineError(
                f"cron {triggers.cron!r} is malformed; give five fields, such as '0 2 * * *' for "
                "2 o'clock every night"
            ) from error
    if triggers.interval_seconds is not None:
        schedules.append(Interval(timedelta(seconds=triggers.interval_seconds)))
    return schedules


def _event_triggers(name: str, triggers: Triggers) -> list[DeploymentEventTrigger]:
    if triggers.event is None:
        return []
    return [DeploymentEventTrigger(name=f"{name} on {triggers.event}", expect={triggers.event})]


def _ensure_pool(pool: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        except ObjectAlreadyExists:
            return
