"""The exported repository is one that Hugging Face `kernels` loads, offline, beside the installed package."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cream_kernels

SCRIPT = Path(__file__).resolve().parents[1] / "kernels" / "export_hub.py"


@pytest.fixture(scope="module")
def export_hub():
    spec = importlib.util.spec_from_file_location("export_hub", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path) -> Path:
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "hub")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "hub/build" / name) for name in ("torch-cpu", "torch-cuda")]
    return tmp_path / "hub"


def test_hub_loader_runs_the_operators(repository):
    kernels = pytest.importorskip("kernels", reason="kernels is not installed")
    ours = kernels.get_local_kernel(repository)
    assert Path(ours.__file__).parent.parent == repository / "build"
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (7,), generator=generator)
    results = []
    for package in (ours, cream_kernels):  # two copies in one process, each with its own operators
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp = package.linear_logp(h, w, targets)
        loss = package.weighted_dpo(logp[:3] - logp[3:6], torch.tensor([1.0, 0.5, 0.2])).sum()
        (loss + package.gather_logp(h @ w.T, targets).sum()).backward()
        results.append((logp.detach(), h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the export leaves the native library out
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    assert ours.kendall_tau(*rewards).tolist() == cream_kernels.kendall_tau(*rewards).tolist()
    namespaces = {package.__name__ for package in (ours, cream_kernels)}
    assert len(namespaces) == 2 and all(hasattr(torch.ops, name) for name in namespaces)
    assert torch.ops.cream_kernels.linear_logp is not getattr(torch.ops, ours.__name__).linear_logp


def test_metadata_has_what_the_loader_checks(repository):
    rust = pytest.importorskip("kernels._rust", reason="kernels is not installed")
    ids = set()
    for variant in (repository / "build").iterdir():
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, variant))
        ids.add(metadata.id)
        (variant / "reference.py").write_text("IGNORE = 0\n")
        with pytest.raises(rust.DigestValidationError):
            metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, variant))
    assert len(ids) == 2


def test_loads_where_only_torch_is(repository):
    """As the hub's loader does it, with everything else that we might have used blocked."""
    (variant,) = (repository / "build").glob("torch-cpu")
    name = json.loads((variant / "metadata.json").read_text())["id"]
    code = f"""
import importlib.util, sys
for blocked in ('transformers', 'datasets', 'numba', 'triton', 'scipy', 'trl', 'cream', 'cream_kernels'):
    sys.modules[blocked] = None
spec = importlib.util.spec_from_file_location({name!r}, {str(variant / "__init__.py")!r})
module = sys.modules[{name!r}] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert set(module.__all__) <= set(dir(module))
"""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refuses_to_export_what_the_hub_would_refuse(export_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(export_hub, "PACKAGE", tmp_path)
    (tmp_path / "__init__.py").write_text(
        "import torch\ndef f():\n    import numba\nif True:\n    from scipy import stats\n"
    )
    with pytest.raises(ValueError, match=r"__init__.py:5 scipy"):
        export_hub.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_replaces_what_was_there(export_hub, tmp_path):
    stale = tmp_path / "build" / "torch-cpu" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    export_hub.export(tmp_path)
    assert not stale.exists() and stale.with_name("__init__.py").exists()
