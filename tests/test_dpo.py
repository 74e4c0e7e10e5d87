"""The weighted DPO step: ln 2 at the start, float64's loss and gradient, one trajectory however a batch is split."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cream.config import ModelConfig, TrainConfig
from cream.dpo import loss_of, train, windows
from cream.log import Metrics, UserError
from cream.model import Resident, head, load
from cream.packing import pack, read
from cream.score import score
from cream_kernels import linear_weighted_dpo

BETA = 0.1


def pairs_of(model, count=13, seed=0, agreement=None):
    """Pairs of random answers whose reference log-probs are the model's own, scored as a run scores them."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, 250, rng.integers(low, high)).tolist()

    groups = [(ids(3, 20), [ids(1, 20), ids(1, 20)]) for _ in range(count)]
    pairs = []
    for p, ((prompt, (chosen, rejected)), (a, b)) in enumerate(zip(groups, score(model, groups, 500), strict=True)):
        weight = float(rng.random()) if agreement is None else agreement
        pairs.append(
            {"prompt_id": f"p{p}", "agreement": weight, "prompt_ids": prompt, "chosen_ids": chosen,
             "rejected_ids": rejected, "logp_chosen": a, "logp_rejected": b}
        )  # fmt: skip
    return pairs


def written_out(model, pairs):
    """The mean loss of the paper's formula, one sequence at a time through transformers."""
    total = 0
    for pair in pairs:
        margin = 0
        for side, sign in (("chosen", 1), ("rejected", -1)):
            ids, answer = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]]), pair[f"{side}_ids"]
            logp = torch.log_softmax(model(ids, use_cache=False).logits[0, -len(answer) - 1 : -1], -1)
            summed = logp.gather(1, torch.tensor(answer)[:, None]).sum()
            margin = margin + sign * (summed - pair[f"logp_{side}"])
        h, c = BETA * margin, pair["agreement"]
        total = total - c * F.logsigmoid(h) - (1 - c) * F.logsigmoid(-h)
    return total / len(pairs)


def test_the_first_loss_is_ln_2(loaded):
    pairs = pairs_of(loaded)
    loss, logp, _ = loss_of(loaded, pairs, BETA)
    assert (loss - math.log(2)).abs().max() <= 1e-6
    reference = torch.tensor([[p["logp_chosen"], p["logp_rejected"]] for p in pairs])
    assert (logp.view(-1, 2) - reference).abs().max() <= 2e-5


def test_loss_and_gradient_are_the_papers_in_float64(tiny, other):
    from transformers import LlamaForCausalLM

    pairs = pairs_of(load(other, ModelConfig(dtype="float32")), count=6)  # another model's log-probs: margins are not 0
    ours = load(tiny, ModelConfig(dtype="float32")).requires_grad_(True)
    loss, _, _ = loss_of(ours, pairs, BETA)
    loss.mean().backward()
    exact = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    truth = written_out(exact, pairs)
    truth.backward()
    assert loss.mean().item() == pytest.approx(truth.item(), abs=1e-6)
    assert abs(truth.item() - math.log(2)) > 0.01
    for (name, p), (_, q) in zip(ours.named_parameters(), exact.named_parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name


def test_windows_take_every_pair_once_an_epoch():
    found = windows(10, 4, 3, seed=5)
    assert [len(w) for w in found] == [4, 3, 3] * 3  # not 4, 4, 2: the last step is no smaller than it must be
    for epoch in range(3):
        assert sorted(np.concatenate(found[3 * epoch : 3 * epoch + 3])) == list(range(10))
    assert not np.array_equal(found[0], found[3]) and np.array_equal(found[0], windows(10, 4, 1, seed=5)[0])


def trajectory(tmp_path, tiny, pairs, work, batch_tokens, name):
    model = load(tiny, ModelConfig(dtype="float32")).requires_grad_(True)
    config = TrainConfig(lr=3e-4, epochs=10, batch_size=8, batch_tokens=batch_tokens, beta=1.0)
    metrics = Metrics(tmp_path / f"{name}.jsonl")
    train(model, pairs, config, work, metrics, stage="iter1/train", seed=0)
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows]), rows, model


