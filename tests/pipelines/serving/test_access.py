"""Other hosts need a key, which is long, comes from a file or the environment, and is compared."""

from pathlib import Path

import pytest

from pipelines.errors import PipelineError
from pipelines.workflow.serving.access import (
    API_KEY,
    check_binding,
    is_authorized,
    is_loopback,
    read_api_key,
)

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_host_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_binding(host, None)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "127.0.0.1.nip.io"]
)
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(PipelineError, match="no API key is configured; set LORA_API_KEY"):
        check_binding(host, None)
    check_binding(host, KEY)


def test_key_comes_from_the_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_api_key("") is None
    monkeypatch.setenv(API_KEY, KEY)
    assert read_api_key("") == KEY
    file = tmp_path / "key"
    file.write_text(f"{KEY[::-1]}\n")
    assert read_api_key(str(file)) == KEY[::-1]


@pytest.mark.parametrize("key", ["short", "", "with a space in it all", "ümläut-is-not-ascii-text"])
def test_weak_key_is_refused_and_not_printed(tmp_path: Path, key: str) -> None:
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    with pytest.raises(PipelineError) as refused:
        read_api_key(str(file))
    assert not key or key not in str(refused.value)


def test_missing_key_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be read"):
        read_api_key(str(tmp_path / "absent"))


def test_only_the_complete_key_is_accepted() -> None:
    assert is_authorized(f"Bearer {KEY}", KEY)
    for header in ("", KEY, f"Bearer {KEY[:-1]}", f"Bearer {KEY}0", f"bearer {KEY}", "Bearer ü"):
        assert not is_authorized(header, KEY)
