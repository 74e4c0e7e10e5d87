"""Every token computed once within the budget, no small batch left over, and what is read is each sequence's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cream.model import hidden_states
from cream.packing import batches, group_tokens, labelled_tokens, pack, pack_labelled, read
from cream_kernels import IGNORE

CPU = torch.device("cpu")
sizes = st.lists(st.integers(1, 120), max_size=60)
tokens = st.lists(st.integers(0, 260), min_size=1, max_size=12)
groups = st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=5)), min_size=1, max_size=6)


@given(sizes, st.integers(1, 300))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_batches_hold_everything_once_within_the_budget_and_evenly(sizes, budget):
    made = batches(sizes, budget)
    assert sorted(i for batch in made for i in batch) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in batch) for batch in made]
    assert loads == sorted(loads, reverse=True)  # memory that does not suffice shows at once
    alone = [batch for batch, load in zip(made, loads, strict=True) if load > budget]
    assert all(len(batch) == 1 for batch in alone)
    rest = [i for batch in made[len(alone) :] for i in batch]
    if rest:
        assert loads[len(alone)] - loads[-1] <= max(sizes[i] for i in rest)
        fewest = -(-sum(sizes[i] for i in rest) // budget)
        assert len(made) - len(alone) <= 2 * fewest
    assert batches(list(sizes), budget) == made


def test_the_last_batch_is_not_small():
    """In order, 17 sizes of 100 in batches of 400 would leave a last one of 100."""
    assert [len(batch) for batch in batches([100] * 17, 400)] == [4, 4, 3, 3, 3]
    assert batches([], 10) == [] and batches([11, 3], 10) == [[0], [1]]


@given(groups)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_token_stands_once_at_its_place(groups):
    packed = pack(groups, CPU)
    assert packed.tokens == sum(map(group_tokens, groups)) == sum(packed.segments.lengths)
    assert packed.prompts == len(groups) and packed.sequences == sum(len(responses) for _, responses in groups)
    assert packed.targets.tolist() == [token for _, responses in groups for r in responses for token in r]
    assert packed.cu_seqlens.diff().tolist() == [len(r) for _, responses in groups for r in responses]
    # Walking back from each row through what its token sees spells the sequence up to there, once, in order.
    ids, positions, starts = packed.ids.tolist(), packed.positions.tolist(), [0]
    for n in packed.segments.lengths:
        starts.append(starts[-1] + n)
    used = set()
    rows = iter(packed.rows.tolist())
    for prompt, responses in groups:
        for response in responses:
            for n in range(len(response)):
                row = next(rows)
                c = next(c for c in range(len(starts) - 1) if starts[c] <= row < starts[c + 1])
                owner, shared = packed.segments.owner[c], packed.segments.shared[c]
                seen = [*range(starts[owner], starts[owner] + shared), *range(starts[c], row + 1)]
                assert [ids[t] for t in seen] == [*prompt, *response[:n]]
                assert [positions[t] for t in seen] == list(range(len(seen)))
                used |= set(seen)
    assert used == set(range(packed.tokens))  # none is computed for nothing


@given(groups)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_varlen_kernels_get_the_same_segments(groups):
    segments = pack(groups, CPU).segments
    index = segments.kv_index.tolist() if segments.kv_index is not None else list(range(sum(segments.lengths)))
    at = 0
    for c, (n, owner, shared) in enumerate(zip(segments.lengths, segments.owner, segments.shared, strict=True)):
        begin, end = segments.cu_seqlens_k[c : c + 2].tolist()
        starts = segments.cu_seqlens_q.tolist()
        assert starts[c] == at and starts[c + 1] == at + n and segments.cu_seqlens_q.dtype == torch.int32
        assert index[begin:end] == [*range(starts[owner], starts[owner] + shared), *range(at, at + n)]
        at += n
    assert segments.max_seqlen_q == max(segments.lengths)
    assert segments.max_seqlen_k == int(segments.cu_seqlens_k.diff().max()) and len(index) == segments.cu_seqlens_k[-1]
    assert segments.seen == sum(
        shared + i + 1 for n, shared in zip(segments.lengths, segments.shared, strict=True) for i in range(n)
    )


def test_sharing_pays_what_token_counts_say():
    """Prompt 200, answers of 400: 5 (P + C) = 3000 tokens become P + 5 C = 2200, 2 (P + C) = 1200 become 1000."""
    prompt, answer = [1] * 200, [2] * 401  # the last token of an answer predicts nothing
    assert pack([(prompt, [answer] * 5)], CPU).tokens == 2200
    assert pack([(prompt, [answer] * 2)], CPU).tokens == 1000


def test_conversations_are_read_up_to_their_last_label():
    packed = pack_labelled([([1, 2, 3, 4, 5], [IGNORE, IGNORE, 3, IGNORE, IGNORE]), ([6, 7], [IGNORE, 7])], CPU)
    assert packed.ids.tolist() == [1, 2, 6] and packed.positions.tolist() == [0, 1, 0]
    assert packed.rows.tolist() == [1, 2] and packed.targets.tolist() == [3, 7]
    assert packed.cu_seqlens.tolist() == [0, 1, 2] and packed.segments.lengths == (2, 1)
    assert labelled_tokens(([1, 2, 3, 4, 5], [IGNORE, IGNORE, 3, IGNORE, IGNORE])) == 2


@pytest.mark.parametrize("group", [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_nothing_to_predict_is_refused(group):
    with pytest.raises(ValueError, match="without tokens"):
        pack([group], CPU)
    with pytest.raises(ValueError, match="without labels"):
        pack_labelled([([1, 2], [5, IGNORE])], CPU)  # nothing predicts a first token


def test_what_is_read_is_each_sequences_own(loaded):
    """Whole model, prompts of 1 to 200 tokens with 1 to 5 answers of 1 to 40, against one sequence at a time."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, 250, (n,), generator=generator).tolist()

    made = [(ids(p), [ids(n) for n in lengths]) for p, lengths in
            [(7, [9]), (1, [1, 1]), (200, [3, 40, 1]), (30, [1, 5, 2, 17, 1]), (2, [25, 1, 1, 4])]]  # fmt: skip
    together = read(loaded, pack(made, CPU)).split([len(r) for _, responses in made for r in responses])
    sequences = [(prompt, r) for prompt, responses in made for r in responses]
    for (prompt, response), found in zip(sequences, together, strict=True):
        alone = hidden_states(loaded, torch.tensor([[*prompt, *response]]))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
