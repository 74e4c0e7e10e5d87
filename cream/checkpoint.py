"""Files that survive a kill or a power cut: written beside, fsynced, hashed, renamed, and checked when they are read.

A name always stands for a whole version of a file or a tree, the previous one or the new one. Only between the two
renames of `replace_path` does it stand for none, and `recover` then puts the previous one back. Hashes are SHA-256 in
hex; they find damage, and someone who can rewrite a manifest can fool them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cream.log import UserError, say

KEEP = 2  # step checkpoints: the newest, and the one to fall back to
FORMATS = {"whole": 1, "shards": 2}  # of step checkpoints; a reader refuses the ones it does not know
TENSORS, META, MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"
SHARDS = "shard-*.safetensors"  # where several ranks wrote one, each its own
BLOCK = 1 << 20  # bytes hashed at a time
SETTLED_NS = 2_000_000_000  # the coarsest clock of a common file system (FAT, NFS) ticks every 2 s
USER_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

_digests: dict[tuple[int, int, int, int], str] = {}  # (device, inode, size, mtime_ns) -> SHA-256, for this process


# Writing


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a UserError that names `path`, in one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' Rust errors carry the number as text only
        code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if code not in USER_ERRORS:
            raise
        named = getattr(error, "filename", None)
        detail = f" ({named})" if named and str(named) != str(path) else ""
        raise UserError(
            f"{path}: {os.strerror(code)}{detail}; what is complete stays so: put that right, start again with --resume"
        ) from error


def fsync(path: Path | str) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
    fsync(path)


def fsync_tree(path: Path | str) -> None:
    """fsync a file, or a directory with all that is in it, the inner ones first."""
    if os.path.isdir(path):
        for folder, _, names in os.walk(path, topdown=False):
            for name in names:
                fsync(os.path.join(folder, name))
            fsync(folder)
    else:
        fsync(path)


def make_directory(path: Path) -> None:
    """mkdir -p whose new names are durable."""
    if not path.is_dir():
        make_directory(path.parent)
        try:
            os.mkdir(path)
        except FileExistsError:  # another process was quicker
            if not path.is_dir():
                raise
        fsync(path.parent)


def write_atomic(
    path: Path | str,
    content: bytes | Callable[[Path], object],  # the bytes, or a function that writes them to the path it is given
) -> None:
    """Write a file so that a reader, also one after a crash, finds the previous bytes or the new ones, never a mix.

    UserError where the disk is full; the previous file is then untouched.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            if callable(content):
                content(beside)
                fsync(beside)
            else:
                _write(beside, content)
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a tree, if it is there; a link goes, what it points at stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def recover(final: Path | str) -> None:
    """Finish or undo a `replace_path` that was killed half-way."""
    final, old = Path(final), _aside(Path(final))
    if os.path.lexists(old):
        if os.path.lexists(final):
            remove(old)
        else:
            os.replace(old, final)
            fsync(final.parent)


def replace_path(new: Path | str, final: Path | str) -> None:
    """Give the durable file or directory `new` the name `final`, durably; what had that name goes once it has lost it.

    A directory cannot be renamed over another, so the old one steps aside first: see `recover`. Same file system only.
    """
    new, final = Path(new), Path(final)
    old = _aside(final)
    with disk_errors(final):
        recover(final)
        if os.path.lexists(final) and (new.is_dir() or final.is_dir()):
            os.replace(final, old)
            try:
                os.replace(new, final)
            except OSError:
                os.replace(old, final)
                raise
            fsync(final.parent)
            remove(old)
        else:
            os.replace(new, final)
            fsync(final.parent)


# Hashing


