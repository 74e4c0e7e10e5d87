"""A module imports from lower floors only (or its own), and entries are imported by train alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    3: {"train", "sft", "evaluate", "report", "doctor"},
    2: {"sample", "score", "consistency", "dpo"},
    1: {"model", "lora", "packing", "meter", "data", "chat", "rows", "tasks", "checkpoint", "shards", "adamw", "optim"}
    | {"run", "work", "decode", "plan", "summary", "plots", "vllm"},
    0: {"config", "recipes", "log", "dist", "attention", "cache", "upload", "fuse", "__init__"},
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}


def imported(path: Path) -> set[str]:
    """The first name below `cream` of everything that the file imports from it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cream":
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cream.")}
    return names - {"__version__"}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "cream").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted((ROOT / "cream").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    name = room(path)
    assert name in FLOOR, f"{name} stands on no floor: add it to FLOORS here"
    for other in imported(path) - {name}:
        assert FLOOR[other] <= FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"
        if FLOOR[other] == 3:
            assert name == "train" or other == "train", f"{name} imports the entry {other}; only train calls entries"


def test_there_is_no_circle():
    graph = {}
    for path in (ROOT / "cream").rglob("*.py"):
        entries = FLOORS[3]
        graph.setdefault(room(path), set()).update(n for n in imported(path) if room(path) not in entries)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph.get(name, set()) - {name}:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", sorted((ROOT / "kernels/cream_kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_of_cream(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            top = (node.module or "").split(".")[0]
        elif isinstance(node, ast.Import):
            top = node.names[0].name.split(".")[0]
        else:
            continue
        assert top not in ("cream", "transformers", "datasets", "bench"), f"{path.name}:{node.lineno} imports {top}"


def test_tests_are_flat():
    assert not (ROOT / "tests" / "cream").exists()  # it would hide the installed package
    assert [p for p in (ROOT / "tests").rglob("*.py") if p.parent != ROOT / "tests"] == []
