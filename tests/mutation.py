"""Faults put into the kernels and their autograd one at a time, each of which the suite must notice. Run by hand:

    python tests/mutation.py                    all of them
    python tests/mutation.py --only 3,17-20     some
    python tests/mutation.py --list             what they are

The faults stand in mutation.txt. Each goes into a fresh copy of the packages and tests, the native library built anew
where the fault is in C++. First the same tests must pass without it. One line a fault: killed, and by which test, or
SURVIVED. Exit code 1 where one survived, no longer applies, or broke more than a test could notice (an import, say).
Without AVX512-BF16 or AVX2 the tests of what needs them skip, and faults there are "not tested here".

Not here, since no processor shows it: without the tl.debug_barrier() of gather_logp_triton.gradient_kernel threads
would overwrite logits that others still have to read; the interpreter runs a program's threads as one, so only
test_gather_logp[inplace] and test_gradients in triton_bodies.py on a card can tell.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".txt")
COPIED = ("kernels", "tests", "setup.py", "CMakeLists.txt", "pyproject.toml")
SECONDS = 600  # of one run of tests


class Fault(NamedTuple):
    file: str
    breaks: str  # what is wrong then
    old: str  # stands once in file
    new: str
    tests: str  # "file: expression for pytest's -k"


def faults() -> list[Fault]:
    """The table in its order: under `@ file`, of each fault its `# sentence`, `- text`, `+ text` and `> tests`.

    Where a fault has no tests of its own, those of the fault before it are meant. Texts may have several lines.
    """
    found: list[Fault] = []
    file, fields = "", {}
    for line in [*TABLE.read_text("utf-8").splitlines(), "#"]:
        mark, text = line[:1], line[2:]
        if mark in ("#", "@") and "#" in fields:
            tests = fields.get(">") or found[-1].tests
            found.append(Fault(file, fields["#"], fields["-"], fields["+"], tests))
            fields = {}
        if mark == "@":
            file = text
        elif mark:
            fields[mark] = f"{fields[mark]}\n{text}" if mark in fields else text
    return found


def make_copy(directory: Path, source: Path) -> None:
    """What the tests need of source, without caches: a fault of the same size and second would go unread."""
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in COPIED:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, directory / name, ignore=ignored)
        else:
            shutil.copyfile(path, directory / name)


def build(directory: Path) -> str:
    """Make the native library; what setup.py says where it cannot, and nothing where it can."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip() if "building without" in done.stdout else ""


IN_THE_COPY = """
import pathlib, sys, pytest, cream_kernels
if not pathlib.Path(cream_kernels.__file__).is_relative_to(sys.argv[1]):
    sys.exit(f"tests another cream_kernels: {cream_kernels.__file__}")
sys.exit(100 + pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
PASSED, FAILED = 100, 101


def run_tests(directory: Path, file: str, expression: str) -> tuple[int, str]:
    """Exit code (100 + pytest's; below 0 the signal that ended it) and what was said."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    known |= {"PYTHONPATH": f"{directory}:{directory / 'kernels'}", "OMP_NUM_THREADS": "1"}
    known |= {"PYTHONDONTWRITEBYTECODE": "1"}
    if file.startswith("triton_"):
        known["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_COPY, str(directory), f"tests/{file}", "-k", expression],
        cwd=directory,
        env=known,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    return done.returncode, done.stdout


def try_fault(fault: Fault, unchanged: Path) -> str:
    """What came of it: "killed ...", "not tested here ..." or what is wrong."""
    file, expression = fault.tests.split(": ")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        make_copy(directory, unchanged)
        path = directory / fault.file
        text = path.read_text("utf-8")
        if text.count(fault.old) != 1:
            return f"NO LONGER APPLIES: its text stands there {text.count(fault.old)} times"
        path.write_text(text.replace(fault.old, fault.new), "utf-8")
        if "csrc" in path.parts and (reason := build(directory)):
            return f"DOES NOT BUILD: {reason}"
        code, said = run_tests(directory, file, expression)
    if code < 0:
        return f"killed by signal {-code} in {file}"
    if code == FAILED:
        return f"killed by {re.search(r'^(?:FAILED|ERROR) tests/(.+?)(?: - |$)', said, re.MULTILINE)[1]}"
    if code == PASSED:
        if " passed" in said.splitlines()[-1]:
            return f"SURVIVED {fault.tests}"
        return f"not tested here: {said.splitlines()[-2]}"
    return f"BROKE MORE (exit code {code}): {said[-2000:]}"


def chosen(text: str, count: int) -> list[int]:
    """Numbers from 1 on: "3,17-20" -> [3, 17, 18, 19, 20]."""
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    if not all(1 <= number <= count for number in numbers):
        raise ValueError(f"faults are numbered 1 to {count}, not {text}")
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="numbers, as 3,17-20")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    arguments = parser.parse_args()
    table = faults()
    numbers = chosen(arguments.only, len(table)) if arguments.only else list(range(1, len(table) + 1))
    if arguments.list:
        for number in numbers:
            print(f"{number:3d} {Path(table[number - 1].file).name}: {table[number - 1].breaks}")
        return 0
    began, killed, untested = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        unchanged = Path(name).resolve()
        make_copy(unchanged, ROOT)
        if reason := build(unchanged):
            print(reason)
            return 1
        wanted: dict[str, set[str]] = {}
        for number in numbers:
            file, expression = table[number - 1].tests.split(": ")
            wanted.setdefault(file, set()).add(expression)
        for file, expressions in wanted.items():
            code, said = run_tests(unchanged, file, " or ".join(f"({choice})" for choice in sorted(expressions)))
            if code != PASSED:
                print(said, f"\n{file} does not pass without a fault", sep="")
                return 1
        print(f"no fault: passed by {', '.join(wanted)}", flush=True)
        for number in numbers:
            fault = table[number - 1]
            try:
                what = try_fault(fault, unchanged)
            except subprocess.TimeoutExpired:
                what = f"SURVIVED {fault.tests}, which hung for {SECONDS} s"
            killed += what.startswith("killed")
            untested += what.startswith("not tested here")
            print(f"{number:3d} {Path(fault.file).name}: {fault.breaks}: {what}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{killed} of {len(numbers)} killed, {untested} not tested here, in {minutes:.0f} minutes")
    return 0 if killed + untested == len(numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
