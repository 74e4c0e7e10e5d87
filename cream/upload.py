"""Numbers onto the device while the host goes on, and whether it may look at what is there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can look at a value without waiting for a device."""
    return device.type == "cpu"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. A copy from memory that is not pinned would be waited for."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def upload(device: torch.device, *rows: Sequence[int]) -> list[Tensor]:  # int64, one tensor for each of `rows`
    """Whole numbers, in one copy."""
    flat = torch.tensor([number for row in rows for number in row], dtype=torch.int64)
    return list(send(flat, device).split([len(row) for row in rows]))


def numbers(values: Sequence[float], device: torch.device) -> Tensor:  # float32
    return send(torch.tensor(values, dtype=torch.float32), device)
