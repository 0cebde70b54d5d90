"""The `lora` command.

Each command imports its heavy libraries itself, so that `lora --help` is fast.
"""

import inspect
import os
import signal
import sys
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.config.recipe import find_recipe, load_recipe
from pipelines.config.registry_names import REGISTERED
from pipelines.errors import (
    EndedError,
    PeerError,
    PipelineError,
    StageError,
    UnreachableError,
    no_space,
    without_credentials,
)
from pipelines.orchestration.deploy_options import NOTIFY, DeployOptions, check_webhook
from pipelines.paths import runs_root, tracking_account
from pipelines.planning.cluster import Cluster
from pipelines.workflow.adapter_commands import adapter
from pipelines.workflow.registry_commands import registry
from pipelines.workflow.serving.options import ServeOptions

EXIT_USER_ERROR = 2
EXIT_RETRY = 75
"""Exit status if the input is valid and running again resumes: EX_TEMPFAIL of sysexits.h."""
RETRYABLE_ERRORS = {error.__name__ for error in (PeerError, EndedError, UnreachableError)}
"""Kinds of stage errors with that exit status."""
EXIT_SIGTERM = 128 + signal.SIGTERM
QUIET = "CRITICAL"
"""Level of Prefect's own log on the terminal, unless the user sets another."""
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fine-tune with LoRA, and know what was forgotten.",
)
app.add_typer(adapter, name="adapter")
app.add_typer(registry, name="registry")
RecipeArgument = Annotated[
    str,
    typer.Argument(help="A YAML file, or the name of an included recipe.", show_default=False),
]
RanksOption = Annotated[
    list[int],
    typer.Option("--rank", help="Train this rank instead of the recipe's; may be repeated."),
]


def with_options(name: str, options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that replaces an argument of a typer command by the fields of a dataclass.

    Args:
        name: name of the argument, which receives an instance.
        options: a dataclass whose fields are annotated as typer's options and have defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        fields = inspect.signature(options, eval_str=True).parameters

        def call(**values: Any) -> None:
            chosen = options(**{field: values.pop(field) for field in fields})
            command(**values, **{name: chosen})

        parameters = [parameter for parameter in own.values() if parameter.name != name]
        parameters += fields.values()
        keyword_only = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters
        ]
        call.__name__ = command.__name__
        call.__doc__ = command.__doc__
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        vars(call)["__signature__"] = inspect.Signature(keyword_only)
        return call

    return decorate


@app.command()
def run(
    recipe: RecipeArgument,
    rank: RanksOption = [],  # noqa: B006 - typer needs a list
    notify: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Webhook of Slack or the like that gets a message about the result. "
            "LORA_NOTIFY_URL keeps the address out of the list of processes.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Run a recipe: data, adapters, control, forgetting check, registration, report.

    Resumes where it stopped.
    """
    load_recipe(recipe, ranks=rank)  # reject an invalid recipe before anything is started
    if notify:
        check_webhook(notify)
        os.environ[NOTIFY] = notify
    prepare_prefect()
    from pipelines.orchestration.cancellation import mark_orphaned_runs_crashed
    from pipelines.orchestration.flow_log import log_for_pages_only
    from pipelines.orchestration.local_server import prefect_server
    from pipelines.workflow.flows import finetune

    if os.environ["PREFECT_LOGGING_LEVEL"] == QUIET:
        log_for_pages_only()
    with prefect_server() as url:
        mark_orphaned_runs_crashed(url)
        finetune(recipe, rank)


@app.command()
def join(
    machine: Annotated[
        int,
        typer.Option(
            min=1, help="Index of this host; 0 is the one that runs the recipe.", show_default=False
        ),
    ],
) -> None:
    """Train with another host that runs a recipe with launch.machines.

    Needs its runs folder, and LORA_MAIN_ADDRESS. With PREFECT_API_URL, each training holds the
    slots of this host.
    """
    from pipelines.console import print_status
    from pipelines.runtime.hosts import JoiningHost

    host = JoiningHost(machine, runs_root(), print_status)
    if "PREFECT_API_URL" in os.environ:
        prepare_prefect()
        from pipelines.orchestration.concurrency import hold_slots, slot_names

        host.hold = lambda ranks: hold_slots(slot_names(ranks), print_status)
    host.serve()


@app.command()
@with_options("cluster", Cluster)
def plan(recipe: RecipeArgument, cluster: Cluster, rank: RanksOption = []) -> None:  # noqa: B006
    """Print the matched modules, trained weights, expected memory and file size; train nothing."""
    settings = load_recipe(recipe, ranks=rank)
    from pipelines.workflow.print_plan import print_plan
    from pipelines.workflow.stages import Stages

    print_plan(settings, Stages(settings, runs_root(), find_recipe(recipe).parent), cluster)


@app.command()
def check(recipe: RecipeArgument) -> None:
    """Print what would be learned: rows, columns, lengths, duplicates, and examples by token.

    Loads no model and trains nothing; a run reuses the prepared data.
    """
    settings = load_recipe(recipe)
    from pipelines.workflow.print_check import print_check
    from pipelines.workflow.stages import Stages

    print_check(settings, Stages(settings, runs_root(), find_recipe(recipe).parent))


@app.command()
def init(
    data: Annotated[
        str,
        typer.Argument(
            help="A file, a folder, a pattern of files, an address or a hub data set.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str, typer.Option(help="Base model: a hub id, a folder or a .gguf file.")
    ] = "embedded:SmolLM2-135M-Instruct",
    name: Annotated[str, typer.Option(help="Name of the recipe; by default the data's.")] = "",
    output: Annotated[str, typer.Option(help="File to write; NAME.yaml by default.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a recipe for your data, with settings that fit them and a comment on each."""
    from pipelines.workflow.init_recipe import NewRecipe, write_recipe

    file = Path(output) if output else None
    new = NewRecipe(data, base, name=name or None, output=file, overwrite=force)
    path = write_recipe(new)
    typer.echo(f"{path} is ready: check it with `lora check {path}`, run it with `lora run {path}`")


@app.command()
def compare(
    name: Annotated[
        str,
        typer.Argument(help="A recipe's name, its file, or a summary.json.", show_default=False),
    ],
) -> None:
    """Print the table of an earlier run."""
    path = _find_summary(name)
    from pipelines.comparison.document import read_summary
    from pipelines.console import print_table
    from pipelines.reporting.report import terminal_table

    print_table(terminal_table(read_summary(path)))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Prompt to answer.", show_default=False)],
    adapter: Annotated[
        str,
        typer.Option(
            help="models:/NAME@champion, models:/NAME/VERSION, or an adapter's folder.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str, typer.Option(help="Base model, if the adapter's own has another path on this machine.")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of the answer.")] = 64,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the Python code that comes with the base."),
    ] = False,
) -> None:
    """Answer a prompt with an adapter, on the base that it was trained on."""
    if not adapter.startswith(REGISTERED) and not Path(adapter).is_dir():
        raise PipelineError(
            f"adapter {adapter!r} is not a folder; give one, or models:/NAME@champion"
        )
    from pipelines.workflow.generate import answer

    text = answer(
        prompt,
        adapter=adapter,
        base=base or None,
        max_new_tokens=max_new_tokens,
        runs=runs_root(),
        trust_remote_code=trust_remote_code,
    )
    typer.echo(text)


@app.command()
@with_options("options", ServeOptions)
def serve(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...", help="NAME@ALIAS or NAME/VERSION; several.", show_default=False
        ),
    ],
    options: ServeOptions,
) -> None:
    """Serve registered adapters with OpenAI's interface until Ctrl-C; follow their aliases."""
    from pipelines.workflow.serving.server import serve as serve_adapters

    serve_adapters(adapters, options, runs_root())


