"""Every public name can be imported from the package, and what needs no torch does not load it."""

import subprocess
import sys

import pytest

import lora_core


@pytest.mark.parametrize("name", lora_core.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(lora_core, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'finetune'"):
        lora_core.finetune  # noqa: B018 - asking for it is the point


def test_files_and_errors_cost_no_torch() -> None:
    program = "import sys, lora_core, lora_core.files, lora_core.errors, lora_core.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
