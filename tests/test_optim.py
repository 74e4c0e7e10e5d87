"""The optimizer against torch's AdamW, tiny steps on bfloat16 weights, and a descent that a kill does not change."""

import copy
import json

import pytest
import torch
from torch import nn

from cream.log import Metrics, UserError
from cream.optim import AdamW, Schedule, descend, learning_rate


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 1)).to(dtype)


def data(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 1, generator=generator)


def test_float32_is_torchs_adamw_with_clipping():
    ours, theirs = net(), net()
    optimizer = AdamW(ours, weight_decay=0.1)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for step in range(20):
        x, y = data(step)
        for model in (ours, theirs):
            ((model(x) - y) ** 2).mean().backward()
        optimizer.accumulate()
        norm = optimizer.step(1e-2, clip=0.5)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        assert float(norm) == pytest.approx(float(expected))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bfloat16_weights_move_at_a_learning_rate_of_1e_6():
    """Without masters 98% of the weights stay as they are."""
    model = net(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    exact = net(torch.bfloat16).float()
    optimizer, reference = AdamW(model, weight_decay=0.0), AdamW(exact, weight_decay=0.0)
    for step in range(100):
        x, y = data(step)
        ((model(x.bfloat16()).float() - y) ** 2).mean().backward()
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.grad = p.grad.float()
        optimizer.accumulate()
        optimizer.step(1e-6, clip=1e9)
        reference.step(1e-6, clip=1e9)
    moved = [(optimizer.masters[n] != before[n].float()) for n in before]
    assert torch.cat([m.flatten() for m in moved]).float().mean() >= 0.99
    for (name, master), truth in zip(optimizer.masters.items(), exact.parameters(), strict=True):
        torch.testing.assert_close(master, truth.detach(), rtol=0, atol=0, msg=name)
        torch.testing.assert_close(optimizer.parameters[name].detach(), truth.detach().bfloat16(), rtol=0, atol=0)


def test_micro_batches_add_up_in_float32():
    """1024 gradients of 1 and then 1024 of 2^-8: bfloat16 would lose the small ones."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = AdamW(model, weight_decay=0.0)
    for share in [1.0] * 4 + [2.0**-8] * 4:
        model.weight.grad = torch.full_like(model.weight, share)
        optimizer.accumulate()
    assert float(optimizer.masters["weight"].grad) == 4 + 4 * 2.0**-8


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.1), (7, 0.3), (1, 0.1), (20, 0.0)])
def test_schedule_is_transformers(steps, warmup):
    import math

    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)
    for step in range(steps):
        assert learning_rate(step, steps, 3e-4, warmup) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


class Killed(BaseException):
    pass


def descent(tmp_path, model, steps=9, every=2, die_at=None, stage="sft"):
    def micro_losses(step):
        x, y = data(step)
        for part in (slice(0, 3), slice(3, 8)):
            yield ((model(x[part]) - y[part]) ** 2).sum() / 8, {"count": torch.tensor(1.0)}, 5

    def after(step):
        if step == die_at:
            raise Killed

    schedule = Schedule(steps, 1e-2, 0.2, 0.01, 1.0, every)
    keep = tmp_path / "keep"
    keep.mkdir(exist_ok=True)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    return descend(model, micro_losses, schedule, stage=stage, keep=keep, metrics=metrics, after=after)


@pytest.mark.parametrize("die_at", [1, 2, 4, 5, 8])
def test_a_killed_descent_goes_on_to_the_same_weights_and_metrics(tmp_path, die_at):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, broken = net(), net()
    descent(tmp_path / "a", whole)
    with pytest.raises(Killed):
        descent(tmp_path / "b", broken, die_at=die_at)
    again = net()  # a new process starts from the stage's input, not from where the weights were
    descent(tmp_path / "b", again)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)

    def rows(folder):
        text = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(t).items() if k not in ("time", "tokens_per_second")} for t in text]

    assert rows("a") == rows("b") and len(rows("a")) == 9
    assert rows("a")[0]["count"] == 2


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(tmp_path, where):
    model = net()
    before = copy.deepcopy(model.state_dict())

    def micro_losses(step):
        loss = model(data(step)[0]).sum()
        if where == "loss":
            yield loss * float("nan"), {}, 1
        else:  # a finite loss whose gradient is not: d sqrt(x) at 0
            yield (loss * 0).abs().sqrt(), {}, 1

    with pytest.raises(UserError, match="sft: .*step 0.* nan.*lower learning rate"):
        descend(
            model,
            micro_losses,
            Schedule(3, 1e-2, 0.0, 0.0, 1.0, 0),
            stage="sft",
            keep=tmp_path,
            metrics=Metrics(tmp_path / "metrics.jsonl"),
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not (tmp_path / "metrics.jsonl").exists()
