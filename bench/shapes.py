"""LM heads of real models and how many tokens reach them.

Token counts: 512 is 8 answers of 64 tokens, what the smoke recipe trains on at once; 2048 is a micro-batch of 4 pairs
of 256-token answers; 8192 is what one 80 GB card takes of a 7B model.
"""

from __future__ import annotations

from typing import NamedTuple


class Head(NamedTuple):
    hidden: int  # D
    vocabulary: int  # V


HEADS = {
    "tiny": Head(32, 257),  # no model: for tests
    "SmolLM2-135M": Head(576, 49152),
    "LLaMA-2-7B": Head(4096, 32000),
    "LLaMA-3-8B": Head(4096, 128256),
    "Qwen2.5-7B": Head(3584, 152064),
}

# size -> (model, N); "cpu" is what is measured on a CPU where no size is asked for, "full" is for a GPU, where the time
# may end before the last
HEAD_SIZES = {
    "tiny": [("tiny", 48)],
    "small": [("SmolLM2-135M", 128)],
    "cpu": [(model, N) for model in ("SmolLM2-135M", "LLaMA-2-7B") for N in (512, 2048)],
    "full": [
        *((model, N) for N in (8192, 2048) for model in ("LLaMA-2-7B", "LLaMA-3-8B")),
        ("Qwen2.5-7B", 8192),
    ],
}

# size -> (P, R) for Kendall's tau: a round of the method, a large round, and long rankings
RANKING_SIZES = {
    "tiny": [(64, 5), (4, 600)],
    "small": [(20000, 5), (1000, 64), (16, 4096)],
    "cpu": [(20000, 5), (100000, 8), (1000, 64), (64, 4096), (4, 65536)],
}
RANKING_SIZES["full"] = RANKING_SIZES["cpu"]
