"""An adapter in the formats of other programs: vLLM, llama.cpp, a merged checkpoint."""
