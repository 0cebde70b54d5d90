"""`lora serve`: pull adapters, load their base, and answer requests until a signal."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn

from pipelines.console import print_status
from pipelines.errors import PipelineError, one_line
from pipelines.tracking.references import Reference
from pipelines.workflow.serving.access import check_binding, read_api_key
from pipelines.workflow.serving.app import Api
from pipelines.workflow.serving.options import ServeOptions
from pipelines.workflow.serving.served_models import AdapterSource, AliasWatcher, open_catalog

SECONDS_TO_FINISH = 10
"""Answers may take this long after a signal."""
MORE_CONNECTIONS = 32
"""Connections beyond the requests that are answered or wait; further ones get status 503."""
KIB = 1024


def serve(names: Sequence[str], options: ServeOptions, runs: Path) -> None:
    """Serve registered adapters until Ctrl-C, or another signal.

    Args:
        names: NAME@ALIAS or NAME/VERSION of each.
        options: where and within which limits.
        runs: folder of all runs.

    Raises:
        PipelineError: the address is taken or needs a key, or an adapter cannot be served.
    """
    references = [Reference.parse(name, default_alias="champion") for name in names]
    references = list(dict.fromkeys(references))
    key = read_api_key(options.api_key_file)
    check_binding(options.host, key)
    with _listen(options) as listener:
        catalog = open_catalog(references, AdapterSource(runs, options))
        watcher = AliasWatcher(catalog, references, options.poll)
        api = Api(catalog, key, options.host, options.max_body_kb * KIB)
        config = uvicorn.Config(
            api.application(),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=options.batch + options.queue + MORE_CONNECTIONS,
            timeout_graceful_shutdown=SECONDS_TO_FINISH,
        )
        print_status(f"serving {', '.join(catalog.models)} on {_address(options)}/v1")
        try:
            with suppress(KeyboardInterrupt):  # raised again after an orderly end
                uvicorn.Server(config).run(sockets=[listener])
        finally:
            watcher.close(SECONDS_TO_FINISH)
            catalog.engine.close()
            print_status("stopped")


def _listen(options: ServeOptions) -> socket.socket:
    """Return a listening socket; connections wait until the models are loaded.

    Raises:
        PipelineError: the address is taken or not one of this host.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        raise PipelineError(
            f"the server cannot listen on {_address(options)} ({one_line(error)}); choose another "
            "--port, or a --host of this machine"
        ) from error


def _address(options: ServeOptions) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"http://{host}:{options.port}"
