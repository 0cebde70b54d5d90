"""The commands `lora adapter …`: look at, convert, compare, merge and verify adapters in folders.

An adapter of PEFT and one of this pipeline are treated alike. Each command imports torch itself, so
that `lora --help` is fast. With `--json` a command prints one JSON document to standard output.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pipelines.errors import PipelineError
from pipelines.paths import runs_root

ADAPTER_CONFIG = "adapter_config.json"


class ConvertTarget(Enum):
    """The formats that an adapter can be converted to."""

    PEFT = "peft"
    VLLM = "vllm"
    GGUF = "gguf"
    LORA = "lora"


class MergedDtype(Enum):
    """The dtypes of a merged model."""

    AS_BASE = "base"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


adapter = typer.Typer(
    no_args_is_help=True,
    help="Inspect, convert, compare, merge and verify adapters in folders.",
)
FolderArgument = Annotated[
    str, typer.Argument(metavar="FOLDER", help="Folder of an adapter.", show_default=False)
]
DestinationArgument = Annotated[
    str,
    typer.Argument(metavar="DEST", help="Folder to write; for gguf, the file.", show_default=False),
]
BASE_HELP = "Base model: a folder, a hub id, a .gguf file or embedded:NAME."
BaseOption = Annotated[str, typer.Option("--base", help=BASE_HELP, show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@adapter.command()
def inspect(
    folder: FolderArgument,
    base: BaseOption = "",
    layers: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --base: layers of each kind in which intruder dimensions are counted, "
            "spread evenly; 0 for all.",
        ),
    ] = 5,
    json: JsonOption = False,
) -> None:
    """Print type, base, targets, ranks, scales, sizes, and whatever is unusual about an adapter.

    With --base also intruder dimensions: strong directions of the merged weights that the base
    does not have.
    """
    path = _adapter_folder(folder)
    from lora_core.inspection.adapter_report import inspect_adapter
    from lora_core.inspection.intrusion import Sample, count_intruders
    from pipelines.models.renames import checkpoint_renames
    from pipelines.workflow.adapter_base import named_base
    from pipelines.workflow.print_adapter import print_report

    report = inspect_adapter(path)
    intruders = None
    if base:
        base_folder = named_base(base, runs_root())
        intruders = count_intruders(
            path,
            base_folder,
            sample=Sample(layers),
            renames=checkpoint_renames(base_folder),
        )
    print_report(report, intruders, as_json=json)


@adapter.command()
def convert(
    folder: FolderArgument,
    destination: DestinationArgument,
    to: Annotated[
        ConvertTarget,
        typer.Option("--to", help="peft and lora are folders for PEFT; lora is plain LoRA."),
    ],
    base: BaseOption = "",
    rank: Annotated[
        int, typer.Option(min=0, help="With --to lora: rank of the result; 0 keeps each layer's.")
    ] = 0,
    rename: Annotated[
        list[str],
        typer.Option(
            metavar="OLD=NEW",
            help="Replace the beginning of module paths, for a model that was renamed; repeatable.",
        ),
    ] = [],  # noqa: B006 - typer needs a list
) -> None:
    """Convert an adapter of any age or layout: for PEFT, vLLM or llama.cpp, or to plain LoRA.

    A DoRA becomes plain LoRA by the best approximation on its base, with the error printed.
    """
    path = _adapter_folder(folder)
    renames = _parse_renames(rename)
    from lora_core.export.conversion import ConversionOptions, convert_adapter
    from pipelines.models.renames import checkpoint_renames
    from pipelines.workflow.adapter_base import base_for_conversion, named_base
    from pipelines.workflow.print_adapter import print_conversion

    runs = runs_root()
    base_folder = named_base(base, runs) if base else base_for_conversion(path, to.value, runs)
    options = ConversionOptions(
        base=base_folder,
        base_name=base,
        rank=rank or None,
        base_renames=checkpoint_renames(base_folder) if base_folder else (),
        renames=renames,
    )
    print_conversion(convert_adapter(path, Path(destination), to.value, options))


@adapter.command()
def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="Folder of an adapter.", show_default=False)
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="Folder of another.", show_default=False)
    ],
    json: JsonOption = False,
) -> None:
    """Print how two adapters of one base differ: norms, ranks, cosine and overlap of subspaces."""
    one, other = _adapter_folder(first), _adapter_folder(second)
    from lora_core.inspection.difference import compare_adapters
    from pipelines.workflow.print_adapter import print_difference

    print_difference(compare_adapters(one, other), as_json=json)


@adapter.command()
def merge(
    folder: FolderArgument,
    base: Annotated[str, typer.Argument(metavar="BASE", help=BASE_HELP, show_default=False)],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="Folder to write.", show_default=False)
    ],
    dtype: Annotated[
        MergedDtype, typer.Option(help="Of the merged weights; base keeps those of the base.")
    ] = MergedDtype.AS_BASE,
) -> None:
    """Merge an adapter into a base, one tensor at a time; print what the rounding retained."""
    path = _adapter_folder(folder)
    import torch

    from lora_core import merge_checkpoint
    from pipelines.models.renames import checkpoint_renames
    from pipelines.workflow.adapter_base import mergeable_adapter, named_base
    from pipelines.workflow.print_adapter import print_merge

    chosen = None if dtype is MergedDtype.AS_BASE else getattr(torch, dtype.value)
    base_folder = named_base(base, runs_root())
    with mergeable_adapter(path) as mergeable:
        report = merge_checkpoint(
            base_folder,
            mergeable,
            Path(destination),
            dtype=chosen,
            renames=checkpoint_renames(base_folder),
        )
    print_merge(report, destination)


@adapter.command()
def verify(folder: FolderArgument, base: BaseOption = "", json: JsonOption = False) -> None:
    """Check digests, values, structure and base of an adapter; status 2 if something is wrong.

    Without --base, the base that the adapter names is used if it is on this host.
    """
    path = _adapter_folder(folder)
    from lora_core.errors import LoraError
    from lora_core.inspection.adapter_verification import verify_adapter
    from pipelines.models.renames import checkpoint_renames
    from pipelines.workflow.adapter_base import named_base, recorded_base
    from pipelines.workflow.print_adapter import print_failure, print_verification

    try:
        runs = runs_root()
        base_folder = named_base(base, runs) if base else recorded_base(path, runs)
        base_renames = checkpoint_renames(base_folder) if base_folder else ()
        verification = verify_adapter(path, base_folder, base_renames)
    except (LoraError, PipelineError) as error:
        print_failure(path, error, as_json=json)
        raise
    print_verification(verification, as_json=json)


def _adapter_folder(folder: str) -> Path:
    """Return the path of an adapter's folder.

    Raises:
        PipelineError: it is not the folder of an adapter.
    """
    path = Path(folder)
    if not path.is_dir():
        raise PipelineError(
            f"adapter {folder!r} is not a folder; give the folder of a saved adapter, or get a "
            "registered one with `lora registry pull`"
        )
    if (path / ADAPTER_CONFIG).is_file():
        return path
    inner = sorted(str(found.parent) for found in path.glob(f"*/{ADAPTER_CONFIG}"))
    hint = f"it contains {', '.join(inner)}: give one" if inner else "give the folder of an adapter"
    raise PipelineError(f"{folder} has no {ADAPTER_CONFIG}; {hint}")


def _parse_renames(texts: list[str]) -> dict[str, str]:
    """Return old → new beginning of module paths.

    Raises:
        PipelineError: a text is not of the form OLD=NEW.
    """
    renames: dict[str, str] = {}
    for text in texts:
        old, separator, new = text.partition("=")
        if not (old and separator):
            raise PipelineError(
                f"--rename {text!r} must be OLD=NEW, such as model.layers=model.text.layers"
            )
        renames[old] = new
    return renames
