"""The decoders with an output head."""

from dataclasses import replace
from functools import partial

from parity import models
from parity.cases import TRANSPOSED
from parity.matrix import language_models
from parity.matrix.subjects import Subject

DECODER = "decoders"
BLOCK_1 = r".*layers\.1\.(self_attn\.[qv]|mlp\.down)_proj"
LLAMA = Subject(
    name="llama",
    kind=DECODER,
    build=models.llama,
    targets=("q_proj", "up_proj"),
    regex=BLOCK_1,
    excluded="model.layers.0.self_attn.q_proj",
    blocks="layers",
    embedding="embed_tokens",
    head="lm_head",
    saved="post_attention_layernorm",
    parameters=("mlp.up_proj.weight",),
)
FUSED = Subject(
    name="gpt-neox",
    kind=DECODER,
    build=language_models.gpt_neox,
    targets=("query_key_value", "dense_4h_to_h"),
    regex=r".*\.1\..*\.(dense|query_key_value)",
    excluded="gpt_neox.layers.0.attention.query_key_value",
    blocks="layers",
    embedding="embed_in",
    head="lm_head",
    saved="final_layer_norm",
)
BLOOM = replace(
    FUSED,
    name="bloom",
    build=language_models.bloom,
    excluded="transformer.h.0.self_attention.query_key_value",
    blocks="h",
    embedding="word_embeddings",
    saved="ln_f",
    is_tied=True,
)
TIED = replace(LLAMA, name="llama, tied", build=partial(models.llama, tied=True), is_tied=True)
DECODERS = (
    replace(LLAMA, is_thorough=True),
    replace(TIED, is_thorough=True),
    replace(LLAMA, name="llama, biases", build=partial(models.llama, bias=True)),
    replace(LLAMA, name="qwen2", build=language_models.qwen2),
    replace(TIED, name="qwen3", build=language_models.qwen3),
    replace(LLAMA, name="gemma3", build=models.gemma),
    replace(
        LLAMA,
        name="phi3",
        build=models.phi3,
        targets=("qkv_proj", "gate_up_proj"),
        regex=r".*layers\.1\..*_proj",
        excluded="model.layers.0.self_attn.qkv_proj",
        parameters=("qkv_proj.weight",),
    ),
    replace(
        LLAMA,
        name="mixtral",
        build=models.mixtral,
        targets=("q_proj", "o_proj"),
        regex=r".*layers\.1\.self_attn\.[qv]_proj",
        parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
    Subject(
        name="gpt2",
        kind=DECODER,
        build=models.gpt2,
        targets=("c_attn", "c_proj"),
        regex=r".*\.1\..*\.c_(attn|fc)",
        excluded="transformer.h.0.attn.c_attn",
        blocks="h",
        embedding="wte",
        head="lm_head",
        saved="ln_f",
        parameters=("attn.c_attn.weight",),
        is_tied=True,
        peft=TRANSPOSED,
        is_thorough=True,
    ),
    FUSED,
    BLOOM,
    replace(BLOOM, name="falcon", build=language_models.falcon),
    Subject(
        name="gpt-j",
        kind=DECODER,
        build=language_models.gptj,
        targets=("q_proj", "fc_in"),
        regex=r".*\.1\..*\.fc_(in|out)",
        excluded="transformer.h.0.attn.q_proj",
        blocks="h",
        embedding="wte",
        head="lm_head",
        saved="ln_f",
    ),
    Subject(
        name="opt",
        kind=DECODER,
        build=language_models.opt,
        targets=("q_proj", "fc1"),
        regex=r".*\.1\..*\.(v_proj|out_proj)",
        excluded="model.decoder.layers.0.fc1",
        blocks="layers",
        embedding="embed_tokens",
        head="lm_head",
        saved="self_attn_layer_norm",
        is_tied=True,
    ),
)
