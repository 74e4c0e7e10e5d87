"""cream-trainer: the packages `cream` and `cream_kernels`, and the native library that the second one may load.

The build downloads nothing and does not need torch: libcream_native.so is plain C++ behind `extern "C"`, loaded by
ctypes. Where cmake or a C++ compiler is missing, one line says so and the packages work without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libcream_native.so"  # the same name on every system; ctypes does not mind
LIBRARY_SOURCES = ["CMakeLists.txt", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("kernels/csrc/*"))]


class BuildNative(build_ext):
    """Run cmake, put libcream_native.so into cream_kernels; say in one line why not, and go on."""

    def run(self) -> None:
        reason = self._build(self._target())
        if reason:
            print(f"cream: building without {LIBRARY} ({reason}); the torch paths serve instead")

    def _target(self) -> Path:
        if self.editable_mode or self.inplace:
            return ROOT / "kernels" / "cream_kernels" / LIBRARY
        return Path(self.build_lib).resolve() / "cream_kernels" / LIBRARY

    def _build(self, target: Path) -> str | None:
        """Build into target; return the reason where that cannot be done."""
        if not shutil.which("cmake"):
            return "no cmake"
        compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            return f"no C++ compiler: {', '.join(compilers)}"
        # A fresh folder each time: a CMakeCache.txt is worthless once the checkout has moved, and this takes seconds.
        with tempfile.TemporaryDirectory() as build:
            out = Path(build, "out")
            for step in (
                ["cmake", "-S", str(ROOT), "-B", build, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}"],
                ["cmake", "--build", build, "--config", "Release"],
            ):
                done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if done.returncode:
                    errors = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower()]
                    return f"`{' '.join(step[:2])}` failed: {errors[0] if errors else 'no message'}"
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".new")
            shutil.copyfile(out / LIBRARY, fresh)
            fresh.replace(target)  # a rename, so that a process that has the old library mapped keeps it
        return None

    def get_outputs(self) -> list[str]:
        return [str(self._target())] if self._target().exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return LIBRARY_SOURCES


class PlatformWheel(bdist_wheel):
    """The library belongs to a platform but to no Python version: py3-none-PLATFORM."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    """Has something to compile, although nothing that Python would call an extension module."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    name="cream-trainer",
    version="0.1.0",
    description="CREAM: consistency regularized self-rewarding training of language models, and its kernels",
    long_description=(ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["cream", "cream.*"]), *find_packages("kernels")],
    package_dir={"cream": "cream", "cream_kernels": "kernels/cream_kernels"},
    package_data={"cream": ["*.j2", "recipes/*.yaml"], "cream.tasks": ["*.jsonl"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.10.1,<6",
        "accelerate>=1.1",  # transformers wants it for GGUF files
        "gguf>=0.13",
        "datasets>=4.7",
        "numba>=0.65",
        "numpy>=2.0",
        "safetensors>=0.6.2",
        "tokenizers>=0.22",
        "huggingface-hub>=1.3",
        "pyarrow>=21",
        "jsonargparse>=4.43",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "tabulate>=0.9",
        "psutil>=5.9",
    ],
    extras_require={
        # flash-attn has no wheel: it needs nvcc and an installed CUDA torch, pip install --no-build-isolation
        "flash": ["flash-attn>=2.7"],
        "xformers": ["xformers>=0.0.35"],
        "trl": ["trl>=1.15"],
        "peft": ["peft>=0.19"],
        "vllm": ["vllm>=0.22"],  # pins its own torch: give it an environment of its own
        "hub": ["kernels>=0.17"],  # Hugging Face's loader; kernels/export_hub.py makes what it loads
        "bench": [
            "trl>=1.15; python_version >= '3.11'",
            "liger-kernel>=0.8.2",
            "cut-cross-entropy>=25.1",
            "scipy>=1.13",
            "torchmetrics>=1.4",
            "hyper-corr>=0.2",
        ],
        "bench-gpu": ["quack-kernels>=0.6", "liger-kernel[cutedsl]>=0.8.2"],  # these need CUDA to be of use
        # The tests of what is optional skip without it; these are there so that they do not. A CUDA torch brings its
        # own triton, a CPU torch none, and liger-kernel and cut-cross-entropy do not import without one.
        "dev": [
            "pytest>=8",
            "hypothesis>=6.100",
            "scipy>=1.13",
            "ruff>=0.9",
            "setuptools>=77",
            "trl>=1.15; python_version >= '3.11'",
            "peft>=0.19",
            "kernels>=0.17",
            "torchmetrics>=1.4",
            "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "liger-kernel>=0.8.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "cut-cross-entropy>=25.1; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    distclass=NativeDistribution,
)
