"""Sampling: what is drawn depends on names and seed alone, and is what the model's distribution says."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaForCausalLM

from cream.config import SampleConfig
from cream.data import Example, encode_prompt
from cream.decode import Decoder, capturable
from cream.log import UserError
from cream.model import stop_ids
from cream.sample import RECORDED, generate, logits_of, sample, stream
from cream_kernels import linear_logp_native
from tests.conftest import tiny_config


def prompts_of(tokenizer, texts):
    return [encode_prompt(tokenizer, [{"role": "user", "content": t}]) for t in texts]


def examples_of(texts):
    return [Example(f"id-{t}", "chat", ({"role": "user", "content": t},), None, None, t) for t in texts]


def plain_greedy(model, prompt, count, stop):
    """The whole sequence through transformers again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stop:
                break
    return ids[len(prompt) :]


def test_streams_are_of_the_response_alone():
    first = stream(0, 1, "a", 0, 8)
    assert np.array_equal(first, stream(0, 1, "a", 0, 8)) and np.array_equal(first[:3], stream(0, 1, "a", 0, 3))
    for other in [(1, 1, "a", 0), (0, 2, "a", 0), (0, 1, "b", 0), (0, 1, "a", 1)]:
        assert not np.array_equal(first, stream(*other, 8))
    many = np.concatenate([stream(0, 1, str(i), 0, 50) for i in range(200)])
    assert stats.kstest(many, "uniform").pvalue > 1e-3 and (many >= 0).all() and (many < 1).all()


def test_greedy_with_cache_and_padding_is_greedy_without(loaded, tokenizer):
    prompts = prompts_of(tokenizer, ["a", "what is two and two?", "hello there"])
    stop = stop_ids(loaded, tokenizer)
    answers = generate(loaded, prompts, None, max_new_tokens=80, stop=stop)  # beyond one growth of the cache
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids == plain_greedy(loaded, prompt, 80, stop)


def test_a_stop_token_ends_an_answer_and_is_part_of_it(loaded, tokenizer):
    prompts = prompts_of(tokenizer, ["a", "what is two and two?", "hello there"])
    free = generate(loaded, prompts, None, max_new_tokens=70, stop=[])
    assert [len(a.ids) for a in free] == [70] * 3 and {a.finish for a in free} == {"length"}
    stop = free[0].ids[5]
    ticks = []
    stopped = generate(loaded, prompts, None, max_new_tokens=70, stop=[stop], tick=ticks.append)
    assert sum(ticks) == 3
    for before, after in zip(free, stopped, strict=True):
        end = before.ids.index(stop) + 1 if stop in before.ids else 70
        assert after.ids == before.ids[:end]
        assert after.finish == ("stop" if stop in before.ids else "length")


def test_responses_do_not_depend_on_order_or_company(loaded, tokenizer):
    texts = ["a", "what is two and two?", "hello there", "b c", "one more prompt"]
    stop = stop_ids(loaded, tokenizer)

    def draw(order):
        prompts = prompts_of(tokenizer, [texts[i] for i in order])
        uniform = np.stack([stream(7, 1, texts[i], r, 20) for i in order for r in range(3)])
        found = generate(
            loaded, prompts, uniform, responses=3, max_new_tokens=20, stop=stop, temperature=0.9, top_p=0.95
        )
        return {(i, r): found[n * 3 + r].ids for n, i in enumerate(order) for r in range(3)}

    together, alone = draw(range(5)), {}
    for i in (3, 1, 0, 4, 2):
        alone |= draw([i])
    assert together == alone and draw([4, 2, 0, 1, 3]) == together
    assert len({tuple(v) for v in together.values()}) > 10


