"""Scores against transformers in float64, one sequence at a time; rewards as paper and released code define them."""

import numpy as np
import pytest
import torch

from cream.config import ModelConfig, ScoreConfig
from cream.log import UserError
from cream.model import Resident
from cream.score import Done, engine_gap, previous_rewards, rewards, score, score_all


def truth(directory, prompt, response):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0], -1)
    at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(float(logp[i, token]) for i, token in zip(at, response, strict=True))


def groups_of(seed=0, count=6):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, 250, rng.integers(low, high)).tolist()

    return [(ids(2, 30), [ids(1, 25) for _ in range(rng.integers(1, 5))]) for _ in range(count)]


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_sums_of_log_probs_are_transformers_in_float64(loaded, tiny, batch_tokens):
    groups = groups_of()
    found = score(loaded, groups, batch_tokens)
    for (prompt, responses), values in zip(groups, found, strict=True):
        expected = [truth(tiny, prompt, r) for r in responses]
        np.testing.assert_allclose(values, expected, rtol=0, atol=2e-5)


def test_prompts_shared_or_not_and_however_packed_are_one_score(loaded):
    groups = groups_of(3, 9)
    together = score(loaded, groups, 10_000)
    for budget in (1, 60, 300):
        for values, expected in zip(score(loaded, groups, budget), together, strict=True):
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)
    alone = score(loaded, [(prompt, [r]) for prompt, responses in groups for r in responses], 1)
    np.testing.assert_allclose(np.concatenate(alone), np.concatenate(together), rtol=0, atol=1e-5)


def test_the_same_answer_twice_is_a_tie_to_the_last_bit_and_computed_once(loaded):
    [(prompt, responses)], done = groups_of(5, 1), Done()
    a, b = responses[0], [*responses[0], 7]
    found = score(loaded, [(prompt, [a, b, a, list(a), b])], 1000, done=done)[0]
    assert found[0] == found[2] == found[3] != found[1] == found[4]
    assert done.tokens == len(prompt) + len(a) - 1 + len(b) - 1


def test_no_token_is_computed_twice_and_no_padding(loaded):
    """What the model is fed is what was asked for: prompts once, answers without their last token, nothing else."""
    groups, fed = groups_of(4, 7), []
    watch = loaded.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    done = Done()
    score(loaded, groups, 100, done=done)
    watch.remove()
    tokens = sum(len(p) + sum(len(r) - 1 for r in responses) for p, responses in groups)
    assert sum(fed) == done.tokens == tokens and len(fed) > 2


def test_log_probs_a_token_of_what_is_asked_for(loaded):
    groups = groups_of(6, 4)
    asked = {(i, tuple(groups[i][1][0])): None for i in (0, 3)}
    sums = score(loaded, groups, 40, tokens=asked)
    for (i, response), logp in asked.items():
        assert logp.shape == (len(response),)
        np.testing.assert_allclose(float(logp.double().sum()), sums[i][0], atol=1e-9)
    exact = {key: logp.tolist() for key, logp in asked.items()}
    count = sum(map(len, exact.values()))
    assert engine_gap(exact, asked) == [0.0, 0.0, count] and engine_gap({}, {}) == [0.0, 0.0, 0]
    off = {key: [values[0] - 0.5, *values[1:]] for key, values in exact.items()}
    np.testing.assert_allclose(engine_gap(off, asked), [1.0, 0.5, count], atol=1e-6)


def test_engine_and_trainer_are_compared(loaded, tiny, work, capsys):
    """What sampling told of some answers is set beside the policy's own scores, once, and survives a restart."""
    resident = Resident(tiny, ModelConfig(path=str(tiny), dtype="float32"))
    responses = []
    for p, (prompt, answers) in enumerate(groups_of(7, 5)):
        for r, ids in enumerate(answers):
            told = None
            if r == 0:
                key = (0, tuple(ids))
                tokens = {key: None}
                score(loaded, [(prompt, [ids])], 1000, tokens=tokens)
                told = (tokens[key] + 0.25).tolist()
            responses.append({"prompt_id": f"p{p}", "index": r, "prompt_ids": prompt, "ids": ids, "engine_logp": told})
    checkpoints = dict.fromkeys(("policy", "previous", "reference"), tiny)
    config, count = ScoreConfig(chunk_size=2), sum(len(row["ids"]) for row in responses if row["index"] == 0)
    for _ in range(2):
        work.recorded.clear()
        score_all(resident, checkpoints, responses, config, work, iteration=2)
        facts = work.recorded
        assert facts["engine_gap_tokens"] == count
        assert abs(facts["engine_gap_mean"] - 0.25) < 1e-5 and abs(facts["engine_gap_max"] - 0.25) < 1e-4
        said = capsys.readouterr().err
        assert "iter2: log-probs of engine and trainer differ by 0.25 nats a token in the mean, 0.25 at most" in said


