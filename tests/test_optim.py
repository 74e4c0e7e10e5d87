"""The optimizer against torch's AdamW, tiny steps on bfloat16 weights, and a descent that a kill does not change."""

import contextlib
import copy
import json

import pytest
import torch
from torch import nn

from cream.adamw import (
    BLOCK,
    decode_m,
    decode_v,
    dithered,
    encode_m,
    encode_v,
    join,
    split,
    thresholds,
    update_,
)
from cream.checkpoint import load_latest, save_step
from cream.config import OptimConfig
from cream.log import Metrics, UserError
from cream.optim import AdamW, Schedule, descend, learning_rate


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 1)).to(dtype)


def data(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 1, generator=generator)


def backward(model, x, y):
    ((model(x) - y) ** 2).mean().backward()


def push(weight, gradient):
    """A backward whose gradient in `weight` is `gradient`."""
    (weight * gradient).sum().backward()


# --- the arithmetic


UPPER = torch.tensor([0x0000, 0x0001, 0x007F, 0x0080, 0x3C7F, 0x3F80, 0x3F81, 0x4049, 0x7F7F, 0x7F80])


def test_weight_and_low_bits_are_every_float32_of_some_weights():
    """All 2^16 low halves beside zero, subnormals, 1 and its neighbours, odd and even mantissas, the largest numbers,
    infinity, and each negative: the same bits come back, and the weight is the bfloat16 nearest to them."""
    upper = torch.cat([UPPER, UPPER + 0x8000]) << 16
    bits = (upper[:, None] + torch.arange(0x10000)).to(torch.int32)
    master = bits.view(torch.float32)
    weight, low = split(master)
    assert weight.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(join(weight, low).view(torch.int32), bits)
    finite = master.isfinite()
    nearest = master.bfloat16()
    tie = (bits & 0xFFFF) == 0x8000
    assert torch.equal(weight[finite & ~tie], nearest[finite & ~tie])
    difference = (weight.double() - master.double()).abs(), (nearest.double() - master.double()).abs()
    tie &= weight.isfinite() & nearest.isfinite()
    assert tie.sum() == 16 and torch.equal(difference[0][tie], difference[1][tie])  # as near, away from zero
    assert (weight[tie].abs() >= master[tie].abs()).all()


def test_every_weight_comes_back_with_the_ends_of_its_low_bits():
    weight = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    number = ~weight.isnan() & (weight.view(torch.int16) != 0) & (weight.view(torch.int16) != -0x8000)
    for end in (-0x8000, -0x7FFF, -1, 0, 1, 0x7FFF):
        low = torch.full_like(weight, end, dtype=torch.int16)
        again = split(join(weight, low))
        assert torch.equal(again[0][number].view(torch.int16), weight[number].view(torch.int16))
        assert torch.equal(again[1][number], low[number])
    for zero in (0.0, -0.0):  # which have no room below: dithered() and steps never ask for it
        weight, low = split(torch.tensor([zero]))
        assert low == 0 and torch.equal(weight.view(torch.int16), torch.tensor([zero]).bfloat16().view(torch.int16))


def test_dithered_masters_round_to_their_weights_and_lean_nowhere():
    torch.manual_seed(0)
    weight = torch.randn(400, 400).bfloat16()
    weight[0, :6] = torch.tensor([0.0, -0.0, 1.0, -2.0, 1e-39, 3e38])  # powers of two have half the room below
    low = dithered(weight, 0)
    master = join(weight, low)
    assert torch.equal(master.bfloat16(), weight) and torch.equal(split(master)[0], weight)
    assert torch.equal(low, dithered(weight, 0)) and (low != 0).float().mean() > 0.99
    assert torch.equal(master[0, :2], torch.zeros(2)) and master[0, 4] == weight[0, 4]
    relative = (master / weight.float() - 1)[1:]
    assert relative.abs().max() <= 2**-8 and relative.mean().abs() <= 2e-5
    with pytest.raises(ValueError, match="masters are for bfloat16 weights, not torch.float16"):
        dithered(weight.half(), 0)


