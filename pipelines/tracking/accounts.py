"""The accounts of an MLflow server: users, roles and their permissions.

Only what account_roles.py needs. MLflow's own client of this interface is part of its server, which
needs further packages and seconds to import.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response
from pydantic import ConfigDict

from pipelines.runtime.interfaces.values import Values

Level = Literal["DENY", "NO_PERMISSIONS", "READ", "USE", "EDIT", "MANAGE"]
LEVELS: tuple[Level, ...] = ("DENY", "NO_PERMISSIONS", "READ", "USE", "EDIT", "MANAGE")
"""From the lowest to the highest."""
WORKSPACE = "default"
"""Where a server without workspaces keeps its roles."""
USERS = "/api/2.0/mlflow/users"
USER_DETAILS = "/api/3.0/mlflow/users"
ROLES = "/api/3.0/mlflow/roles"


class ServerUser(Values):
    """An account."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    username: str
    is_admin: bool


class ServerRole(Values):
    """A named set of permissions."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: int
    name: str


class ServerPermission(Values):
    """What a role may do with one object."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: int
    resource_type: str
    resource_pattern: str
    permission: Level


@dataclass(frozen=True)
class Accounts:
    """The accounts of the server at an address, as an administrator sees them."""

    uri: str

    def user(self, name: str) -> ServerUser | None:
        """Return a user; None if there is none of this name."""
        try:
            found = self._get(f"{USERS}/get", username=name)
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return None
            raise
        return ServerUser.model_validate(found["user"])

    def create_user(self, name: str, password: str) -> None:
        """Create a user without any permission."""
        self._send("POST", f"{USERS}/create", username=name, password=password)

    def permission_of(self, user: str, kind: str, thing: str) -> Level:
        """Return what a user may do with an object, through all roles and defaults."""
        found = self._get(
            f"{USER_DETAILS}/permissions/get",
            username=user,
            resource_type=kind,
            resource_id=thing,
        )
        level: Level = found["permission"]
        return level

    def roles(self) -> dict[str, ServerRole]:
        """Return every role by its name."""
        found = self._get(f"{ROLES}/list", workspace=WORKSPACE)
        parsed = [ServerRole.model_validate(one) for one in found["roles"]]
        return {role.name: role for role in parsed}

    def roles_of(self, user: str) -> set[str]:
        """Return the names of a user's roles."""
        found = self._get(f"{USER_DETAILS}/roles/list", username=user)
        return {ServerRole.model_validate(one).name for one in found["roles"]}

    def create_role(self, name: str, description: str) -> ServerRole:
        """Create a role without any permission."""
        found = self._send(
            "POST", f"{ROLES}/create", workspace=WORKSPACE, name=name, description=description
        )
        return ServerRole.model_validate(found["role"])

    def permissions(self, role: ServerRole) -> list[ServerPermission]:
        """Return the permissions of a role."""
        found = self._get(f"{ROLES}/permissions/list", role_id=role.id)
        return [ServerPermission.model_validate(one) for one in found["role_permissions"]]

    def add_permission(self, role: ServerRole, kind: str, thing: str, level: Level) -> None:
        """Give a role a permission that it does not have."""
        self._send(
            "POST",
            f"{ROLES}/permissions/add",
            role_id=role.id,
            resource_type=kind,
            resource_pattern=thing,
            permission=level,
        )

    def change_permission(self, permission: ServerPermission, level: Level) -> None:
        """Change the level of a permission."""
        path = f"{ROLES}/permissions/update"
        self._send("PATCH", path, role_permission_id=permission.id, permission=level)

    def remove_permission(self, permission: ServerPermission) -> None:
        """Take a permission from its role."""
        self._send("DELETE", f"{ROLES}/permissions/remove", role_permission_id=permission.id)

    def assign(self, user: str, role: ServerRole) -> None:
        """Give a user a role that the user does not have."""
        self._send("POST", f"{ROLES}/assign", username=user, role_id=role.id)

    def unassign(self, user: str, role: ServerRole) -> None:
        """Take a role from a user."""
        self._send("DELETE", f"{ROLES}/unassign", username=user, role_id=role.id)

    def _get(self, path: str, **parameters: str | int) -> Any:
        return self._request("GET", path, params=parameters)

    def _send(self, method: str, path: str, **values: str | int) -> Any:
        return self._request(method, path, json=values)

    def _request(self, method: str, path: str, **content: Any) -> Any:
        credentials = get_default_host_creds(self.uri)  # type: ignore[no-untyped-call]
        answer = http_request(credentials, path, method, **content)  # type: ignore[no-untyped-call]
        answer = verify_rest_response(answer, path)
        return answer.json() if answer.content else {}
