"""The README's example of adapters as files runs."""

import re
from pathlib import Path

from peft_adapters import save_peft_adapter

import lora_core

README = Path(lora_core.__file__).parent / "README.md"


def test_the_example_of_the_readme_runs(plain: Path, llama_folder: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    [example] = [block for block in blocks if "inspect_adapter" in block]
    names = {
        "folder": plain,
        "base": llama_folder,
        "other": save_peft_adapter(llama_folder, tmp_path / "other", seed=1),
        "destination": tmp_path / "vllm",
    }
    exec(example, names)
    assert names["report"].type == "LoRA"
    assert names["intruders"].keys() == {row.module for row in names["difference"].updates}
    assert (tmp_path / "vllm" / "adapter_config.json").is_file()
