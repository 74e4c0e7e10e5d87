"""Every python block of kernels/README.md runs as it stands, given the names that the text around it speaks of."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from cream_kernels import IGNORE, linear_logp, linear_weighted_dpo

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
TEXT = (KERNELS / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.*?)$|^```python\n(.*?)^```$", TEXT, re.M | re.S)
P, D, LENGTH = 4, 32, 6


def blocks():
    """Each block, called by its heading and its number there."""
    heading, number, found = "", 0, []
    for title, code in BLOCKS:
        if title:
            heading, number = title, 0
        else:
            number += 1
            found.append(pytest.param(code, id=f"{heading} {number}"))
    return found


def smoothed(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing):
    """What the two code bases publish: losses or their mean, and both rewards (https://ericmitchell.ai/cdpo.pdf)."""
    rewards = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
    h = rewards[0] - rewards[1]
    return -(1 - label_smoothing) * functional.logsigmoid(h) - label_smoothing * functional.logsigmoid(-h), *rewards


class TheirLoss:
    """OpenRLHF's DPOLoss as far as the block sees it."""

    beta, label_smoothing = 0.1, 0.0

    def __call__(self, *logps):
        losses, *rewards = smoothed(*logps, self.beta, self.label_smoothing)
        return losses.mean(), *rewards


@pytest.fixture
def names(tiny, tokenizer, tmp_path):
    """What the blocks take from the text: packed tensors of P pairs, a model, and what TRL needs of it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    N = 2 * P * LENGTH
    ids = torch.randint(250, (2 * P, LENGTH))
    targets = torch.cat((ids[:, 1:], torch.full((2 * P, 1), IGNORE)), dim=1).flatten()
    logps = {
        f"{of}_{which}_logps": torch.randn(P) - 20 for of in ("policy", "reference") for which in ("chosen", "rejected")
    }
    return logps | dict(
        torch=torch,
        types=types,
        linear_logp=linear_logp,
        linear_weighted_dpo=linear_weighted_dpo,
        hidden=torch.randn(N, D, requires_grad=True),
        reference_hidden=torch.randn(N, D),
        head=torch.nn.Linear(D, 300, bias=False),
        reference_head=torch.nn.Linear(D, 300, bias=False),
        targets=targets,
        cu_seqlens=torch.arange(0, N + 1, LENGTH),
        reference_logp=torch.full((2 * P,), -30.0),
        reference_margin=torch.zeros(P),
        agreement=torch.linspace(0, 1, P),
        rewards=torch.randn(P, 5),
        previous_rewards=torch.randn(P, 5),
        ids=ids,
        model=model,
        tokenizer=tokenizer,
        preference_loss=smoothed,
        loss_fn=TheirLoss(),
    )


def trl_names(tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=P,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    pairs = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " many"} for i in range(P)]
    return {"args": args, "dataset": Dataset.from_list(pairs), "DPOTrainer": DPOTrainer}


@pytest.fixture
def one_process():
    """A process group of one, for the block that shards."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("code", blocks())
def test_block_runs(code, names, tmp_path, monkeypatch, request):
    imports = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    for module, package in (("cream_kernels.adapters.trl", "trl"), ("kernels", "kernels")):
        if module in imports and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if "cream_kernels.adapters.trl" in imports:
        names |= trl_names(tmp_path)
    if "torch.distributed.fsdp" in imports:
        request.getfixturevalue("one_process")
    if "kernels" in imports:
        (line,) = re.findall(r"`python kernels/export_hub.py (\w+)`", TEXT)
        subprocess.run([sys.executable, str(KERNELS / "export_hub.py"), str(tmp_path / line)], check=True)
    if "yourpackage.vendored.cream_kernels" in imports:
        shutil.copytree(KERNELS / "cream_kernels", tmp_path / "yourpackage" / "vendored" / "cream_kernels")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(code, "kernels/README.md", "exec"), names)
    for name in ("loss", "logp", "losses", "tau"):
        if isinstance(names.get(name), torch.Tensor):
            assert torch.isfinite(names[name]).all(), name


def test_there_are_blocks():
    assert len(blocks()) == 9


def test_names_what_is_exported():
    import cream_kernels

    table = TEXT[TEXT.index("## What each costs") :]
    for name in set(cream_kernels.__all__) - {"IGNORE", "top_p_sample"}:
        assert f"| `{name}`" in table
