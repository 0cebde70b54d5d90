"""Files at an address are downloaded to the cache and read like local ones."""

import gzip
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from loaded_rows import load, load_held_out, write

from pipelines.config.data_section import WeightedSource
from pipelines.data.sources.loading_rows import load_source
from pipelines.data.sources.remote_files import remote_identity
from pipelines.errors import DataError

ROWS = '{"text": "one"}\n{"text": "two"}\n'
TEXTS = [{"text": "one"}, {"text": "two"}]


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def website(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a web server, and the folder that it serves."""
    folder = tmp_path / "website"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty file system in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_a_web_address_is_read(website: tuple[str, Path]) -> None:
    address, folder = website
    write(folder / "rows.jsonl", ROWS)
    write(folder / "packed.csv.gz", gzip.compress(b"text\none\ntwo\n"))
    assert load(f"{address}/rows.jsonl").rows == TEXTS
    assert load(f"{address}/packed.csv.gz").rows == TEXTS
    loaded = load(f"{address}/rows.jsonl?download=true")
    assert loaded.places[0] == "line 1 of 'rows.jsonl'"
    assert loaded.facts.source == f"{address}/rows.jsonl?download=true"


def test_an_address_is_read_as_it_is_now(website: tuple[str, Path]) -> None:
    address, folder = website
    write(folder / "rows.jsonl", '{"text": "old"}\n')
    load(f"{address}/rows.jsonl")
    write(folder / "rows.jsonl", '{"text": "new"}\n')
    assert load(f"{address}/rows.jsonl").rows == [{"text": "new"}]


def test_an_address_is_downloaded_once_into_a_cache(
    website: tuple[str, Path], tmp_path: Path
) -> None:
    address, folder = website
    write(folder / "rows.jsonl", ROWS)
    source = WeightedSource(source=f"{address}/rows.jsonl")
    first = load_source(source, cache=tmp_path / "cache")
    write(folder / "rows.jsonl", '{"text": "new"}\n')
    second = load_source(source, cache=tmp_path / "cache")
    assert list(first) == list(second)


def test_a_missing_page_is_refused(website: tuple[str, Path]) -> None:
    address, _ = website
    with pytest.raises(DataError, match=r"absent\.jsonl' cannot be read: .*check the address"):
        load(f"{address}/absent.jsonl")


def test_a_server_that_does_not_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r"cannot be read: .*check the address"):
        load("http://127.0.0.1:9/rows.jsonl")


def test_folders_and_patterns_are_read(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("train", "validation"):
        memory.pipe_file(f"/data/{name}.jsonl", f'{{"text": "{name}"}}\n'.encode())
    assert load("memory://data").rows == [{"text": "train"}]
    held_out = load_held_out("memory://data")
    assert held_out is not None
    assert held_out.rows == [{"text": "validation"}]
    both = load("memory://data/*.jsonl")
    assert both.rows == [{"text": "train"}, {"text": "validation"}]
    with pytest.raises(DataError, match="no file matches"):
        load("memory://data/*.csv")


def test_settings_without_effect_are_refused(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/rows.jsonl", ROWS.encode())
    with pytest.raises(DataError, match=r"data\.delimiter ';' has no effect"):
        load("memory://rows.jsonl", delimiter=";")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(DataError, match="Install s3fs to access S3; install the package"):
        load("s3://bucket/rows.jsonl")


def test_the_identity_changes_with_the_content(website: tuple[str, Path], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    first = remote_identity(f"file://{path}")
    write(path, ROWS * 2)
    assert remote_identity(f"file://{path}") != first
    address, folder = website
    write(folder / "rows.jsonl", ROWS)
    before = remote_identity(f"{address}/rows.jsonl")
    assert remote_identity(f"{address}/rows.jsonl") == before
    write(folder / "rows.jsonl", ROWS * 2)
    assert remote_identity(f"{address}/rows.jsonl") != before
