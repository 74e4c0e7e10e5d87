"""The sampler's key-value cache: slots that answers take and leave, each of a length of its own.

S slots, A rows that are decoded, T tokens of a prompt, K kv heads, E head size.

A slot's columns are a prompt's tokens and then the answer's. A prompt is computed once and copied into the slots of its
answers, once an answer; each step reads its columns from one of them for all (cream_kernels.decode_attention).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cream.upload import upload
from cream_kernels import decode_attention, native
from cream_kernels.decode_attention import native_takes, visible_columns

GROWTH = 64  # columns added at a time


class KeyValues:
    """Keys and values of every layer, (S, K, columns, E) each, written in place."""

    def __init__(self, slots: int, most: int, device: torch.device):
        self.slots, self.most, self.device = slots, most, device  # `most` columns a slot, held only as they are needed
        self.columns = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows = self._slot_of = self._visible = None  # of the step in hand; every layer uses the same

    def fill(
        self,
        slots: Sequence[int],
        prompt: Mapping[int, tuple[Tensor, Tensor]],  # layer -> keys (T, K, E), values (T, K, E)
    ) -> None:
        """Put a prompt's keys and values into these slots, whose former contents are gone."""
        for layer, pair in prompt.items():
            if layer not in self._layers:
                self._layers[layer] = tuple(x.new_zeros(self.slots, x.shape[1], self.columns, x.shape[2]) for x in pair)
        self.reserve(len(next(iter(prompt.values()))[0]))
        [at] = upload(self.device, slots)
        for layer, pair in prompt.items():
            for cache, x in zip(self._layers[layer], pair, strict=True):
                cache[at, :, : len(x)] = x.transpose(0, 1)

    def begin(self, slot: Sequence[int], source: Sequence[int], shared: Sequence[int], length: Sequence[int]) -> None:
        """Say for each of the A rows of the forward that follows: its slot; the slot to read the first `shared` columns
        from, which hold the same; and how many columns it has, the new token's included."""
        self.reserve(max(length))
        self._rows = torch.tensor([slot, source, shared, length])
        keys, _ = next(iter(self._layers.values()))
        if native.load() is None or not native_takes(keys):
            self._slot_of = self._rows[0].to(self.device, non_blocking=True)
            self._visible = visible_columns(self._rows, self.slots).to(self.device, non_blocking=True)

    def begin_everywhere(self, column: Tensor) -> None:  # (S,) int64 on the device, below `columns`
        """Say that the forward that follows has a row for every slot, in order, whose new token goes to that column.

        Not for the native path. Nothing is copied to the device or waited for.
        """
        self._rows = torch.zeros(4, self.slots, dtype=torch.int64)  # which the other path does not read
        self._slot_of = torch.arange(self.slots, device=self.device)
        self._visible = torch.arange(self.columns, device=self.device) <= column[:, None]

    def attend(
        self,
        layer: int,
        query: Tensor,  # (A, H, 1, E)
        key: Tensor,  # (A, K, 1, E)
        value: Tensor,  # (A, K, 1, E)
        scale: float,
    ) -> Tensor:  # (A, 1, H, E)
        keys, values = self._layers[layer]
        new = (x[:, :, 0] for x in (query, key, value))
        return decode_attention(
            *new, keys, values, self._rows, scale=scale, slots=self._slot_of, visible=self._visible
        )[:, None]

    def shrink(self, keep: Sequence[int]) -> None:
        """Hold these slots alone, which become 0, 1, 2, ..., to save memory and, where idle slots cost time, time.

        Layer by layer, so that what is held at the peak is one cache and a layer, not two caches.
        """
        [at] = upload(self.device, keep)
        for layer, pair in self._layers.items():
            self._layers[layer] = tuple(x[at] for x in pair)
        self.slots = len(keep)

    @property
    def idles(self) -> bool:
        """Whether a slot without a row costs as much as one with."""
        return not self._layers or self._visible is not None

    def reserve(self, columns: int) -> None:
        """Hold at least so many columns a slot. Raises ValueError where that is more than `most`."""
        if columns > self.most:
            raise ValueError(f"a cache of {self.most} columns cannot hold {columns}")
        if columns <= self.columns:
            return
        # Multiples, since a GPU keeps plans (of cuDNN) and graphs by shape.
        old, self.columns = self.columns, min(self.most, (-(-columns // GROWTH) + 1) * GROWTH)
        for layer, pair in self._layers.items():
            grown = tuple(x.new_zeros(*x.shape[:2], self.columns, x.shape[3]) for x in pair)
            for to, x in zip(grown, pair, strict=True):
                to[:, :, :old] = x
            self._layers[layer] = grown
