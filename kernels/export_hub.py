"""cream_kernels as a repository of Hugging Face `kernels`: python kernels/export_hub.py FOLDER

Makes FOLDER/build/torch-cpu and torch-cuda (the same Python twice, the loader picks one), each with metadata.json.
`kernels.get_local_kernel(Path("FOLDER"))` loads it without a network; uploaded, `kernels.get_kernel` would. Left out
are the adapters, which import other libraries, and the native library, which belongs to one platform.
"""

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "cream_kernels"
BACKENDS = ("cpu", "cuda")
# What may be there when the hub's loader imports us. numpy is not on its list, but comes wherever torch is of use.
ALLOWED = {*sys.stdlib_module_names, "torch", "triton", "numpy"}


def foreign_imports(path: Path) -> list[str]:
    """file:line and module of each import that runs as the module is imported and is neither relative nor allowed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in inside:
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and id(node) not in inside:
            modules = [node.module]
        else:
            continue
        found += [f"{path.name}:{node.lineno} {name}" for name in modules if name.split(".")[0] not in ALLOWED]
    return found


def export(folder: Path) -> list[Path]:
    """Write the variants, each anew, and return where they are."""
    sources = sorted(PACKAGE.glob("*.py"))
    foreign = [line for path in sources for line in foreign_imports(path)]
    if foreign:
        raise ValueError(f"the hub loads only relative imports, the standard library, torch and triton: {foreign}")
    variants = []
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        variant.mkdir(parents=True)
        digests = {}
        for path in sources:
            content = path.read_bytes()
            (variant / path.name).write_bytes(content)
            digests[path.name] = base64.b64encode(hashlib.sha256(content).digest()).decode()
        whole = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]
        metadata = {
            "name": "cream-kernels",
            # The module's name in sys.modules, and so the namespace of its operators: another for other content.
            "id": f"_cream_kernels_{backend}_{whole}",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put build/")
    for variant in export(parser.parse_args().folder):
        print(variant)


if __name__ == "__main__":
    main()
