"""Deploy a recipe with Prefect: a worker on the GPU host runs it on a schedule or on an event.

Deploying again changes what the command names. Prefect's own `deploy` would resume a paused
deployment and remove its other triggers, so this calls the API of the server directly.
"""

from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.utilities.callables import parameter_schema

from pipelines.config.recipe import load_recipe
from pipelines.errors import PipelineError, one_line, without_credentials
from pipelines.orchestration.deploy_options import Requested
from pipelines.orchestration.event_triggers import apply_events
from pipelines.orchestration.events import store_address
from pipelines.orchestration.run_form import DEFAULTS, form
from pipelines.orchestration.schedules import apply_schedules, schedule_of
from pipelines.orchestration.worker_environment import (
    WorkerEnvironment,
    can_be_shown,
    worker_environment,
)
from pipelines.runtime.launcher import REPOSITORY

ENTRYPOINT = "pipelines/workflow/flows.py:finetune"
MAX_REASON = 300
POOL = "lora"
"""The work pool of a new deployment."""


def deploy_recipe(recipe: str, requested: Requested) -> str:
    """Create or update the deployment `finetune/<recipe name>`; return what was done, as text.

    Args:
        recipe: a file or the name of one in pipelines/recipes; the worker needs it under the same
            path.
        requested: schedules and events that start a run, and the work pool.

    Raises:
        PipelineError: the cron string is malformed, or the server does not answer or refuses.
    """
    name = load_recipe(recipe).name
    for schedule in requested.schedules:
        schedule_of(schedule)  # reject a malformed one before anything is changed
    path = str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe
    try:
        return _deploy(name, path, requested)
    except httpx.HTTPStatusError as error:
        text = without_credentials(error.response.text)[:MAX_REASON]
        raise PipelineError(
            f"the Prefect server refuses the deployment ({error.response.status_code}: {text}); "
            "check PREFECT_API_URL and PREFECT_API_AUTH_STRING"
        ) from error
    except httpx.HTTPError as error:
        reason = one_line(error, with_type=False)
        raise PipelineError(
            f"the Prefect server does not answer ({reason}); check PREFECT_API_URL"
        ) from error


def _deploy(name: str, recipe: str, requested: Requested) -> str:
    environment = worker_environment()
    with get_client(sync_client=True) as client:
        existing = _existing(client, name)
        pool = requested.pool or _pool_of(existing) or POOL
        _ensure_pool(client, pool)
        deployment = _apply(client, name, _settings(recipe, pool, environment, existing), existing)
        lines = apply_schedules(
            client,
            deployment,
            requested.schedules,
            removes_others=requested.removes_schedules,
        )
        lines += apply_events(
            client,
            deployment,
            requested.events,
            recipe=name,
            removes_others=requested.removes_events,
        )
    if not lines:
        lines.append("nothing starts it: no schedule, no event")
    if requested.notify is not None:
        store_address(name, requested.notify)
        lines.append("messages are sent to the webhook" if requested.notify else "no messages")
    if existing is not None and existing.paused:
        lines.append("the deployment stays paused; resume it on its page")
    done = "deployed" if existing is None else "redeployed"
    text = "\n".join(
        [
            f"{done} finetune/{name} to the work pool {pool}",
            *_indented(lines),
            "its runs get",
            *_indented(_environment_lines(environment, existing)),
            *_secret_lines(environment),
            *_next_steps(name, pool),
        ]
    )
    return without_credentials(text)


def _next_steps(name: str, pool: str) -> list[str]:
    return [
        f"on the host that trains:  prefect worker start --pool {pool}",
        f"with PREFECT_API_URL={PREFECT_API_URL.value()}",
        f"to run it now:            prefect deployment run finetune/{name}",
    ]


def _existing(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(f"finetune/{name}")
    except ObjectNotFound:
        return None


def _pool_of(existing: DeploymentResponse | None) -> str:
    return "" if existing is None else existing.work_pool_name or ""


def _settings(
    recipe: str, pool: str, environment: WorkerEnvironment, existing: DeploymentResponse | None
) -> DeploymentUpdate:
    """Return what deploying sets; schedules and the paused state are left out."""
    remote: Any = flow.from_source(source=str(REPOSITORY), entrypoint=ENTRYPOINT)
    job_variables: dict[str, Any] = {}
    parameters: dict[str, Any] = dict(DEFAULTS)
    if existing is not None:
        job_variables = dict(existing.job_variables or {})
        parameters |= existing.parameters
    variables = {**job_variables.get("env", {}), **environment.variables}
    return DeploymentUpdate(
        version=remote.version,
        description=remote.description,
        parameters={**parameters, "recipe": recipe},
        concurrency_limit=None,  # see recipe_slot
        concurrency_options=None,
        work_pool_name=pool,
        job_variables={**job_variables, "env": variables},
        entrypoint=ENTRYPOINT,
        enforce_parameter_schema=True,
        parameter_openapi_schema=form(parameter_schema(remote), recipe),
        pull_steps=[
            {"prefect.deployments.steps.set_working_directory": {"directory": str(REPOSITORY)}}
        ],
    )


def _apply(
    client: SyncPrefectClient,
    name: str,
    settings: DeploymentUpdate,
    existing: DeploymentResponse | None,
) -> UUID:
    """Create or update the deployment; return its id."""
    if existing is not None:
        client.update_deployment(existing.id, settings)
        return existing.id
    return client.create_deployment(
        flow_id=client.create_flow_from_name("finetune"),
        name=name,
        version=settings.version,
        description=settings.description,
        parameters=settings.parameters,
        work_pool_name=settings.work_pool_name,
        job_variables=settings.job_variables,
        entrypoint=settings.entrypoint,
        enforce_parameter_schema=settings.enforce_parameter_schema,
        parameter_openapi_schema=settings.parameter_openapi_schema,
        pull_steps=settings.pull_steps,
    )


def _environment_lines(
    environment: WorkerEnvironment, existing: DeploymentResponse | None
) -> list[str]:
    """Return the variables of the worker; those of an earlier deployment stay.

    The value of a variable that this command does not set may be a secret, so it is not shown.
    """
    lines = [f"{name}={value}" for name, value in environment.variables.items()]
    if existing is None:
        return lines
    for name, value in (existing.job_variables or {}).get("env", {}).items():
        if name in environment.variables:
            continue
        shown = f"{name}={value}" if can_be_shown(name) else name
        lines.append(f"{shown} (kept, not set here)")
    return lines


def _secret_lines(environment: WorkerEnvironment) -> list[str]:
    if not environment.secrets:
        return []
    return [
        f"not stored, because they contain secrets: {', '.join(environment.secrets)}; the worker "
        "needs them in its own environment"
    ]


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _ensure_pool(client: SyncPrefectClient, pool: str) -> None:
    try:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    except ObjectAlreadyExists:
        return