@pytest.mark.parametrize("path", ["native", "torch"])
@pytest.mark.parametrize("slots", [1, 3, 7, 16])
def test_slots_are_refilled_and_change_nothing(loaded, tokenizer, monkeypatch, path, slots):
    if path == "torch":
        monkeypatch.setattr("cream_kernels.native.load", lambda: None)
    prompts = prompts_of(tokenizer, ["a", "what is two and two?", "hello there", "b c", "one more prompt"])
    uniform = np.stack([stream(7, 1, str(p), r, 30) for p in range(5) for r in range(3)])
    stop = [*stop_ids(loaded, tokenizer), *range(20, 45)]  # many, so that answers end at many lengths
    options = dict(responses=3, max_new_tokens=30, stop=stop, temperature=0.9, top_p=0.95)
    alone = [
        generate(loaded, [prompts[p]], uniform[3 * p + r : 3 * p + r + 1], **options | {"responses": 1})[0]
        for p in range(5)
        for r in range(3)
    ]
    fed, ended = [], []
    watch = loaded.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    assert generate(loaded, prompts, uniform, slots=slots, tick=ended.append, **options) == alone
    watch.remove()
    assert len({len(answer.ids) for answer in alone}) > 5 and sum(ended) == 15
    # every prompt and every drawn token that something follows is computed once, and never more rows than slots
    drawn = sum(len(answer.ids) - 1 for answer in alone)
    assert sum(rows * tokens for rows, tokens in fed) == sum(map(len, prompts)) + drawn
    assert max(rows for rows, tokens in fed if tokens == 1) <= slots


def traced(function):
    """In the place of a CUDA graph: the operations that `function` made, run again on the memory that it used then.

    Nothing of the host's part runs again, so what it would have to do anew each step is found missing.
    """
    again, out = make_fx(lambda: function())(), []

    def replay():
        out.append(again())
        return out[0] if len(out) == 1 else out[0].copy_(out.pop())

    return replay


@pytest.mark.parametrize("slots", [3, 7])
def test_a_graph_of_every_slot_draws_the_same(loaded, tokenizer, monkeypatch, slots):
    monkeypatch.setattr("cream_kernels.native.load", lambda: None)
    monkeypatch.setattr("cream.cache.GROWTH", 32)
    prompts = prompts_of(tokenizer, ["a", "what is two and two?", "hello there", "b c", "one more prompt"])
    uniform = np.stack([stream(7, 1, str(p), r, 90) for p in range(5) for r in range(3)])
    stop = [*stop_ids(loaded, tokenizer), *range(20, 26)]
    options = dict(responses=3, max_new_tokens=90, stop=stop, temperature=0.9, top_p=0.95, slots=slots)
    plain = generate(loaded, prompts, uniform, **options)
    shapes = []

    def captured(function):
        shapes.append(function.__self__._shape)
        return traced(function)

    monkeypatch.setattr("cream.decode.captured", captured)
    monkeypatch.setattr("cream.sample.Decoder", functools.partial(always, Decoder))
    assert generate(loaded, prompts, uniform, **options) == plain
    # more than one growth of the cache, each shape captured once
    assert len({columns for _, columns in shapes}) > 1 and len(set(shapes)) == len(shapes)
    if slots == 7:
        assert len({rows for rows, _ in shapes}) > 1  # and smaller ones at the end


def always(make, *args, graphs):
    assert graphs is False  # as on any CPU
    return make(*args, graphs=True)


@pytest.mark.parametrize("kind, fixed", [("default", True), ("llama3", True), ("dynamic", False)])
def test_what_reads_positions_is_not_captured(tokenizer, kind, fixed):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **(more if kind == "llama3" else {})}
    model = LlamaForCausalLM(tiny_config(tokenizer, **({} if kind == "default" else {"rope_parameters": rope})))
    assert capturable(model) is fixed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_draw_the_same(loaded, tokenizer):
    prompts = prompts_of(tokenizer, ["a", "what is two and two?", "hello there", "b c", "one more prompt"])
    uniform = np.stack([stream(7, 1, str(p), r, 90) for p in range(5) for r in range(3)])
    options = dict(responses=3, max_new_tokens=90, stop=stop_ids(loaded, tokenizer), temperature=0.9, top_p=0.95)
    plain = generate(loaded, prompts, uniform, slots=7, cuda_graphs=False, **options)
    assert generate(loaded, prompts, uniform, slots=7, **options) == plain


