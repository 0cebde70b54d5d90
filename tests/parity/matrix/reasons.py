"""The declared reasons for which this library may refuse a case that PEFT accepts.

A refusal whose message matches none of them misses the goal of the matrix.
"""

import re

BOTH = "PEFT refuses the case too"
NO_EFFECT = "a setting without effect is refused: it is usually a mistake"
NO_MATCH = "a name that matches nothing is refused: it is usually misspelled"
OTHER_METHOD = "a variant of PEFT that is not plain LoRA"
LOW_RANK_ON_DISK = "the merge on disk adds low-rank updates of matrices; the rest merges in memory"
ON_DISK = "the files name or tie the weight otherwise than the model; it merges in memory"
QUANTIZED = "a merge into 4 bits would erase most of the update"
ONE_BATCH = "the model computes all rows together there, so none can have its own adapter"
TWICE = "a module cannot be adapted and trained in full"
ATTENTION = "torch's MultiheadAttention takes low-rank updates only, without biases and DoRA"
OUT_PROJ = "PEFT's update of torch's out_proj has no effect, because its forward is not called"
NO_KERNEL = "no kernel with groups, or with other padding than zeros, includes the update"
TYING = "one update that embedding and head share is not supported"

REASONS = {
    r"bias='(all|lora_only)' has no effect": NO_EFFECT,
    r"exclude_modules=.* (leaves \d+ of \d+ targets|excludes none)": NO_EFFECT,
    r"has no effect: exclude_modules": NO_EFFECT,
    r"init_lora_weights=.* has no effect on": NO_EFFECT,
    r"only holds the weight that .* compute with": NO_EFFECT,
    r"target '.*' matches no module": NO_MATCH,
    r"modules_to_save names '.*', which matches no module": NO_MATCH,
    r"target_modules=None names nothing": "PEFT's defaults per architecture; all-linear is ours",
    r"LoraConfig has no setting (alora|kasa|velora|use_bdlora|(use_)?qalora)": OTHER_METHOD,
    r"LoraConfig has no setting layer_replication": OTHER_METHOD,
    r"a feature that would be ignored here": OTHER_METHOD,
    r"init_lora_weights='mica' is unknown": OTHER_METHOD,
    r"init_lora_weights='mica', which changes the base": OTHER_METHOD,
    r"which is not a factor of a low-rank update": LOW_RANK_ON_DISK,
    r"updates stacks of experts": LOW_RANK_ON_DISK,
    r"are not the factors of one weight": LOW_RANK_ON_DISK,
    r"base has no tensor .* for the target": ON_DISK,
    r"may tie its output head": ON_DISK,
    r"is stored in nf4": QUANTIZED,
    r"has a quantization_config": QUANTIZED,
    r"the routing names \d+ rows": ONE_BATCH,
    r"computes all rows with the same": ONE_BATCH,
    r"several adapters update, each for its own rows": ONE_BATCH,
    r"is named by two settings": TWICE,
    r"bias='all' would train the bias of .* around": TWICE,
    r"rank \d+ exceeds": "a rank above the smaller side of a matrix adds nothing",
    r"gives a bias to a \w+ that has none": "a merge cannot add a bias to a layer without one",
    r"doubles the rank of the saved adapter": "a saved PiSSA or OLoRA has twice the rank",
    r"groups=\d+ and padding_mode": NO_KERNEL,
    r"use_dora=True has no meaning for .*groups=": "PEFT's DoRA takes norms of other rows there",
    r"is not supported by \w+, an nn.MultiheadAttention": ATTENTION,
    r"(mha|self_attn)\.out_proj(, which cannot|\.(lora_A|base_layer|bias))": OUT_PROJ,
    r"has a base bias of (mha|self_attn)\.out_proj": OUT_PROJ,
    r"^target_modules=\(\) names nothing": OUT_PROJ,
    r"LoraConfig has no setting ensure_weight_tying": TYING,
    r"sets ensure_weight_tying=True": TYING,
    r"running statistics no adapter file stores": "batch statistics are not in PEFT's files",
    r"PEFT trained for one user of a shared weight": "PEFT trains one user of a shared weight only",
}
"""Regular expression found in the message of an error → the reason."""


def reason_for(message: str) -> str | None:
    """Return the declared reason for a refusal, if there is one."""
    for pattern, reason in REASONS.items():
        if re.search(pattern, message):
            return reason
    return None