def test_masters_start_anew_in_each_tensor_and_each_training():
    """Else the elements that a small step moves are the same ones in every layer and every round."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).bfloat16()
    nn.init.ones_(model[0].weight), nn.init.ones_(model[1].weight)

    def starts(**which):
        state = AdamW(model, OptimConfig(), weight_decay=0.0, clip=0, **which).state
        return [state[name]["low"].flatten().double() for name in ("0.weight", "1.weight")]

    one, again, two = starts(training="0/sft"), starts(training="0/sft"), starts(training="0/iter1/train")
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    correlations = torch.corrcoef(torch.stack([*one, *two])) - torch.eye(4)
    assert correlations.abs().max() < 0.03  # 7 times what chance makes of 65,536


@pytest.mark.parametrize("which", ["m", "v"])
def test_codes_are_near_and_right_in_the_mean(which):
    torch.manual_seed(0)
    encode, decode = (encode_m, decode_m) if which == "m" else (encode_v, decode_v)
    value = torch.randn(64, BLOCK) * torch.rand(64, BLOCK)
    value = value if which == "m" else value**4
    value[0], value[1, ::2], value[2] = 0.0, 0.0, value[2] * 1e-20
    draws = [decode(*encode(value, thresholds(draw, value.device))) for draw in range(200)]
    largest = value.abs().amax(1, keepdim=True)
    levels, power = (127, 2) if which == "m" else (255, 4)
    unit = largest / levels**power
    below = (value.abs() / unit.clamp(min=1e-38)) ** (1 / power) // 1.0001
    for found in (draws[0], draws[7]):
        assert ((found - value).abs() <= ((below + 2) ** power - below**power) * unit).all()
        assert torch.equal(found.sign()[found != 0], value.sign()[found != 0])
        assert torch.equal(found == 0, value == 0) or which == "m"  # what divides is never rounded to 0
    clear = value.abs() > 1e-3 * largest
    mean = torch.stack(draws).mean(0)
    assert ((mean - value).abs() <= 2e-3 * value.abs())[clear].float().mean() > 0.99
    again = decode(*encode(draws[0], thresholds(99, value.device)))
    torch.testing.assert_close(again, draws[0], rtol=1e-6, atol=0)  # what is on a code stays there


def test_update_can_be_one_compiled_graph():
    """What a GPU runs, through everything but code generation: no graph break, and the same step to rounding."""
    traced = torch.compile(update_, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.manual_seed(0)
    weight = (torch.randn(4, BLOCK) / 50).bfloat16()
    zeros = [torch.zeros(4, BLOCK, dtype=d) for d in (torch.int8, torch.uint8)]
    state = [dithered(weight, 0), zeros[0], torch.zeros(4, 1), zeros[1], torch.zeros(4, 1)]
    rest = [torch.randn(4, BLOCK).bfloat16(), torch.tensor(0.5), torch.tensor([1e-3, 30.0, 0.999])]
    results = []
    for step in (update_, traced):
        tensors = [t.clone() for t in (weight, *state)]
        for draw in range(3):
            step(*tensors, *rest, thresholds(draw, weight.device), (0.9, 0.999))
        results.append(tensors)
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(eager, graph)


# --- the optimizer


def test_float32_is_torchs_adamw_with_clipping():
    ours, theirs = net(), net()
    optimizer = AdamW(ours, OptimConfig(), weight_decay=0.1, clip=0.5)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for step in range(20):
        x, y = data(step)
        optimizer.begin(1e-2)
        for model in (ours, theirs):
            backward(model, x, y)
        norm = optimizer.step()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        assert float(norm) == pytest.approx(float(expected))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bfloat16_masters_take_torchs_steps():
    """The same gradients through torch's AdamW on a float32 copy: the joined masters stay within float32's rounding."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32, bias=False).bfloat16()
    optimizer = AdamW(model, OptimConfig(), weight_decay=0.1, clip=0)
    master = nn.Parameter(join(model.weight.detach(), optimizer.state["weight"]["low"]))
    reference = torch.optim.AdamW([master], lr=1e-3, weight_decay=0.1)
    for _ in range(30):
        gradient = torch.randn(32, 64).bfloat16()
        optimizer.begin(1e-3)
        push(model.weight, gradient)
        optimizer.step()
        master.grad = gradient.float()
        reference.step()
    ours = join(model.weight.detach(), optimizer.state["weight"]["low"])
    torch.testing.assert_close(ours, master.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("start", [dithered, lambda weight, seed: torch.zeros_like(weight, dtype=torch.int16)],
                         ids=["dithered", "on the grid"])  # fmt: skip
def test_the_model_sees_a_learning_rate_of_1e_6(monkeypatch, start, moments):
    """100 steps of 1e-6 are 1e-4, less than half a bfloat16 step here: masters that start on the grid of bfloat16 move
    and the model does not; dithered ones carry it along, in the mean, to 5%."""
    monkeypatch.setattr("cream.optim.dithered", start)
    torch.manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    nn.init.uniform_(model.weight, 0.04, 0.06)  # where a step of bfloat16 is 2.4e-4
    model = model.bfloat16()
    optimizer = AdamW(model, OptimConfig(moments=moments), weight_decay=0.0, clip=0)
    before, low = model.weight.detach().clone(), optimizer.state["weight"]["low"]
    first = join(before, low)
    direction = torch.randn(256, 256).sign().bfloat16()
    for _ in range(100):
        optimizer.begin(1e-6)
        push(model.weight, direction)
        optimizer.step()
    moved = -direction.float() * (join(model.weight.detach(), low) - first)
    assert (moved > 0).float().mean() >= 0.99 and moved.mean().item() == pytest.approx(1e-4, rel=0.01)
    seen = (-direction.float() * (model.weight.detach().float() - before.float())).mean().item()
    if start is dithered:
        assert seen == pytest.approx(1e-4, rel=0.05)
    else:
        assert seen == 0


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, tie_word_embeddings=False, **shape))