def _sha256(path: Path | str) -> tuple[str, os.stat_result, bool]:
    """SHA-256, the file's status, and whether it had come to rest.

    It has not where a write after our read could fall into the clock tick of the last one, and so leave mtime as it is.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
    start = time.time_ns()
    with open(path, "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise UserError(f"{path}: neither a file nor a directory")
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        after = os.fstat(file.fileno())
    still = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return digest.hexdigest(), after, still and start - after.st_mtime_ns > SETTLED_NS


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file, as sha256sum prints it.

    Remembered for this process by device, inode, size and mtime, so that a model of 14 GB is read once.
    """
    status = os.stat(path)
    known = _digests.get((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    if known is None:
        known, status, settled = _sha256(path)
        if settled:
            _digests[status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns] = known
    return known


def hash_files(directory: Path | str) -> dict[str, str]:
    """{relative name: SHA-256} of every file under a directory, sorted; links to files count as the files.

    UserError for a link to a directory (a walk would pass over its contents) and for what is no file (pipes, sockets).
    """
    directory, names = Path(directory), []
    for folder, folders, files in os.walk(directory):
        for path in (os.path.join(folder, name) for name in folders):
            if os.path.islink(path):
                raise UserError(f"{path}: a link to a directory cannot be hashed; put a copy in its place")
        names += [Path(folder, name).relative_to(directory).as_posix() for name in files]
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: neither a file nor a directory")
    names.sort()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter lock
        return dict(zip(names, pool.map(hash_file, [directory / name for name in names]), strict=True))


def hash_names(files: Mapping[str, str]) -> str:
    """One hash for what `hash_files` returns: of names and contents, not dates, modes or its own name."""
    text = "".join(f"{digest}  {name}\0" for name, digest in files.items())
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def hash_tree(path: Path | str) -> str:
    """SHA-256 of a file's contents, or of the names and contents of all files under a directory."""
    return hash_names(hash_files(path)) if os.path.isdir(path) else hash_file(path)


# Step checkpoints


def _steps(directory: Path) -> list[int]:
    names = [re.fullmatch(r"step-(\d{6,})", path.name) for path in directory.iterdir() if path.is_dir()]
    return sorted(int(name[1]) for name in names if name)


def _place(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def _manifest(directory: Path, step: int) -> dict:
    shards = sorted(path.name for path in directory.glob(SHARDS))
    names = [META, *(shards or [TENSORS])]
    with ThreadPoolExecutor(min(8, len(names))) as pool:
        found = pool.map(_sha256, [directory / name for name in names])
        files = {n: {"bytes": s.st_size, "sha256": digest} for n, (digest, s, _) in zip(names, found, strict=True)}
    return {"format": FORMATS["shards" if shards else "whole"], "step": step, "files": files}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _damage(directory: Path, step: int) -> str | None:
    """What is wrong with a step checkpoint, naming the file, or None."""
    try:
        found = _manifest(directory, step)
        text = (directory / MANIFEST).read_bytes()
    except OSError as error:
        return f"{error.filename or directory}: {error.strerror}"
    if text == _json(found):
        return None
    try:
        recorded = json.loads(text)
        if text == _json(recorded) and recorded["format"] not in FORMATS.values():
            return f"{directory / MANIFEST}: format {recorded['format']} is not known here"
        for name in recorded["files"]:
            if name not in found["files"]:
                return f"{directory / name}: missing"
            if recorded["files"][name] != found["files"][name]:
                return f"{directory / name}: not as it was written (its SHA-256 differs)"
    except (ValueError, TypeError, KeyError):
        pass
    return f"{directory / MANIFEST}: not as it was written"


def save_step(
    directory: Path | str,  # holds the step-000012 directories of one training
    step: int,
    tensors: Mapping[str, Tensor],  # any shapes, dtypes and devices; ties are kept
    meta: Mapping[str, Any],  # what JSON can hold
) -> Path:
    """Save a training state as the checkpoint of `step`, and keep it and the one before it."""
    with fresh_step(directory, step) as beside:
        plain, aliases = _untie(tensors)
        save_file(plain, beside / TENSORS)
        fsync(beside / TENSORS)
        write_meta(beside, meta, aliases)
    return _place(Path(directory), step)


@contextlib.contextmanager
def fresh_step(directory: Path | str, step: int) -> Iterator[Path]:
    """An empty directory beside, for the durable files of a step checkpoint, which is complete when the block ends.

    A fresh directory, its files, fsync, a manifest of their hashes, fsync, rename, fsync of the parent. Checkpoints of
    later steps go as well: whoever saves an earlier one did not go on from them. UserError where the disk is full; the
    previous checkpoints are then untouched.
    """
    directory = Path(directory)
    final, beside = _place(directory, step), directory / f"step-{step:06d}.tmp"
    with disk_errors(final):
        make_directory(directory)
        for left in directory.glob("step-*.tmp"):
            remove(left)
        try:
            os.mkdir(beside)
            yield beside
            _write(beside / MANIFEST, _json(_manifest(beside, step)))
            fsync(beside)
            replace_path(beside, final)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(beside)
            raise
        earlier = [other for other in _steps(directory) if other < step]
        for other in set(_steps(directory)) - {step, *earlier[1 - KEEP :]}:
            gone = directory / f"step-{other:06d}.tmp"  # renamed first: a half-deleted one must not look damaged
            os.replace(_place(directory, other), gone)
            remove(gone)


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them, and {name: other name} for ties."""
    plain: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in first:
            aliases[name] = first[identity]
            continue
        first[identity] = name
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return plain, aliases


def newest_step(directory: Path | str) -> Path | None:
    """The directory of the newest whole checkpoint, or None where there is none.

    A damaged one is reported by the name of the damaged file, and the one before it used.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    for left in directory.glob(".step-*.old"):
        recover(left.with_name(left.name[1 : -len(".old")]))
    for step in reversed(_steps(directory)):
        place = _place(directory, step)
        damage = _damage(place, step)
        if not damage:
            return place
        say(f"{damage}; checkpoint {place.name} is passed over")
    return None


def load_latest(directory: Path | str) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """(step, tensors on the CPU, meta) of the newest whole checkpoint, or None where there is none.

    For one that save_step wrote: cream/shards.py reads those of several ranks.
    """
    place = newest_step(directory)
    return None if place is None else (step_of(place), *read_step(place))


def read_step(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, meta) of a whole checkpoint."""
    tensors: dict[str, Tensor] = load_file(place / TENSORS)
    record = read_meta(place)
    tensors.update({name: tensors[other] for name, other in record["aliases"].items()})
    return tensors, record["meta"]


def read_meta(place: Path) -> dict[str, Any]:
    """{"aliases": {name: the other name of the same tensor}, "meta": what was saved with it}."""
    return json.loads((place / META).read_bytes())


def write_meta(place: Path, meta: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
    _write(place / META, _json({"aliases": dict(aliases), "meta": dict(meta)}))


def step_of(place: Path) -> int:
    return int(place.name.removeprefix("step-"))
