"""AdamW over float32 masters, the learning-rate schedule, and the descent that SFT and DPO share.

A bfloat16 parameter cannot take a step of 1e-6 (98% of the weights would stay as they are), so every parameter that is
not float32 has a float32 master; gradients are added up in float32 too, whatever the number of micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cream.checkpoint import load_latest, save_step
from cream.log import Metrics, progress
from cream.meter import Meter


def dithered(weight: Tensor) -> Tensor:  # float32, of weight's shape
    """A float32 master somewhere in the interval that rounds to the bfloat16 weight, drawn evenly, the same each time.

    A master equal to the weight would have to move by half a bfloat16 step, 0.2 to 0.4% of the weight, before the model
    saw anything, and a short training at a small rate would be rounded away whole. From here a move by a fraction f of
    a step changes that fraction of the weights: what the model sees is the masters' move, in the mean.
    """
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"masters are for bfloat16 weights, not {weight.dtype}")
    generator = torch.Generator(weight.device).manual_seed(0)
    low_bits = torch.randint(
        -0x7FFF, 0x8000, weight.shape, generator=generator, device=weight.device, dtype=torch.int32
    )
    bits = weight.detach().float().view(torch.int32)
    # float32 bits are ordered as magnitudes, exponents included. Zero and subnormals have no room below: left alone.
    normal = weight.abs() >= torch.finfo(torch.bfloat16).tiny * 2
    return torch.where(normal, bits + low_bits, bits).view(torch.float32)


class AdamW:
    """torch.optim.AdamW on float32 masters of a module's parameters.

    No weight decay on vectors (norm weights and biases), as in Hugging Face's Trainer, which the paper used.
    """

    def __init__(self, model: nn.Module, *, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {n: p if p.dtype == torch.float32 else dithered(p) for n, p in self.parameters.items()}
        decayed = [m for m in self.masters.values() if m.ndim > 1]
        plain = [m for m in self.masters.values() if m.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)

    def accumulate(self) -> None:
        """Add the module's gradients to the masters' in float32 and free them."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def step(self, lr: float, clip: float) -> Tensor:  # (), the gradient's norm before clipping
        """One update at learning rate lr, the global gradient norm clipped to `clip`; gradients are freed.

        Where the norm is not finite, every weight stays as it was on a CPU; a GPU would have to be waited for.
        """
        norm = nn.utils.clip_grad_norm_(self.masters.values(), clip)
        if norm.device.type == "cpu" and not torch.isfinite(norm):
            return norm
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by flat names: masters and both moments."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"master/{name}"] = master.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}/{name}"] = self.adamw.state[master][moment]
        return tensors

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master/{name}"])
                self.adamw.state[master] = {
                    "step": torch.tensor(float(step), device=master.device),
                    **{m: tensors[f"{m}/{name}"].to(master.device).clone() for m in ("exp_avg", "exp_avg_sq")},
                }
                self.parameters[name].copy_(master)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over ceil(warmup * steps) steps, then a cosine to 0: the rate of step 0, 1, ..., steps - 1.

    As transformers.get_cosine_schedule_with_warmup, which the released code trains by.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * step / max(1, rising)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class Schedule:
    steps: int
    lr: float
    warmup: float  # fraction of steps
    weight_decay: float
    clip: float  # gradient norm
    checkpoint_every: int  # steps; 0: never before the end


def descend(
    model: nn.Module,
    micro_losses: Callable[[int], Iterable[tuple[Tensor, dict[str, Tensor | float], int]]],
    schedule: Schedule,
    *,
    stage: str,
    keep: Path,  # where step checkpoints go
    metrics: Metrics,
    after: Callable[[int], None] = lambda step: None,
) -> dict[str, float | None]:  # for the ledger: steps, and Meter.facts of this process's part of them
    """Run the schedule from the newest step checkpoint, or from the start.

    `micro_losses(step)` yields, for each micro-batch of that step, its share of the loss, shares of the step's metrics
    (both sum to the step's values) and its number of tokens. It must be a pure function of the step, so that a resumed
    run sees the batches that it would have seen. `after(step)` is called when a step's weights are in place.
    Raises UserError, nothing written, where the loss or the gradient is not finite.
    """
    optimizer = AdamW(model, weight_decay=schedule.weight_decay)
    start = 0
    if (latest := load_latest(keep)) is not None:
        start, tensors, _ = latest
        optimizer.load(tensors, start)
    metrics.rewind(stage, start)  # what a killed attempt wrote after its last checkpoint is written again
    meter = Meter(model, stage, metrics)
    with progress(schedule.steps, stage, "steps", done=start) as bar:
        for step in range(start, schedule.steps):
            meter.begin()
            for loss, shares, tokens in micro_losses(step):
                loss.backward()
                optimizer.accumulate()
                meter.add(loss, shares, tokens)
            meter.check(step)
            rate = learning_rate(step, schedule.steps, schedule.lr, schedule.warmup)
            norm = optimizer.step(rate, schedule.clip)
            done = step + 1
            saves = schedule.checkpoint_every and done % schedule.checkpoint_every == 0 and done < schedule.steps
            meter.end(done, due=saves or done == schedule.steps, lr=rate, grad_norm=norm)
            after(done)
            if saves:
                save_step(keep, done, optimizer.state(), {"stage": stage})
            bar.update(1)
    return {"steps": schedule.steps, **meter.facts()}
