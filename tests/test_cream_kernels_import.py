"""cream_kernels stands alone: it works with every library blocked that it may not need, and inside another package."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "kernels" / "cream_kernels"
NOT_NEEDED = ("transformers", "datasets", "numba", "triton", "scipy", "trl", "peft", "kernels", "cream")
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


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_with_the_others_blocked(tmp_path):
    block = f"import sys\nfor name in {NOT_NEEDED}:\n"
    run(block + f"    sys.modules[name] = None\nsys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "import cream_kernels as ck\n" + USE, tmp_path)  # fmt: skip


def test_imports_nothing_heavy_by_itself(tmp_path):
    check = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        f"sys.path.insert(0, {str(PACKAGE.parent)!r})\nimport cream_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        f"assert not new & set({NOT_NEEDED}), new\n"
    )
    run(check, tmp_path)


def test_import_takes_no_time_beside_torchs(tmp_path):
    """The least of three, since a busy machine makes any one of them slow."""
    clock = (
        f"import sys, time, torch\nsys.path.insert(0, {str(PACKAGE.parent)!r})\nstart = time.perf_counter()\n"
        "import cream_kernels\nprint(time.perf_counter() - start)\n"
    )
    assert any(float(run(clock, tmp_path)) < 0.3 for _ in range(3))


def test_only_adapters_import_other_libraries_and_nothing_imports_adapters():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            assert path.parent.name == "adapters" or not {"trl", "peft"} & {name.split(".")[0] for name in names}, where
            assert not [name for name in names if "adapters" in name.split(".")], where


def test_a_vendored_copy_and_the_package_live_together(tmp_path):
    """The folder copied into another package: each has its own operators, and they give the same."""
    copy = tmp_path / "otherpkg" / "vendored" / "cream_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (copy.parent, copy.parent.parent):
        (folder / "__init__.py").touch()
    both = f"import sys\nsys.path.insert(0, {str(PACKAGE.parent)!r})\nimport cream_kernels as ck\n" + USE
    run(
        both + "installed = ck\nimport otherpkg.vendored.cream_kernels as ck\n" + USE + "assert ck is not installed\n"
        "assert torch.equal(ck.linear_logp(hidden, weight, targets), installed.linear_logp(hidden, weight, targets))\n"
        "theirs, ours = torch.ops.cream_kernels, torch.ops.otherpkg_vendored_cream_kernels\n"
        "assert theirs.linear_logp is not ours.linear_logp\n",
        tmp_path,
    )


def test_kernels_is_a_plain_folder():
    assert not (PACKAGE.parent / "__init__.py").exists()  # it would hide the PyPI package that transformers imports
