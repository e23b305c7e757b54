"""The sizes that kernels are compiled for: gate or up projection at 16,384 tokens."""

# rows, inner width, outer width, groups
SHAPES = {
    "Mixtral-8x7B": (32768, 4096, 14336, 8),
    "OLMoE-1B-7B": (131072, 2048, 1024, 64),
    "Qwen3-30B-A3B": (131072, 2048, 768, 128),
    "DeepSeek-V3, one of 8 devices": (131072, 7168, 2048, 32),
    "gpt-oss-120b": (65536, 2880, 2880, 128),
}
