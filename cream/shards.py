"""Training on several ranks: FSDP2 around a model that knows nothing of it; step checkpoints for any number of ranks.

Every rank holds a part of each parameter, whole rows (dimension 0, as torch.chunk cuts it), and of what the optimizer
keeps beside it. A layer's parameters are put together for as long as it computes. torch.distributed.checkpoint writes
the parts, as safetensors, so that nothing is unpickled; a manifest of their hashes is written last, as of all step
checkpoints (cream/checkpoint.py).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from cream import dist
from cream.checkpoint import TENSORS, fresh_step, newest_step, read_meta, write_meta

HOURS = 4.0  # that a slow disk has between the first and the last rank's part; who dies is noticed without


def shard(model: nn.Module) -> None:
    """Leave this rank its part of each parameter, in place. The result of `within` does not change, but for rounding.

    Gradients are summed over the ranks in float32, and those of micro-batches before that too.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # the weights have the type that is computed in
    for layer in model.base_model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.within = types.MethodType(_call, model)
    register_fsdp_forward_method(model, "within")


def _call(model: nn.Module, function: Callable, *arguments: Any) -> Any:
    return function(model, *arguments)


def within(model: nn.Module, function: Callable, *arguments: Any) -> Any:
    """function(model, *arguments), in which the head and the embeddings are whole also where the model is sharded."""
    return model.within(function, *arguments) if isinstance(model, FSDPModule) else function(model, *arguments)


def reduce_after(model: nn.Module, last: bool) -> None:
    """Whether the backward that comes next ends by summing the gradients over the ranks: a step's last one does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def copy_whole(model: nn.Module, into: nn.Module | None) -> None:
    """Put the parameters together, one at a time, and copy them into another such module, or, with None, help only."""
    targets = dict(into.named_parameters()) if into is not None else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = parameter.full_tensor()
            if into is not None:
                targets[name].copy_(tensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(parameter: Tensor) -> slice:
    """Which rows of dimension 0 this rank's part is."""
    if not isinstance(parameter, DTensor):
        return slice(0, len(parameter))
    each = -(-len(parameter) // dist.size())
    return slice(min(dist.rank() * each, len(parameter)), min((dist.rank() + 1) * each, len(parameter)))


def beside(
    part: Tensor,  # what belongs to this rank's rows: (their number, ...), or as much on every rank
    parameter: Tensor,
) -> Tensor:
    """The tensor of which the ranks have these parts; it shares their memory. `part` where nothing is sharded."""
    if not isinstance(parameter, DTensor):
        return part
    first = len(parameter) if len(part) == len(local(parameter)) else len(part) * dist.size()
    whole = torch.empty(first, *part.shape[1:], device="meta")
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


# Step checkpoints


def save(directory: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """As checkpoint.save_step, by all ranks, each its own parts."""
    if not dist.is_main():
        _write(Path(dist.hear()), tensors)
        dist.gather(None)
    else:
        with fresh_step(directory, step) as place:
            dist.tell(str(place))
            _write(place, tensors)
            dist.gather(None)
            write_meta(place, meta, {})
    dist.gather(None)  # rank 0 has hashed it: nobody waits for it in a collective, which has less time


def _write(place: Path, tensors: Mapping[str, Tensor]) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(place), save_distributed=True)
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=HOURS))
    dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    torch.distributed.destroy_process_group(group)


def newest(directory: Path) -> Path | None:
    """As checkpoint.newest_step, the same on all ranks: rank 0 looks at the hashes."""
    place = newest_step(directory) if dist.is_main() else None
    found = dist.agree(str(place) if place else None)
    return Path(found) if found else None


def load(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, which may be parts, from a whole checkpoint of one process or of any number of ranks."""
    if (place / TENSORS).exists():
        _load_whole(place, tensors)
    else:
        reader = dcp.HuggingFaceStorageReader(str(place))
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)  # each rank reads what it needs; none need agree
    dist.gather(None)  # before rank 0 may delete it


def _load_whole(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each rank's rows of what one process wrote, tensor by tensor."""
    aliases = read_meta(place)["aliases"]
    with safe_open(place / TENSORS, framework="pt") as file:
        for name, tensor in tensors.items():
            whole = file.get_tensor(aliases.get(name, name)).view(tensor.shape)
            local(tensor).copy_(whole[rows(tensor)])