@app.command()
@with_options("options", DeployOptions)
def deploy(recipe: RecipeArgument, options: DeployOptions) -> None:
    """Make a recipe a Prefect deployment on the server of PREFECT_API_URL.

    Deploying again keeps what it does not name: other schedules and events, and what is paused.
    """
    load_recipe(recipe, ranks=options.rank)
    requested = options.requested()
    if not os.environ.get("PREFECT_API_URL"):
        raise PipelineError(
            "PREFECT_API_URL is not set, so no worker could find the deployment; start `make ui` "
            "or name your server"
        )
    prepare_prefect()
    from pipelines.orchestration.deploy import deploy_recipe

    typer.echo(deploy_recipe(recipe, requested))


@app.command()
def ui() -> None:
    """Start the MLflow and Prefect pages of the runs, and print their URLs; Ctrl-C ends both."""
    prepare_prefect()
    from pipelines.orchestration.cancellation import mark_orphaned_runs_crashed
    from pipelines.orchestration.pages import serve

    serve(runs_root(), mark_orphaned_runs_crashed)


def main() -> None:
    """Run the command line; print an error that the user can fix in one sentence, with status 2."""
    from lora_core.errors import LoraError

    os.environ.setdefault("LORA_RUNS", str(runs_root()))
    os.environ.update(tracking_account())
    # Turn SIGTERM into SystemExit, so that `finally` blocks end the child processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_SIGTERM))
    try:
        app()
    except (PipelineError, LoraError) as error:
        _print_error(error)
        kind = error.kind if isinstance(error, StageError) else ""
        if kind == UnreachableError.__name__:
            # All children have ended. A normal exit would let Prefect try for minutes to send its
            # events to the server that is away.
            sys.stdout.flush()
            os._exit(EXIT_RETRY)
        sys.exit(EXIT_RETRY if kind in RETRYABLE_ERRORS else EXIT_USER_ERROR)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        _print_error(no_space(error.filename or runs_root()))
        sys.exit(EXIT_USER_ERROR)


def _print_error(error: object) -> None:
    typer.secho(f"error: {without_credentials(str(error))}", fg="red", err=True)


def prepare_prefect() -> None:
    """Store Prefect's state in the folder of runs unless a server or PREFECT_HOME is set.

    This must be called before prefect is imported.
    """
    os.environ.setdefault("PREFECT_HOME", str(runs_root() / "prefect"))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    if "PREFECT_API_URL" not in os.environ:
        # If the local server does not answer, it has ended together with the run.
        os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", QUIET)


def _find_summary(name: str) -> Path:
    path = Path(name)
    for candidate in (path, runs_root() / path.stem / "summary.json"):
        if candidate.name == "summary.json" and candidate.is_file():
            return candidate
    known = sorted(summary.parent.name for summary in runs_root().glob("*/summary.json"))
    raise PipelineError(
        f"no summary of {name!r} under {runs_root()}; runs here: {', '.join(known) or 'none yet'}"
    )


if __name__ == "__main__":
    main()