def test_recorded_log_probs_are_the_models(loaded, tokenizer):
    prompts = prompts_of(tokenizer, [f"number {n}" for n in range(9)])
    uniform = np.stack([stream(7, 1, str(p), r, 12) for p in range(9) for r in range(2)])
    options = dict(responses=2, max_new_tokens=12, stop=stop_ids(loaded, tokenizer), temperature=0.7, top_p=0.9)
    answers = generate(loaded, prompts, uniform, slots=5, record=True, **options)
    assert [s for s, answer in enumerate(answers) if answer.logp is not None] == [0, RECORDED]
    for s in (0, RECORDED):
        prompt, answer = prompts[s // 2], answers[s]
        with torch.no_grad():
            logits = loaded(torch.tensor([prompt + answer.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        np.testing.assert_allclose(answer.logp, wanted.numpy(), atol=1e-5)


def test_logits_of_bfloat16_are_not_rounded_where_the_processor_can():
    hidden, weight = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (7, 301))
    truth = hidden.double() @ weight.double().T
    logits, reason = logits_of(hidden, weight), linear_logp_native.why_not(hidden, weight)
    assert logits.dtype == (torch.float32 if reason is None else torch.bfloat16)
    assert (logits - truth).abs().max() < (1e-4 if reason is None else 0.2)
    assert logits_of(hidden.float(), weight.float()).equal(hidden.float() @ weight.float().T)


def test_first_tokens_follow_the_nucleus(loaded, tokenizer):
    [prompt] = prompts_of(tokenizer, ["chi square"])
    count, temperature, top_p = 4000, 0.7, 0.8
    uniform = np.stack([stream(3, 1, "x", r, 1) for r in range(count)])
    drawn = generate(
        loaded, [prompt], uniform, responses=count, max_new_tokens=1, stop=[], temperature=temperature, top_p=top_p
    )
    with torch.no_grad():
        p = torch.softmax(loaded(torch.tensor([prompt]), use_cache=False).logits[0, -1].double() / temperature, -1)
    order = p.argsort(descending=True)
    nucleus = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
    expected = p[nucleus] / p[nucleus].sum() * count
    seen = Counter(a.ids[0] for a in drawn)
    assert set(seen) <= set(nucleus.tolist())
    observed = np.array([seen[t] for t in nucleus.tolist()])
    large = expected.numpy() >= 5
    observed = np.append(observed[large], observed[~large].sum())
    wanted = np.append(expected.numpy()[large], expected.numpy()[~large].sum())
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep] * observed.sum() / wanted[keep].sum()).pvalue > 1e-3


def test_context_is_a_limit_of_answers_and_a_mistake_of_prompts(loaded, tokenizer):
    context = loaded.config.max_position_embeddings
    loaded.config.max_position_embeddings = 30
    try:
        [answer] = generate(loaded, [list(range(3, 28))], None, max_new_tokens=50, stop=[])
        assert len(answer.ids) == 5 and answer.finish == "length"
        with pytest.raises(UserError, match="30 tokens leaves no room for an answer in a context of 30"):
            generate(loaded, [list(range(3, 33))], None, max_new_tokens=5, stop=[])
    finally:
        loaded.config.max_position_embeddings = context


def test_rows_hold_what_was_sampled_and_parts_are_not_drawn_again(loaded, tokenizer, work, monkeypatch):
    examples = examples_of(["bb", "a", "cccc", "ddd ddd"])
    config = SampleConfig(responses=3, max_new_tokens=12, batch_size=1, chunk_size=2)
    rows = sample(loaded, tokenizer, examples, config, work, seed=0, iteration=1)
    assert [(r["prompt_id"], r["index"]) for r in rows] == [(e.id, i) for e in examples for i in range(3)]
    end = tokenizer.eos_token_id
    for row in rows:
        assert row["prompt_ids"] == encode_prompt(tokenizer, [{"role": "user", "content": row["prompt_id"][3:]}])
        assert 1 <= len(row["ids"]) <= 12
        assert (row["ids"][-1] == end) == (row["finish"] == "stop") and end not in row["ids"][:-1]
        assert row["text"] == tokenizer.decode(row["ids"], skip_special_tokens=True)

    def never(*args, **kwargs):
        raise AssertionError("a finished part was drawn again")

    monkeypatch.setattr("cream.sample.generate", never)
    assert sample(loaded, tokenizer, examples, config, work, seed=0, iteration=1) == rows
