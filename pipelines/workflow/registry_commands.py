"""The commands `lora registry …`: what is registered, who decided what, and getting it.

Each command imports MLflow itself, so that `lora --help` is fast. With `--json` a command prints
one JSON document to standard output.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.config.alias_names import CHAMPION
from pipelines.config.registry_names import is_candidates
from pipelines.errors import PipelineError
from pipelines.paths import runs_root
from pipelines.workflow.registry_roles import roles

if TYPE_CHECKING:
    from pipelines.tracking.open_decision import DecisionResult, Grounds
    from pipelines.tracking.references import Reference

EXIT_USER_ERROR = 2


class PullFormat(Enum):
    """The programs that an adapter can be pulled for."""

    PEFT = "peft"
    VLLM = "vllm"
    LLAMA_CPP = "llama.cpp"


registry = typer.Typer(
    no_args_is_help=True,
    help="Show, compare, fetch, verify and decide about registered adapters.",
)
registry.command()(roles)
NameArgument = Annotated[
    str, typer.Argument(help="Name of a registered model.", show_default=False)
]
ReferenceArgument = Annotated[
    str,
    typer.Argument(metavar="REF", help="NAME@ALIAS or NAME/VERSION.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReasonOption = Annotated[
    str, typer.Option("--reason", help="Why; it is kept in the log.", show_default=False)
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Decide against the rules, with your reason.")
]
AliasOption = Annotated[str, typer.Option("--alias", help="The alias to move.")]


@registry.command("list")
def list_names(json: JsonOption = False) -> None:
    """List the registered names: versions, champion, last move."""
    from pipelines.tracking.catalog import list_models
    from pipelines.workflow.print_registry import models_table, output

    entries = list_models(runs_root())
    output(entries, models_table(entries), as_json=json)


@registry.command()
def show(
    reference: Annotated[
        str,
        typer.Argument(metavar="REF", help="NAME, NAME@ALIAS or NAME/VERSION.", show_default=False),
    ],
    json: JsonOption = False,
) -> None:
    """Show a version: scores, verdict, digests and lineage; of a name alone, list its versions."""
    from pipelines.tracking.catalog import show_version, show_versions
    from pipelines.tracking.references import Reference, name_alone
    from pipelines.workflow.print_registry import output, version_table, versions_table

    name = name_alone(reference)
    if name is not None:
        versions = show_versions(name, runs_root())
        output(versions, versions_table(versions), as_json=json)
        return
    version = show_version(Reference.parse(reference), runs_root())
    output(version, version_table(version), as_json=json)


@registry.command()
def history(name: NameArgument, json: JsonOption = False) -> None:
    """Print every move of the aliases: who, when, from, to, why."""
    from pipelines.tracking.catalog import history_of
    from pipelines.workflow.print_registry import moves_table, output

    moves = history_of(name, runs_root())
    output(moves, moves_table(moves), as_json=json)


@registry.command()
def diff(before: ReferenceArgument, after: ReferenceArgument, json: JsonOption = False) -> None:
    """Print how two versions differ: base, data, recipe, scores."""
    from pipelines.tracking.references import Reference
    from pipelines.tracking.version_diff import diff_versions
    from pipelines.workflow.print_registry import diff_table, output

    found = diff_versions(
        Reference.parse(before, default_alias=CHAMPION),
        Reference.parse(after, default_alias=CHAMPION),
        runs_root(),
    )
    output(found, diff_table(found), as_json=json)


@registry.command()
def pull(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="NAME, NAME@ALIAS, NAME/VERSION, or the digest of an adapter pulled before.",
            show_default=False,
        ),
    ],
    target: Annotated[
        PullFormat, typer.Option("--for", help="Which program it is for.")
    ] = PullFormat.PEFT,
    to: Annotated[
        str, typer.Option(help="Folder for adapters; pulled/ under the runs by default.")
    ] = "",
    base: Annotated[
        str, typer.Option(help="Folder of the base, if it is not found.", show_default=False)
    ] = "",
    json: JsonOption = False,
) -> None:
    """Get an adapter, verified: a folder named after its digest, with a lock file.

    A version that was pulled before is verified again and needs no server.
    """
    from pipelines.tracking.pulled import PullRequest
    from pipelines.tracking.pulled import pull as pull_adapter
    from pipelines.workflow.local_base import base_finder
    from pipelines.workflow.print_registry import output, pulled_table

    runs = runs_root()
    folder = Path(to) if to else runs / "pulled"
    request = PullRequest(reference, folder, target.value, base_finder(runs, base))
    pulled = pull_adapter(request, runs)
    output(pulled, pulled_table(pulled), as_json=json)


@registry.command()
def verify(
    reference: ReferenceArgument,
    public_key: Annotated[
        str,
        typer.Option(
            help="File with the key of who must have signed the version.", show_default=False
        ),
    ] = "",
    json: JsonOption = False,
) -> None:
    """Recompute every digest and the verdict of a version; status 2 if anything was changed."""
    from pipelines.tracking.bundle_verification import verify_version
    from pipelines.tracking.references import Reference
    from pipelines.tracking.signatures import check_signature
    from pipelines.workflow.print_registry import checks_table, output

    parsed = Reference.parse(reference, default_alias=CHAMPION)
    further = [partial(check_signature, public_key=Path(public_key))] if public_key else []
    report = verify_version(parsed, runs_root(), further=further)
    output(report, checks_table(report), as_json=json)
    if not report.is_intact:
        raise typer.Exit(EXIT_USER_ERROR)


@registry.command()
def sign(
    reference: ReferenceArgument,
    key: Annotated[str, typer.Option(help="File with your private key (elliptic curve, PEM).")],
    json: JsonOption = False,
) -> None:
    """Verify a version and sign its files with a key that the registry does not have."""
    from pipelines.tracking.references import Reference
    from pipelines.tracking.signatures import sign_version
    from pipelines.workflow.print_registry import output, signed_table

    parsed = Reference.parse(reference, default_alias=CHAMPION)
    signed = sign_version(parsed, Path(key), runs_root())
    output(signed, signed_table(signed), as_json=json)


@registry.command()
def promote(
    reference: ReferenceArgument,
    reason: ReasonOption,
    alias: AliasOption = CHAMPION,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Make a version the champion. Refused unless it passed the gate, or with --force.

    A version of NAME-candidates is copied into NAME.
    """
    from pipelines.tracking import decisions
    from pipelines.tracking.open_decision import Grounds
    from pipelines.tracking.references import Reference
    from pipelines.tracking.releases import promote_candidate

    grounds = Grounds(reason, force)
    parsed = Reference.parse(reference)
    if is_candidates(parsed.name) and alias == CHAMPION:
        made = promote_candidate(parsed, grounds, runs_root())
    else:
        made = decisions.promote(parsed, grounds, runs_root(), alias=alias)
    _print_moves(made, as_json=json)