def unshared(monkeypatch):
    """Training as if nothing were shared: each answer with a copy of its prompt, alone in a row of its own."""

    def apart(model, pairs, beta):
        found = []
        for pair in pairs:
            prompt = pair["prompt_ids"]
            packs = [pack([(prompt, [pair[side]])], torch.device("cpu")) for side in ("chosen_ids", "rejected_ids")]
            hidden = torch.cat([read(model, packed) for packed in packs])
            reference = torch.tensor([pair["logp_chosen"], pair["logp_rejected"]])
            ends = torch.tensor([0, len(pair["chosen_ids"]), len(pair["chosen_ids"]) + len(pair["rejected_ids"])])
            targets, agreement = torch.cat([packed.targets for packed in packs]), torch.tensor([pair["agreement"]])
            found.append(linear_weighted_dpo(hidden, head(model), targets, ends, reference, agreement, beta=beta))
        return torch.cat([loss for loss, _ in found]), torch.cat([logp for _, logp in found]), packs[0]

    monkeypatch.setattr("cream.dpo.loss_of", apart)


def test_one_trajectory_however_pairs_are_packed(tmp_path, tiny, loaded, work, monkeypatch):
    """20 steps of 7 and 6 pairs: each pair by itself, several a row, all in one row, and nothing shared."""
    pairs = pairs_of(loaded, agreement=0.9)
    runs = {budget: trajectory(tmp_path, tiny, pairs, work, budget, f"m{budget}") for budget in (1, 80, 4096)}
    with monkeypatch.context() as patch:
        unshared(patch)
        runs["unshared"] = trajectory(tmp_path, tiny, pairs, work, 4096, "unshared")
    whole = runs[4096][0]
    assert len(whole) == 20 and whole[0] == pytest.approx(math.log(2), abs=1e-6)
    assert whole[-4:].mean() < whole[:4].mean() - 0.05  # it does learn
    for name in (1, 80, "unshared"):
        assert np.abs(runs[name][0] - whole).max() <= 1e-5, name
    row = runs[4096][1][-1]
    assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5)
    assert row["rewards/accuracies"] == 1.0
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "logps/rejected", "mfu", "memory_gb"} <= row.keys()


def test_a_step_takes_two_forwards_a_pair_and_none_of_the_reference(tmp_path, tiny, loaded, work):
    """The least that there can be: chosen and rejected under the policy, once an epoch, their prompt once."""
    pairs, fed, facts = pairs_of(loaded), [], {}
    work.facts = facts.update
    model = load(tiny, ModelConfig(dtype="float32")).requires_grad_(True)
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    metrics = Metrics(tmp_path / "m.jsonl")
    train(model, pairs, TrainConfig(batch_size=5, batch_tokens=60), work, metrics, stage="iter1/train", seed=0)
    tokens = sum(len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) - 2 for p in pairs)
    rows = metrics.rows()
    assert sum(fed) == sum(row["tokens"] for row in rows) == facts["tokens"] == tokens and len(fed) > len(rows) == 3
    assert [row["sequence_forwards_per_prompt"] for row in rows] == pytest.approx([2.0] * 3)
    assert facts["sequence_forwards_per_prompt"] == pytest.approx(2.0) and facts["mfu"] > 0


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_change_no_bit(tiny, loaded, mode):
    pairs, gradients = pairs_of(loaded, count=5), []
    for recompute in ("none", mode):
        model = Resident(tiny, ModelConfig(dtype="float32", gradient_checkpointing=recompute)).at(tiny, gradients=True)
        loss_of(model, pairs, BETA)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_agreement_a_half_pulls_nowhere_and_below_a_half_backwards(tmp_path, tiny, loaded):
    for agreement, sign in ((1.0, 1), (0.5, 0), (0.0, -1)):
        pairs = pairs_of(loaded, count=3, agreement=agreement)
        model = load(tiny, ModelConfig(dtype="float32")).requires_grad_(True)
        loss_of(model, pairs, BETA)[0].mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        if sign == 1:
            forwards = gradient
        elif sign == -1:
            torch.testing.assert_close(gradient, -forwards, rtol=0, atol=1e-6)
        else:
            assert gradient.norm() <= 1e-5 * forwards.norm()


def test_pairs_that_are_too_long_are_left_out_and_said(tmp_path, tiny, loaded, work, capsys):
    pairs = pairs_of(loaded, count=4)
    pairs[2]["chosen_ids"] = [5] * 60
    model = load(tiny, ModelConfig(dtype="float32")).requires_grad_(True)
    config = TrainConfig(batch_size=4, max_length=45, warmup=0.0)
    train(model, pairs, config, work, Metrics(tmp_path / "m.jsonl"), stage="iter1/train", seed=0)
    assert "iter1/train: 1 of 4 pairs are longer than train.max_length=45: left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="iter1/train: no pair fits train.max_length=4"):
        config = TrainConfig(batch_size=4, max_length=4)
        train(model, pairs, config, work, Metrics(tmp_path / "m.jsonl"), stage="iter1/train", seed=0)
