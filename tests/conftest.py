"""What several tests share: a tiny tokenizer and random Llama models on disk, and a stand-in for a stage's Work."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compare on the CPU, and the trainer takes a GPU where there is one. What is for a card is in tests/triton_*.py,
# and in cases elsewhere that skip without one: CREAM_GPU=1 runs these.
if os.environ.get("CREAM_GPU") != "1" and not any("triton_" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_configure(config):
    config.addinivalue_line("markers", "first: starts processes that take minutes, and so should run beside the others")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def nan_in_fresh_memory():
    """What torch.empty and its kind give is full of nan, as memory that others have used may be."""
    torch.use_deterministic_algorithms(True)  # fills it: torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Processor:
    """The native library, but that some of its questions to the processor have other answers."""

    def __init__(self, **answers):
        from cream_kernels import native

        self.library, self.answers = native.load(), answers
        if self.library is None:
            pytest.skip(f"no native library: {native.why_not()}")

    def __getattr__(self, name):
        return (lambda *_: self.answers[name]) if name in self.answers else getattr(self.library, name)


@pytest.fixture(params=["native", "AVX512-BF16", "AVX2", "torch", "torch without bfloat16"])
def library(request, monkeypatch):
    """With the C++ library, where there is one, on this CPU, as on one where all bfloat16 products are AVX512-BF16's,
    and as on one that has no AVX-512; without it, as on CPUs that multiply bfloat16 and that do not."""
    from cream_kernels import linear_logp_native, native, products

    if request.param == "AVX512-BF16":
        if Processor().cream_bf16_isa() == 0:
            pytest.skip("this processor has no AVX512-BF16")
        processor = Processor(cream_bf16_isa=1, cream_bf16_across_serves=1)
        monkeypatch.setattr(native, "load", lambda: processor)
        monkeypatch.setattr(linear_logp_native, "SHORT_SUM", 1)
    if request.param == "AVX2":
        processor = Processor(cream_bf16_isa=0, cream_multiply_isa=1)
        if processor.cream_top_p_isa() == 0:
            pytest.skip("this processor has no AVX2")
        monkeypatch.setattr(native, "load", lambda: processor)
        monkeypatch.setattr(linear_logp_native, "FEW_ROWS", 1)
    if request.param.startswith("torch"):
        monkeypatch.setattr(native, "_decide", lambda: (None, "left out"))
    if request.param != "native":
        monkeypatch.setattr(products, "_cpu_multiplies_bfloat16", lambda: request.param in ("torch", "AVX512-BF16"))


@pytest.fixture(scope="session")
def tokenizer():
    """Every byte is a token, plus ChatML's three; pad and end of text are the same token, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + letters)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def tiny_config(tokenizer, **changes):
    from transformers import LlamaConfig

    shape = dict(
        vocab_size=len(tokenizer) + 5,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,
    )
    return LlamaConfig(**(shape | changes))


def write_model(directory: Path, tokenizer, seed: int, **changes) -> Path:
    """A random two-layer Llama as a Hugging Face directory."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(tokenizer, **changes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), tokenizer, seed=0)


@pytest.fixture(scope="session")
def other(tokenizer, tmp_path_factory) -> Path:
    """The same architecture with other weights."""
    return write_model(tmp_path_factory.mktemp("other"), tokenizer, seed=1)


@pytest.fixture
def loaded(tiny):
    """The tiny model in float32 with the attention that runs here."""
    from cream.config import ModelConfig
    from cream.model import load

    return load(tiny, ModelConfig(path=str(tiny), dtype="float32"))


@pytest.fixture
def work(tmp_path):
    """A Work outside any run: parts, keeps and outputs under the test's own directory."""
    from cream.work import Work

    class AnyWork(Work):
        def __init__(self):
            super().__init__(tmp_path / "work", ())

        def path(self, output: str) -> Path:
            path = tmp_path / "work/out" / output
            path.parent.mkdir(parents=True, exist_ok=True)
            return path

    return AnyWork()
