"""cream_kernels stands alone: it works with every library blocked that it may not need, and inside another package."""

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "kernels" / "cream_kernels"
USE = """
import torch
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
targets = torch.tensor([1, ck.IGNORE, 3, 8, 0, 5])
ck.linear_logp(hidden, weight, targets).sum().backward()
ck.gather_logp(hidden @ weight.T, targets).sum().backward()
loss, logp = ck.linear_weighted_dpo(
    hidden, weight, targets, torch.tensor([0, 3, 6]), torch.zeros(2), torch.ones(1), beta=0.1
)
assert torch.equal(loss.detach(), ck.weighted_dpo(0.1 * (logp[:1] - logp[1:]), 1.0))
assert ck.kendall_tau(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [1.0]
assert ck.top_p_sample(torch.zeros(1, 9), torch.tensor([0.5]).double(), temperature=1.0, top_p=1.0).tolist() == [4]
"""


def run(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_works_with_the_others_blocked(tmp_path):
    block = "import sys\nfor name in ('transformers', 'datasets', 'numba', 'triton', 'scipy', 'cream'):\n"
    run(block + f"    sys.modules[name] = None\nsys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "import cream_kernels as ck\n" + USE, tmp_path)  # fmt: skip


def test_imports_nothing_heavy_by_itself(tmp_path):
    check = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        f"sys.path.insert(0, {str(PACKAGE.parent)!r})\nimport cream_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'datasets', 'numba', 'triton', 'scipy', 'cream'}, new\n"
    )
    run(check, tmp_path)


def test_a_vendored_copy_and_the_package_live_together(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "other" / "kept_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "other" / "__init__.py").touch()
    both = f"import sys\nsys.path.insert(0, {str(PACKAGE.parent)!r})\nimport cream_kernels as ck\n" + USE
    run(both + "import other.kept_kernels as ck\n" + USE, tmp_path)


def test_kernels_is_a_plain_folder():
    assert not (PACKAGE.parent / "__init__.py").exists()  # it would hide the PyPI package that transformers imports
