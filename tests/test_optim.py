"""The optimizer against torch's AdamW, tiny steps on bfloat16 weights, and a descent that a kill does not change."""

import copy
import json

import pytest
import torch
from torch import nn

from cream.log import Metrics, UserError
from cream.optim import AdamW, Schedule, descend, dithered, learning_rate


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


def test_dithered_masters_round_to_their_weights_and_lean_nowhere():
    torch.manual_seed(0)
    weight = torch.randn(400, 400).bfloat16()
    weight[0, :6] = torch.tensor([0.0, -0.0, 1.0, -2.0, 1e-39, 3e38])  # powers of two have half the room below
    master = dithered(weight)
    assert torch.equal(master.bfloat16(), weight) and torch.equal(master, dithered(weight))
    assert torch.equal(master[0, :2], torch.zeros(2)) and (master[1:] != weight[1:].float()).float().mean() > 0.99
    relative = (master / weight.float() - 1)[1:]
    assert relative.abs().max() <= 2**-8 and relative.mean().abs() <= 2e-5
    with pytest.raises(ValueError, match="masters are for bfloat16 weights, not torch.float16"):
        dithered(weight.half())


@pytest.mark.parametrize("start", [dithered, lambda weight: weight.detach().float()], ids=["dithered", "on the grid"])
def test_the_model_sees_a_learning_rate_of_1e_6(monkeypatch, start):
    """100 steps of 1e-6 are 1e-4, less than half a bfloat16 step here: masters that start on the grid of bfloat16 move
    and the model does not; dithered ones carry it along, in the mean, to 5%."""
    monkeypatch.setattr("cream.optim.dithered", start)
    torch.manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    nn.init.uniform_(model.weight, 0.04, 0.06)  # where a step of bfloat16 is 2.4e-4
    model = model.bfloat16()
    before = model.weight.detach().float()
    optimizer = AdamW(model, weight_decay=0.0)
    first = optimizer.masters["weight"].clone()
    direction = torch.randn(256, 256).sign().bfloat16()
    for _ in range(100):
        model.weight.grad = direction.clone()
        optimizer.accumulate()
        optimizer.step(1e-6, clip=1e9)
    moved = -direction.float() * (optimizer.masters["weight"] - first)
    assert (moved > 0).float().mean() >= 0.99 and moved.mean().item() == pytest.approx(1e-4, rel=0.01)
    seen = (-direction.float() * (model.weight.detach().float() - before)).mean().item()
    if start is dithered:
        assert seen == pytest.approx(1e-4, rel=0.05)
    else:
        assert seen == 0


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
        measured = ("time", "tokens_per_second", "memory_gb")
        return [{k: v for k, v in json.loads(t).items() if k not in measured} for t in text]

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
