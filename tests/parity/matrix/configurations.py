"""The settings that are tried, in terms of a subject's parts.

Settings have the names of both libraries. What only PEFT's config has is either a setting that this
library does not need (`peft`), or one that it must refuse, in its own config as in PEFT's file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parity.matrix.subjects import TOKEN_ROWS, Subject

Settings = Mapping[str, Any]


def _none(subject: Subject) -> Settings:
    return {}


@dataclass(frozen=True)
class Configuration:
    """The settings of one adapter, for every subject that has the parts it needs."""

    name: str
    fields: Callable[[Subject], Settings] = _none
    needs: tuple[str, ...] = ()
    """Attributes of a subject that must not be empty."""
    peft: Callable[[Subject], Settings] = _none
    """Settings that PEFT needs for the same adapter."""
    is_core: bool = False
    """Whether it is tried on every subject, not only on the thorough ones."""

    def applies_to(self, subject: Subject) -> bool:
        """Return whether it is tried on a subject."""
        has_parts = all(getattr(subject, need) for need in self.needs)
        return has_parts and (self.is_core or subject.is_thorough)


def _every(**fields: Any) -> Callable[[Subject], Settings]:
    """Return the same settings for every subject."""
    return lambda subject: fields


def _first(subject: Subject) -> str:
    return subject.targets[0]


CORE = (
    Configuration("default", is_core=True),
    Configuration("all-linear", _every(target_modules="all-linear"), is_core=True),
    Configuration(
        "rsLoRA, patterns",
        lambda s: {
            "use_rslora": True,
            "rank_pattern": {_first(s): 2},
            "alpha_pattern": {_first(s): 3},
        },
        is_core=True,
    ),
    Configuration("DoRA", _every(use_dora=True), is_core=True),
    Configuration("bias of all", _every(bias="all"), is_core=True),
    Configuration("bias of the targets", _every(bias="lora_only"), is_core=True),
    Configuration("lora_bias", _every(lora_bias=True), is_core=True),
    Configuration(
        "modules_to_save",
        lambda s: {"modules_to_save": (s.saved,)},
        needs=("saved",),
        is_core=True,
    ),
    Configuration(
        "embedding",
        lambda s: {"target_modules": (*s.targets, s.embedding)},
        needs=("embedding",),
        is_core=True,
    ),
    Configuration(
        "token rows",
        lambda s: {"trainable_token_indices": {s.embedding: TOKEN_ROWS}},
        needs=("embedding",),
        is_core=True,
    ),
    Configuration(
        "head", lambda s: {"target_modules": (*s.targets, s.head)}, needs=("head",), is_core=True
    ),
    Configuration(
        "target_parameters",
        lambda s: {"target_modules": (), "target_parameters": s.parameters},
        needs=("parameters",),
        is_core=True,
    ),
)
RANKS = (
    Configuration("rank 1", _every(r=1)),
    Configuration("rank 6, alpha 1", _every(r=6, lora_alpha=1)),
    Configuration("rank of a layer and more", _every(r=64)),
    Configuration("rsLoRA", _every(use_rslora=True)),
    Configuration("rank_pattern", lambda s: {"rank_pattern": {_first(s): 2}}),
    Configuration("alpha_pattern", lambda s: {"alpha_pattern": {_first(s): 3}}),
    Configuration(
        "patterns, regular expressions",
        lambda s: {
            "rank_pattern": {rf"^{s.excluded}": 2, ".*[a-z0-9]$": 3},
            "alpha_pattern": {r"\w+": 5},
        },
        needs=("excluded",),
    ),
    Configuration("fan_in_fan_out, which PEFT corrects", peft=_every(fan_in_fan_out=True)),
    Configuration("dropout of 0", _every(lora_dropout=0.0)),
    Configuration("dropout of 0.2", _every(lora_dropout=0.2)),
)
TARGETS = (
    Configuration("regular expression", lambda s: {"target_modules": s.regex}),
    Configuration("names of one kind", lambda s: {"target_modules": (_first(s),)}),
    Configuration("a complete path", lambda s: {"target_modules": (s.excluded,)}, ("excluded",)),
    Configuration(
        "exclude_modules", lambda s: {"exclude_modules": (s.excluded,)}, needs=("excluded",)
    ),
    Configuration(
        "exclude_modules, regular expression",
        lambda s: {"exclude_modules": rf".*{s.excluded[-8:]}", "target_modules": "all-linear"},
        needs=("excluded",),
    ),
    Configuration("layers_to_transform", _every(layers_to_transform=(1,)), needs=("blocks",)),
    Configuration(
        "layers_pattern",
        _every(layers_to_transform=(1,)),
        needs=("blocks",),
        peft=lambda s: {"layers_pattern": [s.blocks]},
    ),
    Configuration("PEFT's own targets", _every(target_modules=None)),
    Configuration("a name without a match", lambda s: {"target_modules": (*s.targets, "absent")}),
    Configuration(
        "an excluded name without a match",
        _every(exclude_modules=("absent",)),
    ),
    Configuration(
        "target_parameters and target_modules",
        lambda s: {"target_parameters": s.parameters[:1]},
        needs=("parameters",),
    ),
    Configuration(
        "target_parameters, rsLoRA, rank_pattern",
        lambda s: {
            "target_modules": (),
            "target_parameters": s.parameters,
            "use_rslora": True,
            "rank_pattern": {s.parameters[0]: 2},
        },
        needs=("parameters",),
    ),
)
TRAINED = (
    Configuration(
        "modules_to_save, PEFT's task type",
        lambda s: {"modules_to_save": (s.saved,)},
        needs=("saved", "task"),
        peft=lambda s: {"task_type": s.task},
    ),
    Configuration(
        "modules_to_save, ending",
        lambda s: {"modules_to_save": (s.saved[-4:],)},
        needs=("saved",),
    ),
    Configuration(
        "modules_to_save, embedding",
        lambda s: {"modules_to_save": (s.embedding,)},
        needs=("embedding",),
    ),
    Configuration("modules_to_save, head", lambda s: {"modules_to_save": (s.head,)}, ("head",)),
    Configuration(
        "modules_to_save, a target inside",
        lambda s: {"modules_to_save": (s.saved, _first(s))},
        needs=("saved",),
    ),
    Configuration(
        "embedding, DoRA, rsLoRA",
        lambda s: {
            "target_modules": (*s.targets, s.embedding),
            "use_dora": True,
            "use_rslora": True,
        },
        needs=("embedding",),
    ),
    Configuration(
        "embedding and head",
        lambda s: {"target_modules": (*s.targets, s.embedding, s.head)},
        needs=("embedding", "head"),
    ),
    Configuration(
        "token rows and bias",
        lambda s: {"trainable_token_indices": {s.embedding: TOKEN_ROWS}, "bias": "all"},
        needs=("embedding",),
    ),
    Configuration(
        "ensure_weight_tying, embedding",
        lambda s: {
            "target_modules": (*s.targets, s.embedding),
            "ensure_weight_tying": True,
        },
        needs=("embedding", "is_tied"),
    ),
    Configuration(
        "ensure_weight_tying, modules_to_save",
        lambda s: {"modules_to_save": (s.embedding,), "ensure_weight_tying": True},
        needs=("embedding", "is_tied"),
    ),
    Configuration(
        "ensure_weight_tying, token rows",
        lambda s: {
            "trainable_token_indices": {s.embedding: TOKEN_ROWS},
            "ensure_weight_tying": True,
        },
        needs=("embedding", "is_tied"),
    ),
    Configuration(
        "DoRA, rsLoRA, bias, patterns",
        lambda s: {
            "use_dora": True,
            "use_rslora": True,
            "bias": "lora_only",
            "rank_pattern": {_first(s): 2},
        },
    ),
)
INITIALIZATIONS = (
    Configuration("PEFT's init_lora_weights=True", peft=_every(init_lora_weights=True)),
    Configuration("PEFT's init_lora_weights=False", peft=_every(init_lora_weights=False)),
    Configuration("gaussian", _every(init_lora_weights="gaussian")),
    Configuration("orthogonal", _every(init_lora_weights="orthogonal")),
    Configuration("PiSSA", _every(init_lora_weights="pissa")),
    Configuration("PiSSA, iterations", _every(init_lora_weights="pissa_niter_4", use_rslora=True)),
    Configuration("OLoRA", _every(init_lora_weights="olora")),
    Configuration("OLoRA, DoRA", _every(init_lora_weights="olora", use_dora=True)),
)
ONLY_PEFT = (
    Configuration("aLoRA", _every(alora_invocation_tokens=(7,)), needs=("head",)),
    Configuration("KaSA", _every(kasa_config={})),
    Configuration("VeLoRA", _every(velora_config={"num_groups": 2})),
    Configuration(
        "BD-LoRA",
        lambda s: {"use_bdlora": {"target_modules_bd_a": [*s.targets], "nblocks": 2}},
    ),
    Configuration("QALoRA", _every(use_qalora=True, qalora_group_size=8)),
    Configuration("layer_replication", _every(layer_replication=((0, 2), (1, 2)))),
    Configuration("MiCA", _every(init_lora_weights="mica")),
)
CONFIGURATIONS = (*CORE, *RANKS, *TARGETS, *TRAINED, *INITIALIZATIONS, *ONLY_PEFT)