def test_nothing_to_score_is_refused(loaded):
    with pytest.raises(ValueError, match="without tokens"):
        score(loaded, [([1, 2], [[3], []])], 100)


def test_rewards():
    logp, reference, tokens = np.array([[-4.0, -9.0]]), np.array([[-5.0, -7.0]]), np.array([[2, 4]])
    np.testing.assert_array_equal(rewards(logp, reference, tokens, kind="dpo", length_normalize=False), [[1, -2]])
    np.testing.assert_array_equal(rewards(logp, reference, tokens, kind="dpo", length_normalize=True), [[0.5, -0.5]])
    np.testing.assert_array_equal(rewards(logp, reference, tokens, kind="likelihood", length_normalize=False), logp)


def test_first_round_needs_a_stand_in_for_a_ratio_that_is_zero():
    previous, reference, tokens = np.array([[-6.0, -8.0]]), np.array([[-5.0, -7.0]]), np.array([[2, 4]])

    def past(first, **kwargs):
        return previous_rewards(previous, reference, tokens, ScoreConfig(**kwargs), first=first)

    np.testing.assert_array_equal(past(True, first_round="mean_logp"), [[-2.5, -1.75]])
    assert past(True, first_round="one") is None
    np.testing.assert_array_equal(past(True, first_round="sft_half"), [[-1, -1]])
    for choice in ("mean_logp", "one", "sft_half"):
        np.testing.assert_array_equal(past(False, first_round=choice), [[-1, -1]])
        np.testing.assert_array_equal(past(True, first_round=choice, reward="likelihood"), previous)


def responses_of():
    rows = []
    for p, (prompt, answers) in enumerate(groups_of(2, 5)):
        rows += [
            {"prompt_id": f"p{p}", "task": "chat", "index": r, "prompt_ids": prompt, "ids": ids, "finish": "stop"}
            for r, ids in enumerate([*answers, [5, 6], [7]][:2])
        ]
    return rows


def test_three_checkpoints_take_turns_in_one_module(tiny, other, work):
    resident, rows = Resident(tiny, ModelConfig(dtype="float32")), responses_of()
    checkpoints = {"policy": other, "previous": tiny, "reference": tiny}
    config = ScoreConfig(chunk_size=2, batch_tokens=200)
    table = score_all(resident, checkpoints, rows, config, work, iteration=2).to_pydict()
    policy = np.array([truth(other, r["prompt_ids"], r["ids"]) for r in rows])
    reference = np.array([truth(tiny, r["prompt_ids"], r["ids"]) for r in rows])
    np.testing.assert_allclose(table["logp_policy"], policy, atol=2e-5)
    np.testing.assert_allclose(table["logp_reference"], reference, atol=2e-5)
    assert table["logp_previous"] == table["logp_reference"]
    np.testing.assert_allclose(table["reward"], policy - reference, atol=4e-5)
    assert table["num_tokens"] == [len(r["ids"]) for r in rows]
    assert table["prompt_id"] == [r["prompt_id"] for r in rows] and table["index"] == [r["index"] for r in rows]


def test_each_checkpoint_scores_each_answer_once(tiny, other, work, monkeypatch):
    """R = 2 forwards a prompt and distinct checkpoint: the least that there can be. Weights are swapped as often."""
    from cream import model

    swaps, load_weights = [], model.load_weights
    monkeypatch.setattr(model, "load_weights", lambda module, path: (swaps.append(path), load_weights(module, path)))
    for checkpoints, expected, loads in (
        ({"policy": other, "previous": tiny, "reference": tiny}, 4, 2),  # the module starts as `tiny`
        ({"policy": tiny, "previous": tiny, "reference": tiny}, 2, 0),
    ):
        facts, swaps[:] = {}, []
        work.facts = facts.update
        work.directory = work.directory.with_name(str(expected))
        resident = Resident(tiny, ModelConfig(dtype="float32"))
        rows = responses_of()
        score_all(resident, checkpoints, rows, ScoreConfig(chunk_size=2, batch_tokens=50), work, iteration=1)
        assert facts["sequence_forwards_per_prompt"] == expected and len(swaps) == loads
        assert facts["tokens"] > 0 and facts["mfu"] > 0 and facts["memory_gb"] > 0


def test_the_policys_ratio_to_itself_is_exactly_zero(tiny, work):
    resident = Resident(tiny, ModelConfig(dtype="float32"))
    same = {"policy": tiny, "previous": tiny, "reference": tiny}
    table = score_all(resident, same, responses_of(), ScoreConfig(), work, iteration=2).to_pydict()
    assert set(table["reward"]) == {0.0}


def test_too_long_is_named(tiny, work):
    resident = Resident(tiny, ModelConfig(dtype="float32"))
    with pytest.raises(UserError, match="score: prompt p0 with its longest answer is .* allow 5"):
        score_all(resident, {"policy": tiny}, responses_of(), ScoreConfig(max_length=5), work, iteration=1)
