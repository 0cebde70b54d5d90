"""Roles for a pair of names on an MLflow server with accounts.

    object                      trainer   promoter   reader
    model NAME-candidates       MANAGE    MANAGE     none
    experiment of the recipe    MANAGE    READ       none
    model NAME                  READ      MANAGE     READ
    experiment NAME-releases    READ      MANAGE     READ

Trainers read NAME, because new adapters are compared with its champion. MANAGE is what MLflow
requires to remove an alias or a tag of a version; it includes granting others a permission for the
same object. What a server grants to everybody by default is checked, because it adds to every role.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient

from pipelines.config.registry_names import (
    CANDIDATES_SUFFIX,
    ROLE_NAMES,
    RoleName,
    champion_model,
    is_candidates,
    releases_experiment,
)
from pipelines.errors import PipelineError, RegistryError
from pipelines.paths import tracking_uri
from pipelines.runtime.interfaces.values import Values
from pipelines.tracking.accounts import LEVELS, Accounts, Level, ServerRole
from pipelines.tracking.connection import Access, connect
from pipelines.tracking.model_versions import ensure_model
from pipelines.tracking.runs import experiment_id

Permissions = dict[tuple[str, str], Level]
"""Kind and name, or id, of an object → what a role may do with it."""
PASSWORD_BYTES = 18
NOTHING: Level = "NO_PERMISSIONS"


@dataclass(frozen=True)
class RoleExperiments:
    """Ids of the experiments of a pair of names."""

    training: str
    """Has the runs of the recipe."""
    releases: str
    """Has the files of promoted versions."""


@dataclass(frozen=True)
class RolePlan:
    """Who gets which role for which names."""

    candidates: str
    """Name of the registered model of a recipe, which ends in `-candidates`."""
    experiment: str
    """The experiment of that recipe."""
    users: Mapping[str, RoleName]
    """User → role."""
    removed: Sequence[str] = ()
    """Users that lose their role."""

    def __post_init__(self) -> None:
        """Refuse names that do not separate the roles."""
        if not is_candidates(self.candidates):
            raise PipelineError(
                f"registry.model is {self.candidates!r}, and MLflow lets everybody who registers "
                "there promote, too; use a name that ends in "
                f"{CANDIDATES_SUFFIX!r}, such as {self.candidates + CANDIDATES_SUFFIX!r}"
            )
        if self.experiment == releases_experiment(self.candidates):
            raise PipelineError(
                f"the experiment of the recipe is {self.experiment!r}, which has the files of "
                "promoted versions; give the recipe another registry.experiment"
            )
        both = sorted(set(self.users) & set(self.removed))
        if both:
            raise PipelineError(f"{both[0]!r} gets a role and loses it; name each user once")


class PreparedRoles(Values):
    """What was set up."""

    model: str
    candidates: str
    experiment: str
    releases: str
    users: dict[str, RoleName]
    """The users that were named."""
    removed: tuple[str, ...]
    changes: tuple[str, ...]
    """What was created or changed, in words; empty if nothing had to be."""
    passwords_file: str
    """File with the passwords of new users; empty if all of them existed."""


@dataclass
class _Setup:
    """Applies a plan."""

    plan: RolePlan
    client: MlflowClient
    accounts: Accounts
    runs: Path
    changes: list[str] = field(default_factory=list)
    passwords: dict[str, str] = field(default_factory=dict)

    def create_objects(self) -> RoleExperiments:
        """Create both models and both experiments; return the experiments."""
        name = champion_model(self.plan.candidates)
        ensure_model(self.client, self.plan.candidates, f"Candidates of {name}")
        ensure_model(self.client, name, f"LoRA adapters, promoted from {self.plan.candidates}")
        training = experiment_id(self.client, self.plan.experiment, self.runs)
        releases = experiment_id(self.client, releases_experiment(name), self.runs)
        return RoleExperiments(training, releases)

    def apply(self, role: RoleName, wanted: Permissions) -> None:
        """Create a role, give it exactly these permissions, and assign it."""
        name = _role_name(self.plan, role)
        found = self.accounts.roles().get(name)
        if found is None:
            found = self.accounts.create_role(name, f"{role} of {self.plan.candidates}")
            self.changes.append(f"created the role {name}")
        self._set_permissions(found, wanted)
        for user, one in self.plan.users.items():
            if one == role:
                self._assign(user, found)
        for user in self.plan.removed:
            if name in self.accounts.roles_of(user):
                self.accounts.unassign(user, found)
                self.changes.append(f"took the role {name} from {user}")

    def _set_permissions(self, role: ServerRole, wanted: Permissions) -> None:
        missing = dict(wanted)
        for permission in self.accounts.permissions(role):
            key = (permission.resource_type, permission.resource_pattern)
            level = missing.pop(key, None)
            if level is None:
                self.accounts.remove_permission(permission)
                self.changes.append(f"{role.name}: removed {permission.permission} on {key[1]}")
            elif level != permission.permission:
                self.accounts.change_permission(permission, level)
                self.changes.append(f"{role.name}: changed {key[1]} to {level}")
        for (kind, thing), level in missing.items():
            self.accounts.add_permission(role, kind, thing, level)
            self.changes.append(f"{role.name}: added {level} on the {kind} {thing}")

    def _assign(self, user: str, role: ServerRole) -> None:
        if role.name not in self.accounts.roles_of(user):
            self.accounts.assign(user, role)
            self.changes.append(f"gave {user} the role {role.name}")

    def create_users(self) -> None:
        """Create the users that do not exist, each with a random password."""
        for user in self.plan.users:
            found = self.accounts.user(user)
            if found is None:
                self.passwords[user] = secrets.token_urlsafe(PASSWORD_BYTES)
            elif found.is_admin:
                raise RegistryError(
                    f"{user!r} is an administrator of the server, who may do everything; name "
                    "another user"
                )

    def check_single_roles(self) -> None:
        """Refuse a user that has another role for the same names."""
        for user, role in self.plan.users.items():
            if user in self.passwords:
                continue
            held = self.accounts.roles_of(user)
            for other in ROLE_NAMES:
                if other != role and _role_name(self.plan, other) in held:
                    raise RegistryError(
                        f"{user!r} is {other} of {self.plan.candidates}, and a {role} must be "
                        f"somebody else, or nothing is reviewed; add --remove {user} first"
                    )


def set_up_roles(plan: RolePlan, passwords_file: Path | None, runs: Path) -> PreparedRoles:
    """Create models, experiments, roles and users, and verify what each user may do.

    It can be repeated; it changes what differs from the plan. Roles of users that are not named
    remain.

    Args:
        plan: names and users.
        passwords_file: gets the passwords of new users; must not exist.
        runs: folder of all runs.

    Raises:
        RegistryError: there is no server with accounts, the user is no administrator, a new user
            needs a password file, or a user may do more than the role grants.
    """
    uri = _server(runs)
    access = Access("MANAGE", plan.candidates, plan.experiment)
    with connect(runs, access) as client:
        setup = _Setup(plan, client, Accounts(uri), runs)
        setup.create_users()
        setup.check_single_roles()
        _write_new_users(setup, passwords_file)
        experiments = setup.create_objects()
        for role in ROLE_NAMES:
            setup.apply(role, _permissions(plan, role, experiments))
        _check_effective(setup, experiments)
    name = champion_model(plan.candidates)
    return PreparedRoles(
        model=name,
        candidates=plan.candidates,
        experiment=plan.experiment,
        releases=releases_experiment(name),
        users=dict(plan.users),
        removed=tuple(plan.removed),
        changes=tuple(setup.changes),
        passwords_file=str(passwords_file) if setup.passwords else "",
    )


def _server(runs: Path) -> str:
    """Return the address of the server; raise RegistryError if the registry is a file."""
    uri = tracking_uri(runs)
    if not uri.startswith(("http://", "https://")):
        raise RegistryError(
            f"the registry is {uri}, a file without accounts; set MLFLOW_TRACKING_URI to a server "
            "that was started with --app-name basic-auth"
        )
    return uri


def _role_name(plan: RolePlan, role: RoleName) -> str:
    return f"{champion_model(plan.candidates)}:{role}"


def _permissions(plan: RolePlan, role: RoleName, experiments: RoleExperiments) -> Permissions:
    """Return what a role may do."""
    levels: dict[RoleName, tuple[Level, Level, Level, Level]] = {
        "trainer": ("MANAGE", "MANAGE", "READ", "READ"),
        "promoter": ("MANAGE", "READ", "MANAGE", "MANAGE"),
        "reader": (NOTHING, NOTHING, "READ", "READ"),
    }
    things = (
        ("registered_model", plan.candidates),
        ("experiment", experiments.training),
        ("registered_model", champion_model(plan.candidates)),
        ("experiment", experiments.releases),
    )
    granted = {}
    for thing, level in zip(things, levels[role], strict=True):
        if level != NOTHING:
            granted[thing] = level
    return granted


def _write_new_users(setup: _Setup, file: Path | None) -> None:
    """Write the passwords of new users into a file that only this user can read; create them."""
    if not setup.passwords:
        return
    names = ", ".join(setup.passwords)
    if file is None:
        raise RegistryError(
            f"the server has no user {names}; name a new file with --passwords, which gets their "
            "passwords, or let an administrator create them"
        )
    try:
        file.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        raise RegistryError(f"{file} exists; name a new file with --passwords") from None
    lines = [f"{user}:{password}\n" for user, password in setup.passwords.items()]
    file.write_text("".join(lines), encoding="utf-8")
    for user, password in setup.passwords.items():
        setup.accounts.create_user(user, password)
        setup.changes.append(f"created the user {user}")


def _check_effective(setup: _Setup, experiments: RoleExperiments) -> None:
    """Raise RegistryError if a user may write where the role does not.

    Permissions add up: what the server grants to everybody, and what a user was granted alone.
    """
    everything = _permissions(setup.plan, "promoter", experiments)
    for user, role in setup.plan.users.items():
        granted = _permissions(setup.plan, role, experiments)
        for kind, thing in everything:
            most = granted.get((kind, thing), "READ")  # a server may let everybody read
            found = setup.accounts.permission_of(user, kind, thing)
            if LEVELS.index(found) > LEVELS.index(most):
                raise RegistryError(
                    f"{user!r} has the permission {found} on the {kind} {thing}, and a {role} must "
                    f"have at most {most}; revoke it, or set default_permission of the server's "
                    "accounts to NO_PERMISSIONS or READ"
                )
