"""What computing achieves: floating-point operations against the device's peak, tokens a second, memory.

T packed tokens, N rows that the head reads, D hidden size, V vocabulary, H query heads, E head size.

Training writes a row of metrics.jsonl a step. On a GPU nothing of it is read while the step is in hand: values stay on
the device until rows are written, FETCH_EVERY steps together.
"""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cream import dist
from cream.log import Metrics, UserError
from cream.model import head
from cream.packing import Packed
from cream.upload import reading_is_free

FETCH_EVERY = 16  # steps on a GPU
ALIKE = ("step", "lr", "grad_norm")  # numbers that every rank has; of the others each has its part
REMEDY = "nothing of it is saved and the stage is not done: try a lower learning rate"
# Dense bfloat16 products, FLOP/s, from NVIDIA's data sheets; the longer name first where one begins another.
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def forward_flops(model: nn.Module, packed: Packed) -> float:
    """Floating-point operations of a forward pass with the head on its N rows.

    Two a weight of the backbone's matrices and token, 4 H E a layer and token seen, 2 N D V. What activation
    checkpointing computes again does not count, as usual for MFU.
    """
    weight, config = head(model), model.config
    embedded = {id(weight), id(model.get_input_embeddings().weight)}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in embedded)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    seen = 4 * config.num_hidden_layers * width * packed.segments.seen
    return 2 * packed.tokens * matrices + seen + 2 * packed.targets.shape[0] * weight.numel()


def training_flops(model: nn.Module, packed: Packed) -> float:
    """Those of forward and backward: three times forward's, less the gradients of matrices that are frozen."""
    weight = head(model)
    embedded = {id(weight), id(model.get_input_embeddings().weight)}
    frozen = sum(p.numel() for p in model.parameters() if p.ndim == 2 and not p.requires_grad and id(p) not in embedded)
    rows = 0 if weight.requires_grad else packed.targets.shape[0]
    return 3 * forward_flops(model, packed) - 2 * packed.tokens * frozen - 2 * rows * weight.numel()


def utilization(model: nn.Module, flops: float, seconds: float) -> float | None:
    """MFU: what `flops` in `seconds` are of the peak of the model's device in its dtype; None where there were none."""
    weight = next(model.parameters())
    return flops / seconds / _peak(weight.device, weight.dtype) if flops else None


@functools.cache
def _peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s: of the data sheet where PEAK has the card, else of the best of a few square products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := next((peak for card, peak in PEAK.items() if card in name), None):
            return known
    size = 8192 if device.type == "cuda" else 1536
    a, seconds = torch.ones(size, size, device=device, dtype=dtype), math.inf
    for _ in range(5):
        start = time.perf_counter()
        float((a.T @ a)[0, 0])  # waits for it
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * size**3 / seconds


def memory_gb(model: nn.Module) -> float:
    """The most memory held so far, GB of 1e9 bytes: by tensors since the last reset on a GPU, else by the process."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Meter:
    """The rows of one training stage, from its steps' micro-batches to metrics.jsonl."""

    def __init__(self, model: nn.Module, stage: str, metrics: Metrics):
        self.model, self.stage, self.metrics = model, stage, metrics
        self.at_once = reading_is_free(next(model.parameters()).device)
        self.waiting: list[dict] = []  # rows with values still on the device
        self.steps = self.tokens = 0
        self.seconds = self.flops = self.forwards = 0.0
        if not self.at_once:
            torch.cuda.reset_peak_memory_stats()
        weight = next(model.parameters())
        _peak(weight.device, weight.dtype)  # measured now, where it must be, and not in a step

    def begin(self) -> None:
        """Start a step."""
        self.row: dict[str, Tensor | float] = {"tokens": 0}
        if not self.waiting:
            self.began = time.perf_counter()

    def add(self, loss: Tensor, shares: Mapping[str, Tensor | float], tokens: int) -> None:
        """A micro-batch's share of the loss and of other numbers, which sum to the step's."""
        for key, value in {"loss": loss, "tokens": tokens, **shares}.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.row[key] = self.row.get(key, 0) + value

    def check(self, step: int) -> None:
        """Raise UserError, before the weights move, where the loss is not finite; on a GPU `fetch` does, later."""
        if self.at_once:
            self._finite("loss", float(dist.total(self.row["loss"].clone())), step)

    def end(self, step: int, *, due: bool, **numbers: Tensor | float) -> None:
        """Close the step; `due` says that its row must be written now, as before a checkpoint."""
        self.waiting.append({"step": step, **self.row, **numbers})
        if self.at_once or due or len(self.waiting) == FETCH_EVERY:
            self.fetch()

    def fetch(self) -> None:
        """Write the rows that wait. Their steps share one time, since no clock was stopped between them.

        Raises UserError where a loss or a gradient's norm is not finite.
        """
        self._sum_over_ranks()
        places = [(row, key) for row in self.waiting for key, value in row.items() if isinstance(value, Tensor)]
        values = torch.stack([row[key].double() for row, key in places]).tolist() if places else []
        for (row, key), value in zip(places, values, strict=True):
            row[key] = int(value) if key == "tokens" else value
        seconds = time.perf_counter() - self.began
        tokens, flops = (sum(row.get(key, 0) for row in self.waiting) for key in ("tokens", "flops"))
        shared = {
            "tokens_per_second": tokens / seconds,
            "mfu": utilization(self.model, flops / dist.size(), seconds),
            "memory_gb": memory_gb(self.model),
        }
        for row in self.waiting:
            self._finite("loss", row["loss"], row["step"] - 1)
            self._finite("gradient's norm", row["grad_norm"], row["step"] - 1)
            row.pop("flops", None)
            self.forwards += row.get("sequence_forwards_per_prompt", 0)
            self.metrics.write(stage=self.stage, **row, **shared)
        self.steps, self.tokens = self.steps + len(self.waiting), self.tokens + tokens
        self.seconds, self.flops = self.seconds + seconds, self.flops + flops
        self.waiting = []

    def _sum_over_ranks(self) -> None:
        places = [(row, key) for row in self.waiting for key in row if key not in ALIKE] if dist.size() > 1 else []
        if places:
            device = self.waiting[0]["loss"].device
            parts = [torch.as_tensor(row[key], dtype=torch.float64, device=device) for row, key in places]
            for (row, key), value in zip(places, dist.total(torch.stack(parts)).unbind(), strict=True):
                row[key] = value

    def _finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise UserError(f"{self.stage}: the {what} of step {step} is {value}; {REMEDY}")

    def facts(self) -> dict[str, float | None]:
        """This process's part of the stage, for the ledger."""
        if not self.steps:
            return {"tokens": 0, "tokens_per_second": None}
        return {
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "mfu": utilization(self.model, self.flops / dist.size(), self.seconds),
            "memory_gb": memory_gb(self.model),
            "sequence_forwards_per_prompt": self.forwards / self.steps,
        }
