"""AdamW over whole float32 masters, the learning-rate schedule, and the descent that SFT and DPO share.

A bfloat16 parameter cannot take a step of 1e-6 (98% of the weights would stay as they are), so every bfloat16 weight
has 16 low bits beside it (cream/adamw.py), and micro-batches add up so that none is lost. A gradient is taken from its
parameter as soon as backward has made it: into the step's sum, or, where one micro-batch is the step and the clipping
does not need all gradients at once, straight into the weights.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cream import dist, shards
from cream.adamw import BLOCK, EPS, add_, dithered, split, thresholds, update_
from cream.checkpoint import TENSORS, read_step, save_step, step_of
from cream.config import OptimConfig
from cream.log import Metrics, UserError, progress
from cream.meter import Meter
from cream.upload import numbers, reading_is_free

CHUNK = 256 * BLOCK  # elements that a CPU updates at once: their float32 copies stay in its cache
MOST_SUMS = 1_000_003  # more micro-batches than a step will ever have: what keeps the draws of two steps apart


class AdamW:
    """torch.optim.AdamW on a module's parameters, gradients clipped and added up, state as `config` says.

    No weight decay on vectors (norm weights and biases), as in Hugging Face's Trainer, which the paper used. 8-bit
    moments are of matrices; vectors, and what does not divide into blocks, keep float32 ones. Bytes a parameter, with
    one micro-batch a step: bfloat16 weights with int8 moments 6.03 and 2 of gradients (none where they are released),
    with float32 moments 12 and 2; float32 weights 12 and 4. With several, `sums` says what the gradients take.

    A step is begin(), backward of each micro-batch's loss, step(). close() takes the hooks off the module.

    Of a sharded module (cream/shards.py) each rank has the state of its own rows, the same bits as one process has of
    them before the first step; gradients come summed over micro-batches and ranks, and are not released.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        weight_decay: float,
        clip: float,  # gradient norm; 0 clips nothing
        betas: tuple[float, float] = (0.9, 0.999),
        training: str = "",  # which it is: the low bits that it starts from are drawn by this and a tensor's name
    ):
        self.config, self.weight_decay, self.clip, self.betas = config, weight_decay, clip, betas
        self.training = training
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.state = {name: self._empty(name, parameter) for name, parameter in self.parameters.items()}
        self.steps = 0
        self.gradients: dict[str, Tensor] = {}  # of the step in hand
        self.norms: dict[str, Tensor] = {}  # of gradients that are gone
        self.sums: dict[str, int] = {}  # micro-batches that have arrived
        self.releases = False
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, name))
            for name, parameter in self.parameters.items()
        ]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _empty(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first step: no moments, and low bits that start the master between bfloat16 values."""
        part, whole = shards.local(parameter.detach()), parameter.shape
        state, blocks = {}, part.numel() // BLOCK
        if parameter.dtype != torch.float32:
            cut = () if part.shape == whole else (whole, shards.rows(parameter))
            state["low"] = dithered(part, seed_of(self.training, name), *cut)
        if self.config.moments == "int8" and parameter.ndim > 1 and parameter.numel() % BLOCK == 0:
            if _row_blocks(parameter) is None and (part.numel() % BLOCK or len(part) * dist.size() != len(parameter)):
                shape = " x ".join(map(str, whole))
                raise UserError(
                    f"optim.moments int8: {name}, {shape}, does not divide into blocks of {BLOCK} on {dist.size()} "
                    "ranks; set it to float32, or take another number of ranks"
                )
            state["exp_avg"] = torch.zeros_like(part, dtype=torch.int8)
            state["exp_avg_scale"] = torch.zeros(blocks, 1, device=part.device)
            state["exp_avg_sq"] = torch.zeros_like(part, dtype=torch.uint8)
            state["exp_avg_sq_scale"] = torch.zeros(blocks, 1, device=part.device)
        else:
            state["exp_avg"] = torch.zeros_like(part, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(part, dtype=torch.float32)
        return state

    def begin(self, lr: float, micro_batches: int | None = None) -> None:
        """Start a step at learning rate lr. `micro_batches` is how many losses it will have, where that is known.

        With one, and clipping off or by tensor, gradients are released: each moves its weights as soon as backward has
        made it and is freed, the same step bit for bit.
        """
        self.steps += 1
        self.lr = lr
        whole = dist.size() == 1
        self.releases = whole and micro_batches == 1 and (self.clip == 0 or self.config.clip_by == "tensor")
        self.gradients, self.norms, self.sums = {}, {}, {}

    @torch.no_grad()
    def _arrived(self, name: str, parameter: Tensor) -> None:
        grad, parameter.grad = shards.local(parameter.grad), None
        self.sums[name] = count = self.sums.get(name, 0) + 1
        if self.releases:
            assert count == 1, "gradients were released, and then another micro-batch came"
            self.norms[name] = norm = _norm(grad)
            self._update(name, grad, self._factor(norm))
        elif count == 1:
            self.gradients[name] = grad
        elif self.config.sums == "bfloat16" and grad.dtype == torch.bfloat16 and grad.numel() % BLOCK == 0:
            threshold = thresholds(self.steps * MOST_SUMS + count, grad.device)
            for total, part in _chunks(self.gradients[name], grad):
                _fast(add_, grad.device)(total, part, threshold)
        else:
            self.gradients[name] = self.gradients[name].float().add_(grad)

    @torch.no_grad()
    def step(self) -> Tensor:  # (), the gradient's norm before clipping
        """End the step: every weight is where it should be, and no gradient is held.

        Where the norm is not finite every weight stays as it was on a CPU; a GPU would have to be waited for, and
        gradients that were released have moved their weights.
        """
        norms = self.norms or _over_ranks({n: _norm(self.gradients[n]) for n in self.parameters if n in self.gradients})
        norm = torch.linalg.vector_norm(torch.stack([norms[name] for name in self.parameters if name in norms]))
        if reading_is_free(norm.device) and not torch.isfinite(norm):
            self.gradients = {}
            return norm
        for name in self.parameters:
            if name in self.gradients:
                own = norms[name] if self.config.clip_by == "tensor" else norm
                self._update(name, self.gradients.pop(name), self._factor(own))
        return norm

    def _factor(self, norm: Tensor) -> Tensor:  # (), as torch.nn.utils.clip_grad_norm_ has it
        return (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else torch.ones_like(norm)

    def _update(self, name: str, grad: Tensor, factor: Tensor) -> None:
        parameter, state = shards.local(self.parameters[name].detach()), self.state[name]
        if not parameter.numel():  # more ranks than rows
            return
        decay = self.weight_decay if parameter.ndim > 1 else 0.0
        if parameter.dtype == torch.float32 and "exp_avg_scale" not in state:
            _plain(parameter, grad.mul_(factor), state, self.steps, self.betas, self.lr, decay)
            return
        rates = _rates(self.steps, self.lr, decay, self.betas, grad.device)
        threshold = thresholds(self.steps, grad.device)
        update = _fast(update_, grad.device)
        keys = ("low", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        for weight, part, *rest in _chunks(parameter, grad, *(state.get(key) for key in keys)):
            update(weight, *rest, part, factor, rates, threshold, self.betas)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by flat names: weights, low bits, moments."""
        found = {f"weight/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        return found | {f"{key}/{name}": t for name, state in self.state.items() for key, t in state.items()}

    def parts(self) -> dict[str, Tensor]:
        """The same tensors, of the whole's shape where this rank has a part of them. Scales lie by rows where a row is
        whole blocks, so that any number of ranks cuts them where it cuts what they scale."""
        found = {f"weight/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, state in self.state.items():
            parameter = self.parameters[name]
            for key, part in state.items():
                if key.endswith("_scale") and (blocks := _row_blocks(parameter)):
                    part = part.view(-1, blocks)
                found[f"{key}/{name}"] = shards.beside(part, parameter)
        return found

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        self.steps = steps
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if (master := tensors.get(f"master/{name}")) is not None:  # as checkpoints of version 0.1.0 have it
                    halves = (master, None) if parameter.dtype == torch.float32 else split(master)
                    tensors |= {f"weight/{name}": halves[0], f"low/{name}": halves[1]}
                parameter.copy_(tensors[f"weight/{name}"])
                for key, tensor in self.state[name].items():
                    tensor.copy_(tensors[f"{key}/{name}"])


@functools.lru_cache(maxsize=4)  # a step asks for each of a model's tensors
def _rates(step: int, lr: float, decay: float, betas: tuple[float, float], device: torch.device) -> Tensor:
    """What update_ wants to know of the step."""
    return numbers([lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5, 1 - lr * decay], device)


def _row_blocks(parameter: Tensor) -> int | None:
    """How many blocks a row of dimension 0 is; None where they go across rows."""
    size = parameter.numel() // len(parameter)
    return size // BLOCK if size % BLOCK == 0 else None


def _over_ranks(norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The norms of whole gradients, from those of this rank's parts."""
    if dist.size() == 1:
        return norms
    whole = dist.total(torch.stack(list(norms.values())).square()).sqrt()
    return dict(zip(norms, whole.unbind(), strict=True))


def _norm(grad: Tensor) -> Tensor:  # () float32
    return torch.linalg.vector_norm(grad, dtype=torch.float32)


def _chunks(*tensors: Tensor | None) -> Iterable[tuple[Tensor | None, ...]]:
    """The tensors side by side as (B, BLOCK), and scales as (B, 1): whole on a GPU, CHUNK elements at once on a CPU.

    Where the first does not divide into blocks they are given as they are.
    """
    first = tensors[0]
    if first.numel() % BLOCK:
        yield tensors
        return
    blocks = first.numel() // BLOCK
    tensors = tuple(t if t is None else t.view(blocks, -1) for t in tensors)
    size = blocks if first.is_cuda else CHUNK // BLOCK
    for i in range(0, blocks, size):
        yield tuple(t if t is None else t[i : i + size] for t in tensors)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _fast(function: Callable, device: torch.device) -> Callable:
    """One kernel on a GPU; on a CPU as it is, which takes as long and no minute of compiling (NOTES.md)."""
    return _compiled(function) if device.type == "cuda" else function


def _plain(
    parameter: Tensor,  # float32
    grad: Tensor,  # float32
    state: dict[str, Tensor],
    step: int,
    betas: tuple[float, float],
    lr: float,
    decay: float,
) -> None:
    """torch's own fused step, where everything is float32."""
    count = torch.full((), step - 1, dtype=torch.float32, device=parameter.device)  # which it raises by one
    adamw(
        [parameter],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [count],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=decay,
        eps=EPS,
        maximize=False,
    )


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over ceil(warmup * steps) steps, then a cosine to 0: the rate of step 0, 1, ..., steps - 1.

    As transformers.get_cosine_schedule_with_warmup, which the released code trains by.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * step / max(1, rising)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def seed_of(*names: object) -> int:
    """A seed for what has these names, the same on every machine."""
    text = "/".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def draw(seed: int, stage: str, step: int) -> None:
    """Begin torch's random numbers anew, so that a step's dropout is its own whether or not a run was resumed."""
    torch.manual_seed(seed_of(seed, stage, step))


@dataclass(frozen=True)
class Schedule:
    steps: int
    lr: float
    warmup: float  # fraction of steps
    weight_decay: float
    clip: float  # gradient norm; 0 clips nothing
    checkpoint_every: int  # steps; 0: never


def descend(
    model: nn.Module,
    micro_losses: Callable[[int], Iterable[tuple[Tensor, dict[str, Tensor | float], int]]],
    schedule: Schedule,
    *,
    stage: str,
    keep: Path,  # where step checkpoints go
    metrics: Metrics,
    optim: OptimConfig | None = None,  # None: the defaults
    seed: int = 0,  # of dropout, where the model has any, and of the low bits that masters start from
    micro_batches: Callable[[int], int | None] = lambda step: None,  # losses of a step, where the caller knows
    after: Callable[[int], None] = lambda step: None,
) -> dict[str, float | None]:  # for the ledger: steps, and Meter.facts of this process's part of them
    """Run the schedule from the newest step checkpoint, or from the start.

    `micro_losses(step)` yields, for each micro-batch of that step, its share of the loss, shares of the step's metrics
    (both sum to the step's values) and its number of tokens. It must be a pure function of the step, so that a resumed
    run sees the batches that it would have seen. Of several ranks each yields its own part of these sums, in as many
    micro-batches as the others. `after(step)` is called when a step's weights are in place.
    Raises UserError, nothing written, where the loss or the gradient is not finite, and where the schedule is one step
    of warm-up, whose rate is 0.
    """
    rates = [learning_rate(step, schedule.steps, schedule.lr, schedule.warmup) for step in range(schedule.steps)]
    if not any(rates):
        section = stage.rpartition("/")[2]
        raise UserError(
            f"{stage}: its only step is the first of the warm-up, whose learning rate is 0, so it would train nothing; "
            f"set {section}.warmup to 0, or have more steps by a lower {section}.batch_size or more {section}.epochs"
        )
    decay, clip, training = schedule.weight_decay, schedule.clip, f"{seed}/{stage}"
    with closing(AdamW(model, optim or OptimConfig(), weight_decay=decay, clip=clip, training=training)) as optimizer:
        start = _resume(optimizer, keep)
        dist.gather(None)  # all have their weights: from here on the ranks wait for each other in collectives
        metrics.rewind(stage, start)  # what a killed attempt wrote after its last checkpoint is written again
        meter = Meter(model, stage, metrics)
        with progress(schedule.steps, stage, "steps", done=start) as bar:
            for step in range(start, schedule.steps):
                meter.begin()
                draw(seed, stage, step)
                count = micro_batches(step)
                optimizer.begin(rates[step], count)
                for number, (loss, shares, tokens) in enumerate(micro_losses(step), start=1):
                    shards.reduce_after(model, number == count)
                    (loss * dist.size()).backward()  # FSDP takes the mean over the ranks
                    meter.add(loss, shares, tokens)
                meter.check(step)
                norm = optimizer.step()
                done = step + 1
                saves = schedule.checkpoint_every and done % schedule.checkpoint_every == 0 and done < schedule.steps
                meter.end(done, due=saves or done == schedule.steps, lr=rates[step], grad_norm=norm)
                after(done)
                if saves:
                    _save(optimizer, keep, done, {"stage": stage})
                bar.update(1)
    return {"steps": schedule.steps, **meter.facts()}


def _save(optimizer: AdamW, keep: Path, step: int, meta: dict[str, str]) -> None:
    if dist.size() == 1:
        save_step(keep, step, optimizer.tensors(), meta)
    else:
        shards.save(keep, step, optimizer.parts(), meta)


def _resume(optimizer: AdamW, keep: Path) -> int:
    """Load the newest whole checkpoint, of however many ranks, and return its step; 0 without one."""
    place = shards.newest(keep)
    if place is None:
        return 0
    step = step_of(place)
    if dist.size() == 1 and (place / TENSORS).exists():
        optimizer.load(read_step(place)[0], step)
    else:
        shards.load(place, optimizer.parts())
        optimizer.steps = step
    return step
