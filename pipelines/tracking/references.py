"""References to registered adapters: NAME, NAME@ALIAS or NAME/VERSION, also after `models:/`."""

import re
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)

from pipelines.config.registry_names import REGISTERED
from pipelines.errors import RegistryError
from pipelines.tracking.aliases import registered_version

DIGEST = re.compile(r"[0-9a-f]{12,64}")
ABSENT = (ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE))
"""Errors of a name that no model has; the second one if no model can have it."""


@dataclass(frozen=True)
class Reference:
    """The name of a registered model, with an alias, a version or neither."""

    name: str
    alias: str = ""
    version: str = ""

    @classmethod
    def parse(cls, text: str, *, default_alias: str = "") -> "Reference":
        """Return what a text refers to.

        Args:
            text: such as tickets@champion, tickets/3 or models:/tickets/3.
            default_alias: of a name without an alias and without a version.

        Raises:
            RegistryError: it names no version, and there is no default.
        """
        path = text.removeprefix(REGISTERED)
        name, at, alias = path.partition("@")
        slash = version = ""
        if not at:
            name, slash, version = path.partition("/")
        if not at and not slash:
            alias = default_alias
        if not name or not (alias or version.isdecimal()):
            raise RegistryError(
                f"{text!r} does not name a registered adapter; use {REGISTERED}NAME@ALIAS or "
                f"{REGISTERED}NAME/VERSION, where VERSION is a number"
            )
        return cls(name, alias, version)

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}" if self.alias else f"{self.name}/{self.version}"

    def resolve(self, client: MlflowClient) -> ModelVersion:
        """Return the version.

        Raises:
            RegistryError: there is no such model, alias or version.
        """
        if self.alias:
            version = registered_version(client, self.name, self.alias)
            if version is None:
                known = ", ".join(aliases_of(client, self.name)) or "none"
                raise RegistryError(
                    f"{self}: the registered model {self.name} has no alias {self.alias}; "
                    f"its aliases are {known}"
                )
            return version
        try:
            return client.get_model_version(self.name, self.version)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            raise RegistryError(
                f"{self} was not found; `lora registry show {self.name}` lists the versions of "
                f"{self.name}"
            ) from error


def name_alone(text: str) -> str | None:
    """Return the name if a text is one, without an alias and without a version; else None."""
    name = text.removeprefix(REGISTERED)
    return None if not name or re.search("[@/]", name) else name


def existing_model(client: MlflowClient, name: str) -> RegisteredModel:
    """Return a registered model.

    Raises:
        RegistryError: there is no such model.
    """
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        raise RegistryError(
            f"there is no registered model {name or repr(name)}; `lora registry list` lists the "
            "names"
        ) from error


def aliases_of(client: MlflowClient, name: str) -> dict[str, str]:
    """Return alias → version of a registered model.

    Raises:
        RegistryError: there is no such model.
    """
    found = existing_model(client, name).aliases
    return {alias: str(version) for alias, version in found.items()}
