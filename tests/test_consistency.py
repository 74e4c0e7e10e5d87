"""Ranking, correlation, agreement and pairs, against SciPy and examples worked by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from scipy import stats

from cream.config import ConsistencyConfig
from cream.consistency import agreement_of, correlation, pick, rank, rank_round, spearman_rho, top_order
from cream.data import Example

NAN, INF = float("nan"), float("inf")


def rankings_of(current, previous, config=None, ids=None, **kwargs):
    current, previous = np.array(current, dtype=float), np.array(previous, dtype=float)
    names = [f"p{i}" for i in range(len(current))]
    ids = ids or [[[10 * p + r] for r in range(current.shape[1])] for p in range(len(current))]
    return rank(names, ["quiz"] * len(names), current, previous, ids, config or ConsistencyConfig(), **kwargs)


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (50, 6)).astype(float), rng.normal(size=(50, 6))
    x[0] = 1.0  # all tied
    y[1, 3] = NAN
    y[2, 2] = -INF
    with np.errstate(invalid="ignore"):
        truth = [stats.spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else NAN for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(spearman_rho(x, y), truth, atol=1e-12)
    assert np.isnan(spearman_rho(x, y)[:2]).all()


def test_kendall_is_scipys_and_is_rescaled():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, 5)), rng.integers(0, 3, (40, 5)).astype(float)
    tau, consistency = correlation(x, y, "kendall")
    truth = [stats.kendalltau(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(tau, truth, atol=1e-12)
    np.testing.assert_allclose(consistency, (np.array(truth) + 1) / 2, atol=1e-12)


def test_top_order_asks_for_best_and_worst_not_for_first_and_last():
    x = np.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [NAN, 1.0, 2.0]])
    y = np.array([[9.0, 1.0, 2.0], [9.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(top_order(x, y), [1.0, 0.0, 1.0, NAN, NAN])
    # The released code's comparison of response 0 with response N - 1 calls this disagreement; best and worst agree.
    x, y = np.array([[2.0, 9.0, 1.0, 3.0]]), np.array([[4.0, 9.0, 1.0, 3.5]])
    assert np.argsort(np.argsort(x[0]))[3] != np.argsort(np.argsort(y[0]))[3] and top_order(x, y)[0] == 1


@pytest.mark.parametrize(("tau", "linear", "exact"), [(0.84, 0.92, 0.931), (0.46, 0.73, 0.825), (-0.22, 0.39, 0.725)])
def test_maps_from_tau_to_agreement(tau, linear, exact):
    consistency = (tau + 1) / 2
    assert agreement_of(consistency, "linear") == pytest.approx(linear)
    assert agreement_of(consistency, "exact") == pytest.approx(exact, abs=5e-4)
    assert agreement_of(consistency, "clamp") == pytest.approx(max(linear, 0.5))


def test_exact_map_is_theorem_3_3():
    weight = np.linspace(0, 1, 11)  # lambda; Lemma 3.4: E tau = 1 - 2 lambda
    consistency = ((1 - 2 * weight) + 1) / 2
    np.testing.assert_allclose(agreement_of(consistency, "exact"), (1 + weight) / (1 + 2 * weight))


def test_identical_answers_are_ties_not_agreement():
    """The released code breaks ties by position in both lists: an exact reversal with four duplicates scores 0.6."""
    current, previous = [[2.0, 1.0, 1.0, 1.0, 1.0]], [[1.0, 2.0, 2.0, 2.0, 2.0]]
    assert rankings_of(current, previous)[0].tau == pytest.approx(-1)
    assert rankings_of(current, previous)[0].consistency == pytest.approx(0)


def test_average_level_is_one_number_and_dyn_is_each_its_own():
    current = [[1.0, 2.0, 3.0]] * 3
    previous = [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]]  # tau 1, -1, 1/3
    average = rankings_of(current, previous)
    assert [r.tau for r in average] == pytest.approx([1, -1, 1 / 3])
    assert [r.agreement for r in average] == pytest.approx([(1 + 0 + 2 / 3) / 3] * 3)
    dyn = rankings_of(current, previous, ConsistencyConfig(level="dyn"))
    assert [r.agreement for r in dyn] == pytest.approx([1, 0, 2 / 3])
    clamped = rankings_of(current, previous, ConsistencyConfig(level="dyn", map="clamp"))
    assert [r.agreement for r in clamped] == pytest.approx([1, 0.5, 2 / 3])
    constant = rankings_of(current, previous, ConsistencyConfig(level="constant", constant=0.8))
    assert [r.agreement for r in constant] == pytest.approx([0.8] * 3)


def test_a_ranking_that_says_nothing_is_left_out_of_the_mean_and_gets_a_half():
    current = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    previous = [[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]
    average = rankings_of(current, previous)
    assert [r.tau for r in average] == [1.0, None]
    assert [r.agreement for r in average] == [1.0, 1.0]
    assert rankings_of(current, previous, ConsistencyConfig(level="dyn"))[1].agreement == 0.5
    nothing = rankings_of(current[1:], previous[1:])
    assert nothing[0].agreement == 0.5


def test_first_round_without_a_previous_ranking_trusts_every_pair():
    ranking = rankings_of([[1.0, 2.0, 3.0]], [[NAN, NAN, NAN]], trust=True)[0]
    assert (ranking.tau, ranking.agreement, ranking.chosen, ranking.rejected) == (None, 1.0, 2, 0)


@pytest.mark.parametrize(
    ("rewards", "ids", "expected"),
    [
        ([1.0, 3.0, 2.0], [[1], [2], [3]], (1, 0, None)),
        ([3.0, 3.0, 1.0, 1.0], [[1], [2], [3], [4]], (0, 2, None)),  # of equals the first
        ([2.0, 2.0, 2.0], [[1], [2], [3]], (None, None, "tied")),
        ([1.0, 2.0], [[7, 8], [7, 8]], (None, None, "identical")),
        ([NAN, 1.0, 2.0], [[1], [2], [3]], (2, 1, None)),  # numpy's argmax would choose the NaN
        ([INF, 1.0, 2.0], [[1], [2], [3]], (2, 1, None)),
        ([NAN, 1.0, NAN], [[1], [2], [3]], (None, None, "nan")),
    ],
)
def test_best_and_worst(rewards, ids, expected):
    assert pick(np.array(rewards), ids) == expected


def round_on_disk(tmp_path, order):
    """Three prompts with R = 3; the second is all tied. Rows in the given order."""
    rewards = {"a": [1.0, 2.0, 3.0], "b": [5.0, 5.0, 5.0], "c": [9.0, 7.0, 8.0]}
    previous = {"a": [3.0, 2.0, 1.0], "b": [1.0, 2.0, 3.0], "c": [3.0, 1.0, 2.0]}
    responses, scores = [], []
    for name in "abc":
        for r in range(3):
            responses.append(
                {"prompt_id": name, "task": "quiz", "index": r, "prompt_ids": [ord(name)], "ids": [r, ord(name)],
                 "text": f"{name}{r}", "finish": "stop"}
            )  # fmt: skip
            scores.append(
                {"prompt_id": name, "index": r, "num_tokens": 2, "logp_policy": -float(ord(name) + r),
                 "logp_previous": 0.0, "logp_reference": 0.0, "reward": rewards[name][r],
                 "previous_reward": previous[name][r]}
            )  # fmt: skip
    order.shuffle(responses)
    order.shuffle(scores)
    path = tmp_path / "scores.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(scores), path)
    examples = [Example(n, "quiz", ({"role": "user", "content": f"question {n}"},), None, None, n) for n in "abc"]
    return path, responses, examples


@pytest.mark.parametrize("seed", range(4))
def test_consistency_follows_its_prompt_whatever_the_order_of_rows(tmp_path, seed):
    """The released code zips keys with rates after skipping some: every later prompt gets another's consistency."""
    path, responses, examples = round_on_disk(tmp_path, np.random.default_rng(seed))
    pairs, rankings, summary = rank_round(path, responses, examples, ConsistencyConfig(level="dyn"))
    by_id = {r.prompt_id: r for r in rankings}
    assert by_id["a"].tau == pytest.approx(-1) and by_id["c"].tau == pytest.approx(1)
    assert by_id["b"].dropped == "tied" and by_id["b"].tau is None
    agreement = {p["prompt_id"]: p["agreement"] for p in pairs}
    assert agreement == {"a": pytest.approx(0), "c": pytest.approx(1)}
    pair = next(p for p in pairs if p["prompt_id"] == "c")
    assert (pair["chosen"], pair["rejected"], pair["prompt"]) == ("c0", "c1", "question c")
    assert (pair["logp_chosen"], pair["logp_rejected"]) == (-99.0, -100.0)
    assert pair["chosen_ids"] == [0, 99] and pair["prompt_ids"] == [99]
    assert summary["prompts"] == 3 and summary["kept"] == 2
    assert summary["dropped"] == {"tied": 1, "identical": 0, "nan": 0}
    assert summary["kept"] + sum(summary["dropped"].values()) == summary["prompts"]
    assert summary["tau_mean"] == pytest.approx(0) and summary["reward_margin"] == pytest.approx(2)
    assert summary["tied_rankings"] == 1 and summary["mean_response_tokens"] == 2 and summary["stopped"] == 1
