"""Every public name can be imported, and modules that do not need torch do not import it."""

import subprocess
import sys

import pytest

import lora_core


@pytest.mark.parametrize("name", lora_core.__all__)
def test_public_name_can_be_imported(name: str) -> None:
    assert getattr(lora_core, name).__name__ == name


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'finetune'"):
        lora_core.finetune  # noqa: B018 - the access raises


def test_files_errors_and_config_do_not_import_torch() -> None:
    program = (
        "import sys, lora_core, lora_core.files, lora_core.errors, lora_core.config; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
