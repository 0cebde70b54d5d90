"""The `lora` command. Heavy libraries are imported by the command that needs them, so `lora --help` is quick."""

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.config.recipe import find_recipe, load_recipe
from pipelines.errors import (
    EndedError,
    PeerError,
    PipelineError,
    StageError,
    UnreachableError,
    no_space,
)
from pipelines.paths import runs_root
from pipelines.planning.cluster import Cluster

AGAIN = 75
"""Exit status where nothing is wrong with what was asked, and running it again goes on: sysexits.h's EX_TEMPFAIL."""
PASSING = {error.__name__ for error in (PeerError, EndedError, UnreachableError)}
"""Kinds of a stage's errors of which that is so."""
QUIET = "CRITICAL"
"""Level of Prefect's own log on the terminal, unless the user names another."""
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fine-tune with LoRA, and know what was forgotten.",
)
RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or the name of a recipe that comes along.", show_default=False
    ),
]
RanksOption = Annotated[
    list[int],
    typer.Option(
        "--rank", help="Train this rank instead of the recipe's; may be given more than once."
    ),
]


def with_options(name: str, options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces the argument `name` of a typer command by the fields of a dataclass.

    Args:
        name: of the argument, which gets an instance.
        options: a dataclass whose fields are annotated as typer's options and have defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        fields = inspect.signature(options, eval_str=True).parameters

        def call(**values: Any) -> None:
            chosen = options(**{field: values.pop(field) for field in fields})
            command(**values, **{name: chosen})

        flat = [parameter for parameter in own.values() if parameter.name != name] + list(
            fields.values()
        )
        keyword_only = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in flat
        ]
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
        vars(call)["__signature__"] = inspect.Signature(keyword_only)
        return call

    return decorate


@app.command()
def run(recipe: RecipeArgument, rank: RanksOption = []) -> None:  # noqa: B006 - typer reads the list as a default
    """Run a recipe: data, adapters, control, forgetting check, registration, report. Goes on where it was stopped."""
    load_recipe(recipe, ranks=rank)  # a bad recipe is refused before anything is started
    prepare_prefect()
    from pipelines.orchestration.cancellation import mark_orphaned_runs_crashed
    from pipelines.orchestration.flow_log import log_for_pages_only
    from pipelines.orchestration.local_server import serving
    from pipelines.workflow.flows import finetune

    if os.environ["PREFECT_LOGGING_LEVEL"] == QUIET:
        log_for_pages_only()
    with serving() as url:
        mark_orphaned_runs_crashed(url)
        finetune(recipe, rank)


@app.command()
def join(
    machine: Annotated[
        int,
        typer.Option(
            min=1, help="This host's number; 0 is the one that runs the recipe.", show_default=False
        ),
    ],
) -> None:
    """Train beside another host that runs a recipe with launch.machines; needs its runs folder, and LORA_MAIN_ADDRESS."""
    from pipelines.console import print_status
    from pipelines.runtime.hosts import Joined

    Joined(machine, runs_root(), print_status).serve()


@app.command()
@with_options("cluster", Cluster)
def plan(recipe: RecipeArgument, cluster: Cluster, rank: RanksOption = []) -> None:  # noqa: B006
    """Print the matched modules, trained weights, expected memory and file size, without training."""
    settings = load_recipe(recipe, ranks=rank)
    from pipelines.workflow.print_plan import print_plan
    from pipelines.workflow.stages import Stages

    print_plan(settings, Stages(settings, runs_root(), find_recipe(recipe).parent), cluster)


@app.command()
def compare(
    name: Annotated[
        str,
        typer.Argument(help="A recipe's name, its file, or a summary.json.", show_default=False),
    ],
) -> None:
    """Print the table of an earlier run."""
    path = _summary(name)
    from pipelines.console import show
    from pipelines.reporting.report import terminal_table

    show(terminal_table(json.loads(path.read_text())))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer.", show_default=False)],
    adapter: Annotated[
        str,
        typer.Option(
            help="models:/NAME@champion, models:/NAME/VERSION, or an adapter's folder.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str, typer.Option(help="Base model, where the adapter's own is elsewhere on this machine.")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the Python code that comes with the base."),
    ] = False,
) -> None:
    """Answer a prompt with an adapter, on the base that it was trained on."""
    if not adapter.startswith("models:/") and not Path(adapter).is_dir():
        raise PipelineError(f"adapter {adapter!r} is no folder; give one, or models:/NAME@champion")
    from pipelines.workflow.generate import answer

    typer.echo(
        answer(
            prompt,
            adapter,
            base or None,
            max_new_tokens,
            runs_root(),
            trust_remote_code=trust_remote_code,
        )
    )


@app.command()
def deploy(
    recipe: RecipeArgument,
    cron: Annotated[str, typer.Option(help='When to run, such as "0 2 * * *".')] = "",
    interval: Annotated[int, typer.Option(help="Seconds between runs.", min=0)] = 0,
    on_event: Annotated[str, typer.Option(help="Name of a Prefect event that starts a run.")] = "",
    pool: Annotated[
        str, typer.Option(help="Work pool that a worker on the GPU host serves.")
    ] = "lora",
) -> None:
    """Make a recipe a Prefect deployment on the server of PREFECT_API_URL."""
    load_recipe(recipe)
    if not os.environ.get("PREFECT_API_URL"):
        raise PipelineError(
            "PREFECT_API_URL is not set, so no worker could find the deployment; start `make ui` or name your server"
        )
    prepare_prefect()
    from pipelines.orchestration.deploy import When, deploy_recipe

    typer.echo(deploy_recipe(recipe, When(cron or None, interval or None, on_event or None), pool))


@app.command()
def ui() -> None:
    """Start the MLflow and Prefect pages on what the runs produced, and print their addresses; Ctrl-C ends both."""
    prepare_prefect()
    from pipelines.orchestration.cancellation import mark_orphaned_runs_crashed
    from pipelines.orchestration.pages import serve

    serve(runs_root(), mark_orphaned_runs_crashed)


def main() -> None:
    """Run the command line; an error the user can mend is one sentence and exit status 2."""
    from lora_core.errors import LoraError

    os.environ.setdefault("LORA_RUNS", str(runs_root()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    try:
        app()
    except (PipelineError, LoraError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        kind = error.kind if isinstance(error, StageError) else ""
        if kind == UnreachableError.__name__:
            sys.stdout.flush()
            os._exit(
                AGAIN
            )  # all that was started has ended; Prefect would offer its events to a server that is away, for minutes
        sys.exit(AGAIN if kind in PASSING else 2)
    except OSError as error:
        if error.errno != 28:  # ENOSPC
            raise
        typer.secho(f"error: {no_space(error.filename or runs_root())}", fg="red", err=True)
        sys.exit(2)


def prepare_prefect() -> None:
    """Keep Prefect's state beside the runs unless a server or a home is named; it must be set before the import."""
    os.environ.setdefault("PREFECT_HOME", str(runs_root() / "prefect"))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if (
        "PREFECT_API_URL" not in os.environ
    ):  # a server of the run's own that does not answer has ended with it
        os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", QUIET)


def _summary(name: str) -> Path:
    path = Path(name)
    for candidate in (path, runs_root() / path.stem / "summary.json"):
        if candidate.name == "summary.json" and candidate.is_file():
            return candidate
    known = sorted(p.parent.name for p in runs_root().glob("*/summary.json"))
    raise PipelineError(
        f"no summary of {name!r} under {runs_root()}; runs here: {', '.join(known) or 'none yet'}"
    )


if __name__ == "__main__":
    main()