@registry.command()
def reject(
    reference: ReferenceArgument,
    reason: ReasonOption,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Take a version's aliases away; no run proposes it again unless that is requested."""
    from pipelines.tracking import decisions

    made = _withdraw(decisions.reject, reference, reason, force=force)
    _print_moves(made, as_json=json)


@registry.command()
def retire(
    reference: ReferenceArgument,
    reason: ReasonOption,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Take a version's aliases away for good."""
    from pipelines.tracking import decisions

    made = _withdraw(decisions.retire, reference, reason, force=force)
    _print_moves(made, as_json=json)


@registry.command()
def rollback(
    name: NameArgument,
    reason: ReasonOption,
    alias: AliasOption = CHAMPION,
    json: JsonOption = False,
) -> None:
    """Move an alias back to the version that held it before."""
    from pipelines.tracking import decisions
    from pipelines.tracking.open_decision import Grounds

    made = decisions.rollback(name, Grounds(reason), runs_root(), alias=alias)
    _print_moves(made, as_json=json)


@registry.command()
def gc(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them.")] = False,
    keep: Annotated[int, typer.Option(min=0, help="Former champions to keep for a rollback.")] = 1,
    json: JsonOption = False,
) -> None:
    """List the versions that are retired, rejected or superseded and have no alias."""
    from pipelines.tracking.cleanup import delete_unused, unused_versions
    from pipelines.workflow.print_registry import output, unused_table

    find = delete_unused if yes else unused_versions
    unused = find(name, runs_root(), keep=keep)
    output(unused, unused_table(unused, deleted=yes), as_json=json)


@registry.command()
def derived(
    data: Annotated[str, typer.Option(help="Digest of prepared data.", show_default=False)] = "",
    base: Annotated[
        str, typer.Option(help="Id or fingerprint of a base.", show_default=False)
    ] = "",
    json: JsonOption = False,
) -> None:
    """List every adapter that was derived from data or from a base."""
    from pipelines.tracking.lineage import derived_from_base, derived_from_data
    from pipelines.workflow.print_registry import derived_table, output

    if bool(data) == bool(base):
        raise PipelineError("give either --data DIGEST or --base ID, and not both")
    find = derived_from_data if data else derived_from_base
    found = find(data or base, runs_root())
    output(found, derived_table(found), as_json=json)


def _withdraw(
    decide: "Callable[[Reference, Grounds, Path], DecisionResult]",
    reference: str,
    reason: str,
    *,
    force: bool,
) -> "DecisionResult":
    """Reject or retire a version."""
    from pipelines.tracking.open_decision import Grounds
    from pipelines.tracking.references import Reference

    return decide(Reference.parse(reference), Grounds(reason, force), runs_root())


def _print_moves(made: "DecisionResult", *, as_json: bool) -> None:
    """Print what a decision moved."""
    from pipelines.workflow.print_registry import moves_table, output

    output(made, moves_table(made.moves), as_json=as_json)
