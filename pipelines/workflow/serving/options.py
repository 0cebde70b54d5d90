"""The options of `lora serve`; `lora --help` imports this file, so it imports no large library."""

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass(frozen=True)
class ServeOptions:
    """Where and within which limits a server answers."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this host need an API key.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000
    api_key_file: Annotated[
        str,
        typer.Option(
            help="File with the API key that requests need; or set LORA_API_KEY.",
            show_default=False,
        ),
    ] = ""
    poll: Annotated[
        float, typer.Option(min=0.1, help="Seconds between checks of where the aliases are.")
    ] = 30.0
    batch: Annotated[int, typer.Option(min=1, help="Most requests that are answered at once.")] = 16
    queue: Annotated[
        int, typer.Option(min=1, help="Most requests that wait; others get status 429.")
    ] = 64
    context: Annotated[
        int, typer.Option(min=2, help="Most tokens of prompt and answer; at most the base's.")
    ] = 4096
    max_body_kb: Annotated[
        int, typer.Option(min=1, help="Largest body of a request, in KiB; others get status 413.")
    ] = 1024
    to: Annotated[
        str, typer.Option(help="Folder for adapters; pulled/ under the runs by default.")
    ] = ""
    base: Annotated[
        str, typer.Option(help="Folder of the base, if it is not found.", show_default=False)
    ] = ""
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the Python code that comes with the base."),
    ] = False