TABLE = torch.randint(0, 256, (256, 4), generator=torch.Generator().manual_seed(1))


def text(step, rows=8, length=48):
    """Walks where each token has four successors: something to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = [torch.randint(0, 256, (rows,), generator=generator)]
    for _ in range(length - 1):
        tokens.append(TABLE[tokens[-1], torch.randint(0, 4, (rows,), generator=generator)])
    return torch.stack(tokens, 1)


def losses(dtype, config, steps, lr):
    """Of each step, and at the end on text that was not seen; with the module and the optimizer."""
    model = small_llama().to(dtype)
    optimizer = AdamW(model, config, weight_decay=0.01, clip=1.0)
    found = []
    for step in range(steps):
        optimizer.begin(learning_rate(step, steps, lr, 0.1))
        loss = model(input_ids=text(step), labels=text(step)).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    with torch.no_grad():
        held_out = float(model(input_ids=text(10**6, 64), labels=text(10**6, 64)).loss)
    return torch.tensor(found), held_out


def test_compact_state_follows_float32s_loss():
    """60 steps from 5.6 nats to 4: 8-bit moments alone to 1e-3 nats in every step; with bfloat16 weights and arithmetic
    too, whose own rounding is most of it, to a thousandth of the loss, and to 1e-3 nats on text that was not seen."""
    truth, truth_held_out = losses(torch.float32, OptimConfig(), 60, 2e-3)
    assert truth[-1] < truth[0] - 1
    eight, held_out = losses(torch.float32, OptimConfig(moments="int8"), 60, 2e-3)
    assert (eight - truth).abs().max() <= 1e-3 and abs(held_out - truth_held_out) <= 1e-3
    compact, held_out = losses(torch.bfloat16, OptimConfig(moments="int8", sums="bfloat16"), 60, 2e-3)
    assert ((compact - truth).abs() / truth).max() <= 1e-3 and abs(held_out - truth_held_out) <= 1e-3


def test_a_learning_rate_of_1e_6_changes_nearly_all_weights():
    """100 steps of a bfloat16 model, 8-bit moments: of the weights that ever had a gradient, 99% have changed."""
    model = small_llama().bfloat16()
    optimizer = AdamW(model, OptimConfig(moments="int8"), weight_decay=0.0, clip=1.0)
    masters = {n: join(p.detach(), optimizer.state[n]["low"]) for n, p in optimizer.parameters.items()}
    touched = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in optimizer.parameters.items()}
    for step in range(100):
        optimizer.begin(1e-6)
        model(input_ids=text(step, 2, 32), labels=text(step, 2, 32)).loss.backward()
        for name, gradient in optimizer.gradients.items():
            touched[name] |= gradient != 0
        optimizer.step()
    changed = total = 0
    for name, parameter in optimizer.parameters.items():
        moved = join(parameter.detach(), optimizer.state[name]["low"]) != masters[name]
        changed, total = changed + int(moved[touched[name]].sum()), total + int(touched[name].sum())
    assert total > 0.9 * sum(p.numel() for p in model.parameters()) and changed >= 0.99 * total


@pytest.mark.parametrize(
    "dtype, moments, expected",  # bytes of a weight with its state, less the scales' 8 in BLOCK
    [(torch.bfloat16, "int8", 6), (torch.bfloat16, "float32", 12), (torch.float32, "float32", 12)],
)
def test_bytes_of_state(dtype, moments, expected):
    model = nn.Linear(512, 512, bias=False).to(dtype)
    optimizer = AdamW(model, OptimConfig(moments=moments), weight_decay=0.0, clip=1.0)
    held = sum(t.nbytes for t in optimizer.tensors().values())
    assert held == 512 * 512 * (expected + (8 / BLOCK if moments == "int8" else 0))


@pytest.mark.parametrize("sums", ["float32", "bfloat16"])
def test_micro_batches_add_up(sums):
    """A gradient of 1 and then 512 of 2^-10: plain bfloat16 would lose the small ones, all of them."""
    model = nn.Linear(BLOCK, 4, bias=False).bfloat16()
    optimizer = AdamW(model, OptimConfig(sums=sums), weight_decay=0.0, clip=0)
    optimizer.begin(1e-3)
    for share in [1.0] + [2.0**-10] * 512:
        push(model.weight, torch.full_like(model.weight, share))
        assert model.weight.grad is None
    total = optimizer.gradients["weight"]
    if sums == "float32":
        assert total.dtype == torch.float32 and (total == 1.5).all()
    else:
        assert total.dtype == torch.bfloat16 and total.float().mean().item() == pytest.approx(1.5, rel=2e-3)
        assert (total.float() - 1.5).abs().max() <= 4 * 2.0**-8


RELEASING = [OptimConfig(clip_by="tensor"), OptimConfig(moments="int8", clip_by="tensor")]


@pytest.mark.parametrize("config", RELEASING, ids=["float32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_releasing_gradients_is_the_same_step_bit_for_bit(config, dtype):
    def run(known):
        model = small_llama().to(dtype)
        optimizer = AdamW(model, config, weight_decay=0.01, clip=0.05)
        norms = []
        for step in range(3):
            optimizer.begin(1e-3, micro_batches=1 if known else None)
            model(input_ids=text(step, 2), labels=text(step, 2)).loss.backward()
            assert bool(optimizer.gradients) is not known and all(p.grad is None for p in model.parameters())
            norms.append(float(optimizer.step()))
        return norms, optimizer.tensors()

    (plain_norms, plain), (norms, released) = run(False), run(True)
    assert norms == plain_norms and max(norms) > 0.05
    assert all(torch.equal(released[key], plain[key]) for key in plain)


def test_gradients_are_held_where_the_whole_norm_is_to_be_clipped():
    model = net()
    for clip, clip_by, count, releases in [
        (1.0, "global", 1, False),
        (0, "global", 1, True),
        (1.0, "tensor", 1, True),
        (1.0, "tensor", 2, False),
        (0, "global", None, False),
    ]:
        optimizer = AdamW(model, OptimConfig(clip_by=clip_by), weight_decay=0.0, clip=clip)
        optimizer.begin(1e-3, micro_batches=count)
        backward(model, *data(0))
        assert (not optimizer.gradients) is releases
        optimizer.close()


def test_clipping_by_tensor_holds_each_norm_and_leaves_what_global_leaves():
    """Gradients (3, 4) and (0.6, 0.8) at a limit of 2: the first's norm of 5 becomes 2, the second's of 1 stays."""
    for clip_by, expected in [("tensor", [0.4, 1.0]), ("global", [2 / 26**0.5] * 2)]:
        model = nn.ParameterList([nn.Parameter(torch.zeros(1, 2)) for _ in range(2)])
        optimizer = AdamW(model, OptimConfig(clip_by=clip_by), weight_decay=0.0, clip=2.0)
        optimizer.begin(1e-3)
        gradients = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
        (model[0] * gradients[0] + model[1] * gradients[1]).sum().backward()
        assert float(optimizer.step()) == pytest.approx(26**0.5)
        for name, gradient, factor in zip("01", gradients, expected, strict=True):
            torch.testing.assert_close(optimizer.state[name]["exp_avg"][0], gradient * 0.1 * factor)


def test_a_closed_optimizer_leaves_the_module_alone():
    model = net()
    AdamW(model, OptimConfig(), weight_decay=0.0, clip=1.0).close()
    backward(model, *data(0))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("config", [OptimConfig(), OptimConfig(moments="int8", sums="bfloat16")])
def test_saved_state_goes_on_bit_equal(tmp_path, config):
    """Through the step checkpoints, two micro-batches a step, bfloat16."""

    def take(optimizer, model, steps):
        for step in steps:
            optimizer.begin(1e-4)
            for part in (0, 1):
                ids = text(2 * step + part, 2, 16)
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    whole, model = [], small_llama().bfloat16()
    optimizer = AdamW(model, config, weight_decay=0.01, clip=1.0)
    take(optimizer, model, range(3))
    save_step(tmp_path, 3, optimizer.tensors(), {})
    take(optimizer, model, range(3, 6))
    whole = optimizer.tensors()
    step, tensors, _ = load_latest(tmp_path)
    other = small_llama().bfloat16()
    again = AdamW(other, config, weight_decay=0.01, clip=1.0)
    again.load(tensors, step)
    take(again, other, range(3, 6))
    assert whole.keys() == again.tensors().keys()
    assert all(torch.equal(whole[key], value) for key, value in again.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_with_whole_masters_is_read(dtype):
    """As version 0.1.0 wrote them: the master in float32 in place of weight and low bits."""
    model = net(dtype)
    optimizer = AdamW(model, OptimConfig(), weight_decay=0.0, clip=1.0)
    masters = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    old = {f"master/{n}": m for n, m in masters.items()}
    old |= {f"{key}/{n}": torch.rand_like(m) for n, m in masters.items() for key in ("exp_avg", "exp_avg_sq")}
    optimizer.load(old, 7)
    for name, parameter in model.named_parameters():
        low = optimizer.state[name].get("low")
        assert torch.equal(parameter if low is None else join(parameter.detach(), low), masters[name])
    assert optimizer.steps == 7


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


@pytest.mark.parametrize(("steps", "warmup", "trains"), [(1, 0.1, False), (1, 0.0, True), (2, 0.9, True)])
def test_a_training_whose_rate_is_never_above_0_is_refused(tmp_path, steps, warmup, trains):
    model = net()
    before = copy.deepcopy(model.state_dict())
    what_to_do = "iter1/train: .* set train.warmup to 0, .* train.batch_size or more train.epochs"
    with contextlib.nullcontext() if trains else pytest.raises(UserError, match=what_to_do):
        descent(tmp_path, model, steps=steps, warmup=warmup, stage="iter1/train")
    assert trains != all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Killed(BaseException):
    pass


def descent(tmp_path, model, steps=9, every=2, die_at=None, stage="sft", warmup=0.2):
    def micro_losses(step):
        x, y = data(step)
        for part in (slice(0, 3), slice(3, 8)):
            yield ((model(x[part]) - y[part]) ** 2).sum() / 8, {"count": torch.tensor(1.0)}, 5

    def after(step):
        if step == die_at:
            raise Killed

    schedule = Schedule(steps, 1e-2, warmup, 0.01, 1.0, every)
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
