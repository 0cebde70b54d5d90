"""What is unusual about an adapter's files: damage, settings without effect, and traps.

| kind    | meaning                                                                        |
|---------|--------------------------------------------------------------------------------|
| keys    | the keys are those of another layout, which PEFT reads wrongly or not at all   |
| config  | a setting that is not supported here, or that changes the base                 |
| empty   | a tensor without values, as a save of sharded weights leaves it                |
| pair    | A or B is missing, or the two do not fit each other                            |
| values  | NaN or infinity                                                                |
| rank    | a rank that differs from the config's, or exceeds a side of its weight         |
| zero    | an update that is zero: its layer was not trained                              |
| norm    | an update far larger than the others, or than any weight                       |
| dtype   | tensors of several dtypes, or of a dtype that is not floating-point            |
| unknown | a tensor that nothing in the config explains                                   |
| targets | names and patterns without a module, or modules that PEFT would leave out      |
| vllm    | vLLM refuses the adapter, or serves it at another scale                        |

`damage.py` finds those up to `rank`, with which the adapter cannot be used as it is.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from statistics import median

from lora_core.adapter.checks import path_ends_with
from lora_core.adapter.contents import AdapterContents
from lora_core.adapter.json_files import PREFIX, ZERO_UPDATES
from lora_core.adapter.key_layouts import MAGNITUDE
from lora_core.base.weight_files import HEADS
from lora_core.config import ALL_LINEAR, matches_end
from lora_core.export.export import OFF, unsupported_by_vllm
from lora_core.inspection.damage import Anomaly, examples, find_damage
from lora_core.inspection.measuring import UpdateFacts

LARGE_RATIO = 30
"""An update is far larger than the others if its norm exceeds their median by this factor."""
LARGE_ENTRY = 1.0
"""An update is far larger than a weight if the root mean square of its entries exceeds this."""
Facts = Mapping[str, UpdateFacts]


def find_anomalies(contents: AdapterContents, facts: Facts) -> tuple[Anomaly, ...]:
    """Return everything unusual about an adapter; damage first.

    Args:
        contents: what its folder holds.
        facts: module path → what was measured.
    """
    found = list(find_damage(contents))
    for rule in (_zero, _large, _dtypes, _unknown, _targets, _patterns, _vllm):
        found += rule(contents, facts)
    return tuple(found)


def _zero(contents: AdapterContents, facts: Facts) -> Iterator[Anomaly]:
    reported = (contents.identity or {}).get(ZERO_UPDATES, [])
    zero = [name for name, each in facts.items() if each.norm == 0]
    if zero and len(zero) == len(facts):
        yield Anomaly("zero", "every update is zero: the adapter is untrained")
    elif zero:
        text = f"{len(zero)} of {len(facts)} updates are zero: {examples(zero)}; "
        text += "the model did not use these layers in training, or the save was incomplete"
        if len(reported) == len(zero):
            text += " (the sidecar records them)"
        yield Anomaly("zero", text)


def _large(contents: AdapterContents, facts: Facts) -> Iterator[Anomaly]:
    sizes: dict[str, float] = {}
    for name, each in facts.items():
        if each.norm:
            sizes[name] = each.norm / (each.shape[0] * each.shape[1]) ** 0.5
    if not sizes:
        return
    usual = median(sizes.values())
    outliers = [name for name, size in sizes.items() if size > LARGE_RATIO * usual]
    if outliers:
        yield Anomaly(
            "norm",
            f"{len(outliers)} updates have entries more than {LARGE_RATIO} times as large as "
            f"usual in this adapter: {examples(outliers)}",
        )
    huge = [name for name, size in sizes.items() if size > LARGE_ENTRY and name not in outliers]
    if huge:
        yield Anomaly(
            "norm",
            f"{len(huge)} updates have entries above {LARGE_ENTRY:g} (root mean square), more "
            f"than any usual weight: {examples(huge)}; compare the alpha and rank of training",
        )


def _dtypes(contents: AdapterContents, facts: Facts) -> Iterator[Anomaly]:
    names = sorted({str(each.dtype).removeprefix("torch.") for each in contents.tensors.values()})
    if len(names) > 1:
        yield Anomaly("dtype", f"the tensors are of several dtypes: {', '.join(names)}")
    other = [key for key, each in contents.tensors.items() if not each.is_floating_point()]
    if other:
        yield Anomaly("dtype", f"{len(other)} tensors are not floating-point: {examples(other)}")


def _unknown(contents: AdapterContents, facts: Facts) -> Iterator[Anomaly]:
    unknown = [key for key in contents.others if not _is_explained(key, contents)]
    if unknown:
        yield Anomaly(
            "unknown",
            f"{len(unknown)} tensors belong to nothing that the config names: {examples(unknown)}",
        )


def _is_explained(key: str, contents: AdapterContents) -> bool:
    """Return whether the config explains a tensor that is not a factor."""
    values = contents.values
    path = key.removeprefix(PREFIX)
    module = path.rpartition(".")[0]
    if key.endswith(MAGNITUDE):
        return bool(values.get("use_dora"))
    if key.endswith(".lora_B.bias"):
        return bool(values.get("lora_bias"))
    if module.endswith(".base_layer"):
        return module.removesuffix(".base_layer") in contents.factors
    if "trainable_tokens_delta" in key:
        return values.get("trainable_token_indices") not in OFF
    saved = values.get("modules_to_save") or ()
    if any(f"{name}." in f"{module}." for name in saved):
        return True
    if key.endswith(".bias"):
        return values.get("bias") in ("all", "lora_only")
    # PEFT saves complete embeddings and heads when the vocabulary was resized.
    return key.endswith(".weight") and path_ends_with(module, (*HEADS, "embed_tokens", "wte"))


def _targets(contents: AdapterContents, facts: Facts) -> Iterator[Anomaly]:
    targets = contents.values.get("target_modules")
    if targets in (None, ALL_LINEAR, []):
        return
    if isinstance(targets, str):
        missed = [name for name in contents.layers if not _fully_matches(targets, name)]
        unused: list[str] = []
    else:
        missed = [name for name in contents.layers if not path_ends_with(name, targets)]
        unused = [one for one in targets if not _names_any(one, contents.layers)]
    if unused:
        yield Anomaly(
            "targets", f"target_modules names {', '.join(unused)}, of which the file has no update"
        )
    if missed:
        yield Anomaly(
            "targets",
            f"{len(missed)} updates are not among target_modules, so PEFT leaves them out: "
            f"{examples(missed)}",
        )


def _names_any(name: str, modules: Collection[str]) -> bool:
    return any(path_ends_with(module, [name]) for module in modules)


def _fully_matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _patterns(contents: AdapterContents, facts: Facts) -> Iterator[Anomaly]:
    modules = [name.removesuffix(".base_layer") for name in contents.factors]
    names = [*modules, *(contents.values.get("target_parameters") or ())]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = contents.values.get(field) or {}
        unused = [key for key in patterns if not any(matches_end(key, name) for name in names)]
        if unused:
            yield Anomaly(
                "targets", f"{field} has entries that match no update: {examples(unused)}"
            )


def _vllm(contents: AdapterContents, facts: Facts) -> Iterator[Anomaly]:
    for key, feature in unsupported_by_vllm(contents.values).items():
        yield Anomaly("vllm", f"vLLM does not support {feature} ({key})")
    served = contents.scales.scale
    wrong = [name for name, each in facts.items() if each.scale != served]
    if wrong:
        first = facts[wrong[0]].scale
        yield Anomaly(
            "vllm",
            f"vLLM ignores rank_pattern and alpha_pattern, so it would serve {len(wrong)} updates "
            f"at another scale, such as {wrong[0]} at {served:g} instead of {first:g}; convert "
            "the adapter to vllm",
        )
