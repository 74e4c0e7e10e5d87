"""On a GPU a step of training is launched ahead: nothing that it needs is read back before its row is written.

Here, without one, on the CPU, with what only a CPU does switched off. tests/triton_bodies.py asks the card itself about
the kernels.
"""

import sys
from contextlib import ExitStack

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cream.config import ModelConfig, OptimConfig, TrainConfig
from cream.dpo import train
from cream.log import Metrics
from cream.meter import FETCH_EVERY, Meter
from cream.model import load
from cream.upload import send
from tests.test_dpo import pairs_of

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


class NoReadingBack(TorchDispatchMode):
    """Refuses operators whose result the host looks at."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else []
        assert name not in READS and not any(mask is not None and mask.dtype == torch.bool for mask in masks), function
        NoReadingBack.seen += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip_by, batch_tokens", [("global", 10_000), ("global", 60), ("tensor", 10_000)])
def test_steps_of_training_read_nothing_back(tiny, tmp_path, work, monkeypatch, dtype, clip_by, batch_tokens):
    model = load(tiny, ModelConfig(path=str(tiny), dtype=dtype))
    pairs = pairs_of(model, 2 * (FETCH_EVERY + 2))
    model.requires_grad_(True)
    watched, fetched = ExitStack(), []

    class Watched(Meter):
        def begin(self):
            super().begin()
            watched.enter_context(NoReadingBack())

        def end(self, *args, **kwargs):
            watched.close()
            super().end(*args, **kwargs)

        def fetch(self):
            fetched.append(len(self.waiting))
            super().fetch()

    for place in ("cream.meter", "cream.optim", "cream_kernels.linear_weighted_dpo"):
        monkeypatch.setattr(sys.modules[place], "reading_is_free", lambda where: False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("cream.optim.Meter", Watched)
    config, seen = TrainConfig(batch_size=2, batch_tokens=batch_tokens, lr=1e-3), NoReadingBack.seen
    with watched:
        train(model, pairs, config, work, Metrics(tmp_path / "metrics.jsonl"), stage="iter1/train", seed=0,
              optim=OptimConfig(clip_by=clip_by))  # fmt: skip
    assert fetched == [FETCH_EVERY, 2] and NoReadingBack.seen - seen > 100 * (FETCH_EVERY + 2)


@pytest.mark.parametrize("read", [float, bool, int, torch.nonzero, lambda x: x[x > 0], lambda x: x.equal(x + 1)])
def test_what_reads_back_is_seen(read):
    with pytest.raises(AssertionError), NoReadingBack():
        read(torch.ones(1))


def test_numbers_reach_a_gpu_from_pinned_memory_without_waiting():
    class Host:
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, *, non_blocking):
            return device, self.pinned, non_blocking

    gpu = torch.device("cuda")
    assert send(Host(), gpu) == (gpu, True, True)
    numbers = torch.arange(3)
    assert send(numbers, torch.device("cpu")) is numbers
