"""Scores against transformers in float64, one sequence at a time; rewards as paper and released code define them."""

import numpy as np
import pytest
import torch

from cream.config import ModelConfig, ScoreConfig
from cream.log import UserError
from cream.model import Resident
from cream.score import batches, previous_rewards, rewards, score, score_all, sequence_rows


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


def test_batches_hold_every_group_once_within_the_budget():
    groups = groups_of(1, 40)
    found = list(batches(groups, 300))
    assert sorted(i for batch in found for i in batch) == list(range(40)) and len(found) > 3
    for batch in found:
        width, longest = max(len(groups[i][0]) for i in batch), max(len(r) for i in batch for r in groups[i][1])
        tokens = len(batch) * width + sum(len(groups[i][1]) for i in batch) * longest
        assert tokens <= 300 or len(batch) == 1


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


def test_the_policys_ratio_to_itself_is_exactly_zero(tiny, work):
    resident = Resident(tiny, ModelConfig(dtype="float32"))
    same = {"policy": tiny, "previous": tiny, "reference": tiny}
    table = score_all(resident, same, responses_of(), ScoreConfig(), work, iteration=2).to_pydict()
    assert set(table["reward"]) == {0.0}


def test_too_long_is_named(tiny, work):
    resident = Resident(tiny, ModelConfig(dtype="float32"))
    with pytest.raises(UserError, match="score: prompt p0 with its longest answer is .* allow 5"):
        score_all(resident, {"policy": tiny}, responses_of(), ScoreConfig(max_length=5), work, iteration=1)


def test_rows_that_predict_response_tokens():
    ids, rows, targets, ends = sequence_rows([([1, 2], [3, 4]), ([5], [6]), ([7, 8, 9], [10])], "cpu")
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 10]]
    assert targets.tolist() == [3, 4, 6, 10] and ends.tolist() == [0, 2, 3, 4]
    assert ids.flatten()[rows].tolist() == [2, 3, 5, 9]
