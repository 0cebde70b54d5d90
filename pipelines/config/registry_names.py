"""The two names of a registered model whose champion a person decides about.

Trainers register into `NAME-candidates`, and a promoter copies a version into `NAME`, because
MLflow grants creating versions and moving aliases with the same permission. A recipe names the
first one; everything else follows from it.
"""

from typing import Any, Literal

REGISTERED = "models:/"
"""Start of the address of a registered adapter, as MLflow writes it."""
RoleName = Literal["trainer", "promoter", "reader"]
ROLE_NAMES: tuple[RoleName, ...] = ("trainer", "promoter", "reader")
CANDIDATES_SUFFIX = "-candidates"
RELEASES_SUFFIX = "-releases"


def is_candidates(name: str) -> bool:
    """Return whether a registered model contains the candidates of another one."""
    return name.endswith(CANDIDATES_SUFFIX)


def champion_model(name: str) -> str:
    """Return the registered model with the champion: `NAME` of `NAME-candidates`, else itself."""
    return name.removesuffix(CANDIDATES_SUFFIX)


def releases_experiment(name: str) -> str:
    """Return the experiment with the files of the versions that were copied into a name."""
    return champion_model(name) + RELEASES_SUFFIX


def with_promote(section: Any) -> Any:
    """Return the plain `registry` section; candidates are proposed unless it says otherwise.

    Raises:
        ValueError: candidates would be promoted by a run, or belong to no name.
    """
    if not isinstance(section, dict):
        return section
    name = section.get("model")
    if not isinstance(name, str) or not is_candidates(name):
        return section
    if not champion_model(name):
        raise ValueError(
            f"model is {name!r}, which are the candidates of an empty name; use "
            f"NAME{CANDIDATES_SUFFIX}"
        )
    if section.get("promote", "propose") == "auto":
        raise ValueError(
            f"promote is 'auto', and a run cannot promote out of {name!r}: a person copies a "
            f"version into {champion_model(name)!r}; remove promote, or use another model"
        )
    return section | {"promote": "propose"}
