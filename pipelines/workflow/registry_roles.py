"""The command `lora registry roles`: who trains, who promotes, who reads.

It imports MLflow itself, so that `lora --help` is fast.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.config.recipe import load_recipe
from pipelines.config.registry_names import ROLE_NAMES, RoleName
from pipelines.errors import PipelineError
from pipelines.paths import runs_root

EXAMPLE = "ann=trainer"


def roles(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe that registers in NAME-candidates.", show_default=False),
    ],
    users: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="USER=ROLE",
            help="A user with a role: trainer, promoter or reader.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="A user that loses the role; may be repeated.", show_default=False),
    ] = None,
    passwords: Annotated[
        str, typer.Option(help="New file for the passwords of new users.", show_default=False)
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Set up who trains, promotes and reads on an MLflow server with accounts.

    Needs an administrator's MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. It can be
    repeated, and keeps users that are not named.
    """
    settings = load_recipe(recipe)
    named = _roles_by_user(users or [])
    from pipelines.tracking.account_roles import RolePlan, set_up_roles
    from pipelines.workflow.print_registry import output, roles_table

    plan = RolePlan(
        candidates=settings.registry.model,
        experiment=settings.registry.experiment or settings.name,
        users=named,
        removed=tuple(remove or []),
    )
    prepared = set_up_roles(plan, Path(passwords) if passwords else None, runs_root())
    output(prepared, roles_table(prepared), as_json=json)


def _roles_by_user(words: list[str]) -> dict[str, RoleName]:
    """Return user → role.

    Raises:
        PipelineError: a word is not USER=ROLE, or names a user twice.
    """
    found: dict[str, RoleName] = {}
    for word in words:
        user, _, role = word.rpartition("=")
        known = [one for one in ROLE_NAMES if one == role]
        if not user or not known:
            raise PipelineError(
                f"{word!r} is not USER=ROLE with one of the roles trainer, promoter and reader; "
                f"write it like {EXAMPLE}"
            )
        if user in found:
            raise PipelineError(f"{user!r} is named twice; a user has one role, such as {EXAMPLE}")
        found[user] = known[0]
    return found
