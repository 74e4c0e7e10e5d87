"""One more token for every answer under way: the model's forward over the cache, on a GPU as one CUDA graph.

S slots of the cache, A of them with a row, D hidden size.

A layer decodes in some twenty kernels of a few microseconds each, less than the host takes to launch them; a graph
launches a whole forward at once. Its shapes are fixed: a row for every slot, with one or not (attention computes them
all in any case, and the products' time is that of reading weights), and the columns that the cache holds. So a cache
that grows, by cream.cache.GROWTH columns, or shrinks is captured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cream.cache import KeyValues
from cream.model import hidden_states
from cream.upload import upload


def capturable(model: nn.Module) -> bool:
    """Whether the forward is device work alone: a rotary embedding that grows with the longest position reads it."""
    kinds = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    return not any("dynamic" in kind or "longrope" in kind for kind in kinds)


def captured(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What `function` launches, as a CUDA graph: each call gives its result anew, always in the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class Decoder:
    """The forward of a model over a cache; with `graphs`, captured at the second step of each shape."""

    def __init__(self, model: nn.Module, cache: KeyValues, *, graphs: bool):
        self.model, self.cache, self.graphs = model, cache, graphs
        self._shape = (0, 0)  # slots and columns, as of the three below
        self._ids = self._columns = torch.empty(0)  # (S,) each, what a forward of every slot reads
        self._replay: Callable[[], Tensor] | None = None

    def step(
        self,
        token: Tensor,  # (A,) int64 on the device
        slot: Sequence[int],
        source: Sequence[int],  # the slot to read the first `shared` columns from, which hold the same
        shared: Sequence[int],
        length: Sequence[int],  # columns, the new token's included
    ) -> Tensor:  # (A, D) after the final norm
        """Put each row's token behind what its slot holds, and compute it."""
        columns = [n - 1 for n in length]
        if not self.graphs:
            self.cache.begin(slot, source, shared, length)
            [position] = upload(token.device, columns)
            return hidden_states(self.model, token[:, None], position[:, None], kv=self.cache)[:, 0]
        self.cache.reserve(max(length))
        shape = self.cache.slots, self.cache.columns
        new = shape != self._shape
        if new:
            self._shape, self._replay = shape, None
            self._ids, self._columns = (torch.zeros(shape[0], dtype=torch.int64, device=token.device) for _ in "12")
        at, column = upload(token.device, slot, columns)
        self._ids.index_copy_(0, at, token)
        self._columns.index_copy_(0, at, column)  # a slot without a row writes where its last one did
        if new:  # as it is: whatever is set up at a first call is set up now, outside the graph
            return self._every_slot()[at]
        if self._replay is None:
            self._replay = captured(self._every_slot)
        return self._replay()[at]

    def _every_slot(self) -> Tensor:  # (S, D)
        """Device work alone, of fixed shapes, on tensors that stay where they are."""
        self.cache.begin_everywhere(self._columns)
        return hidden_states(self.model, self._ids[:, None], self._columns[:, None], kv=self.cache)[:, 0]
