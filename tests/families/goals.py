"""The expected path of families, by name."""

PACKED = (
    *(
        "llama",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3",
        "mistral",
        "ministral",
    ),
    *(
        "mixtral",
        "phi3",
        "phimoe",
        "smollm3",
        "granite",
        "granitemoe",
        "cohere",
        "cohere2",
        "olmo2",
        "olmo3",
        "gpt_oss",
        "glm4",
    ),
    *("deepseek_v3", "starcoder2", "exaone4", "gpt2", "gpt_neox", "opt", "phi"),
)
"""Must be read in packs."""
EITHER = (
    *(
        "bloom",
        "falcon",
        "gptj",
        "stablelm",
        "mpt",
        "nemotron",
        "qwen3_next",
        "qwen3_5_text",
        "lfm2",
        "jamba",
        "mamba2",
        "falcon_h1",
    ),
    *("granitemoehybrid", "recurrent_gemma"),
)
"""Must be read correctly, in packs or one by one."""
QUICK = (
    "llama",
    "gemma2",
    "gpt_oss",
    "mistral",
    "cohere",
    "opt",
    "deepseek_v3",
    "bloom",
    "falcon",
    "lfm2",
    "mamba2",
    "bert",
    "bart",
)
"""One of each kind, for the quick form."""
