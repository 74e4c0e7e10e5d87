"""The ranks of a run: the processes that torchrun starts, what they tell each other, and how they end together.

    torchrun --nproc-per-node=8 -m cream.train ...

One process without torchrun is rank 0 of 1, and everything here then returns at once. Several ranks meet in a store
(torchrun's, or rank 0's): rank 0 decides, `tell`, and the others follow, `hear`; `gather` collects what each has found.
To wait there is no error, however long: ranks have unequal work. What ends a run is a rank that died or failed. Each
has a thread that gives a sign of life and watches for the next rank's; where that is missing for `timeout` seconds, or
a rank has told its error, the process ends. So every rank notices, in whatever it is: generating, waiting, reducing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from cream import log

Item = TypeVar("Item")

TIMEOUT = 60.0  # seconds, until `connect` is told another
ARRIVAL = 300.0  # seconds that a rank has to arrive after the others: importing from a network disk takes minutes
LOST = re.compile(r"gloo|NCCL|[Cc]onnection|[Bb]roken pipe|timed? ?out")  # of errors that are another rank's doing
ENDED = "a rank has ended; start again with --resume"


class _Ranks:
    """This rank's connection to the store, and the thread that watches over the others."""

    def __init__(self) -> None:
        store, self.rank, self.size = next(
            torch.distributed.rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it restarts ranks
        store = torch.distributed.PrefixStore(f"cream/{attempt}", store)
        self.store, self.timeout, self.messages = store, TIMEOUT, 0
        self.last = store.clone()  # for `end`: one that waits keeps others from using the same connection
        self.over = threading.Event()
        self.ending = threading.Lock()  # whoever has it says why this process ends, and ends it
        store.set(f"beat/{self.rank}", "0")
        self.watcher = threading.Thread(target=self._watch, args=(store.clone(),), daemon=True)
        self.watcher.start()

    def _watch(self, store: torch.distributed.Store) -> None:
        """Give signs of life and look for those of the next rank; end the process where one is due to end."""
        neighbour, seen, since, beats = (self.rank + 1) % self.size, b"", time.monotonic(), 0
        following = f"beat/{neighbour}"
        try:
            while not self.over.wait(min(2.0, self.timeout / 10)):
                store.set(f"beat/{self.rank}", str(beats := beats + 1))
                if store.check(["failed"]):
                    self.end(None, int(store.get("failed")))
                beat = store.get(following) if store.check([following]) else b""
                patience = self.timeout if beat else ARRIVAL
                if beat != seen:
                    seen, since = beat, time.monotonic()
                elif time.monotonic() - since > patience:
                    silent = f"rank {neighbour} has given no sign of life for {patience:.0f} s"
                    self.end(f"error: {silent}; start again with --resume", 1)
        except RuntimeError:  # the store went with the process that kept it
            if not self.over.is_set():
                self.end(f"error: {ENDED}", 1)

    def end(self, text: str | None, code: int) -> None:
        """End this process at once, from any thread, and all ranks with it; `text` is said by the first that has one.

        Not through the interpreter's exit: another thread may be in a collective that will never end.
        """
        self.ending.acquire()
        with contextlib.suppress(RuntimeError):  # no store, no first: everyone says it
            if text and self.last.add("says", 1) > 1:
                text = None
            if self.last.check(["failed"]):
                code = int(self.last.get("failed"))
            else:
                self.last.set("failed", str(code))
        if text:
            log.say(text, from_all=True)
        if self.rank == 0:  # which may keep the store: the others read there what has happened
            time.sleep(min(2.0, self.timeout / 10) + 0.5)
        sys.stdout.flush()
        os._exit(code)

    def close(self) -> None:
        """Part from the others when all are done; rank 0, which may keep the store, goes last."""
        gather(None)
        self.over.set()
        self.watcher.join()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self.wait([f"left/{rank}" for rank in range(self.size)])

    def wait(self, keys: list[str]) -> None:
        """Until all keys are there, as long as the ranks live."""
        while True:
            try:
                return self.store.wait(keys, timedelta(seconds=self.timeout))
            except torch.distributed.DistStoreError:
                continue


_ranks: _Ranks | None = None  # None: this process is alone


def size() -> int:
    """How many ranks there are."""
    return _ranks.size if _ranks else 1


def rank() -> int:
    return _ranks.rank if _ranks else 0


def is_main() -> bool:
    """Whether this is rank 0, which has the run's lock, writes its ledger and speaks to the user."""
    return rank() == 0


def share(items: Sequence[Item]) -> list[Item]:
    """This rank's part of the items, which are dealt out like cards: neighbours in the order are of like size."""
    return list(items[rank() :: size()])


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Be one of the ranks that the environment tells of (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or alone.

    An error in the block is said once, by the first rank that has one, and ends all ranks with its exit code: 2 for a
    UserError, 1 for any other.
    """
    global _ranks
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    _ranks = _Ranks()
    if not is_main():  # whose results on stdout are the run's
        log.only_main(f"rank {rank()}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        yield
        _ranks.close()
    except BaseException as error:
        _ranks.end(*_explained(error))


def _explained(error: BaseException) -> tuple[str | None, int]:
    """What to say of an error and the exit code."""
    if told := log.explained(error):
        return told
    if isinstance(error, SystemExit):
        return (None, error.code or 0) if isinstance(error.code, int | None) else (str(error.code), 1)
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and LOST.search(str(error))):
        return f"error: {ENDED} ({str(error).splitlines()[0][:200]})", 1
    return "".join(traceback.format_exception(error)), 1


def connect(timeout: float) -> None:
    """Let collectives between the ranks be possible; one that takes longer than `timeout` seconds fails, and so does a
    rank that gives no sign of life for as long. Nothing where this process is alone."""
    if _ranks is None:
        return
    _ranks.timeout = timeout
    cuda = torch.cuda.is_available()
    if cuda:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise log.UserError(
                f"torchrun: local rank {local} has no GPU of {gpus} here: --nproc-per-node {gpus} at most"
            )
        torch.cuda.set_device(local)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=torch.distributed.PrefixStore("collectives", _ranks.store),
        rank=_ranks.rank,
        world_size=_ranks.size,
        timeout=timedelta(seconds=timeout),
    )


def tell(value: Any) -> None:
    """Give the other ranks a JSON value, which their next `hear` returns. For rank 0; it does not wait."""
    if _ranks is not None:
        _ranks.messages += 1
        _ranks.store.set(f"told/{_ranks.messages}", json.dumps(value))


def hear() -> Any:
    """What rank 0 tells next. For the others; it waits as long as rank 0 lives."""
    assert _ranks is not None and _ranks.rank > 0
    _ranks.messages += 1
    _ranks.wait([f"told/{_ranks.messages}"])
    return json.loads(_ranks.store.get(f"told/{_ranks.messages}"))


def agree(value: Any) -> Any:
    """Rank 0's JSON value, on all ranks."""
    if not is_main():
        return hear()
    tell(value)
    return value


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """A block that rank 0 has left before the others enter it: what one must fetch, the others find."""
    if not is_main():
        hear()
    yield
    if is_main():
        tell(None)


def gather(value: Any) -> list[Any]:
    """Every rank's JSON value, in the order of the ranks, on all ranks: no rank goes on before all have come here."""
    if _ranks is None:
        return [value]
    _ranks.messages += 1
    keys = [f"gathered/{_ranks.messages}/{rank}" for rank in range(_ranks.size)]
    _ranks.store.set(keys[_ranks.rank], json.dumps(value))
    _ranks.wait(keys)
    return [json.loads(found) for found in _ranks.store.multi_get(keys)]


def total(values: Tensor) -> Tensor:
    """The sum over the ranks, in place and returned; it stays on the device."""
    if _ranks is not None:
        torch.distributed.all_reduce(values)
    return values
