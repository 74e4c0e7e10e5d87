"""Evaluation: greedy answers extracted, options by likelihood as lm-eval defines them, worked by hand."""

import numpy as np
import pytest

from cream.config import EvaluateConfig
from cream.data import Example
from cream.evaluate import evaluate, likelihood
from cream.sample import Response
from cream.tasks.answers import continuations
from tests.test_score import truth


def quiz(i, answer, choices=("red", "a very long blue", "green")):
    text = f"question {i}\n" + "\n".join(f"{c}. {o}" for c, o in zip("ABCD", choices, strict=False))
    return Example(f"quiz-{i}", "quiz", ({"role": "user", "content": text},), tuple(choices), answer, f"question {i}")


def number(i, answer):
    return Example(
        f"gsm8k-{i}", "gsm8k", ({"role": "user", "content": f"how many? {i}"},), None, answer, f"how many? {i}"
    )


def test_option_likelihood_is_transformers_one_by_one(loaded, tiny, tokenizer, work):
    examples = [quiz(i, "ABC"[i % 3]) for i in range(7)] + [number(0, "3")]
    found = likelihood(loaded, tokenizer, examples, EvaluateConfig(batch_size=3), work, "eval/m0")
    assert set(found) == {e.id for e in examples[:7]}
    norm_differs = False
    for example in examples[:7]:
        context, options = continuations(example)
        prefix = tokenizer(context)["input_ids"]
        logp = [truth(tiny, prefix, tokenizer(o)["input_ids"]) for o in options]
        per_character = [v / len(c) for v, c in zip(logp, example.choices, strict=True)]
        gold = "ABC".index(example.answer)
        assert found[example.id] == (int(np.argmax(logp)) == gold, int(np.argmax(per_character)) == gold)
        norm_differs |= np.argmax(logp) != np.argmax(per_character)
    assert norm_differs  # else the two columns would not have been told apart


def test_accuracy_is_counted_a_task(loaded, tokenizer, work, monkeypatch):
    examples = [quiz(0, "A"), number(0, "18"), quiz(1, "B"), quiz(2, "C"), number(1, "7")]
    said = {
        "quiz-0": "I think so. Answer: A",
        "quiz-1": "Answer: C",
        "quiz-2": "",
        "gsm8k-0": "6 * 3 = 18.0\n#### 18.0",
        "gsm8k-1": "It is 8.",
    }
    asked = []

    def generate(model, prompts, uniform, *, max_new_tokens, stop, cuda_graphs, tick):
        assert uniform is None and max_new_tokens == 9 and cuda_graphs
        tick(len(prompts))
        texts = [tokenizer.decode(p) for p in prompts]
        asked.extend(texts)
        names = [next(e.id for e in examples if e.messages[0]["content"] in t) for t in texts]
        return [Response(tokenizer(said[n] + "<|im_end|>")["input_ids"], "stop") for n in names]

    monkeypatch.setattr("cream.evaluate.generate", generate)
    config = EvaluateConfig(max_new_tokens=9, batch_size=2, suffix="\nThink first.")
    result, rows = evaluate(loaded, tokenizer, examples, config, work, name="M0", stage="eval/m0")
    assert len(asked) == 5 and all("\nThink first.<|im_end|>\n<|im_start|>assistant\n" in t for t in asked)
    assert [r["prompt_id"] for r in rows] == [e.id for e in examples]
    assert [r["correct"] for r in rows] == [True, True, False, False, False]
    assert [r["extracted"] for r in rows] == ["A", "18", "C", None, "8"]
    assert result["tasks"]["quiz"]["accuracy"] == pytest.approx(1 / 3)
    assert result["tasks"]["quiz"]["answered"] == pytest.approx(2 / 3) and result["tasks"]["quiz"]["n"] == 3
    assert result["tasks"]["gsm8k"]["accuracy"] == 0.5 and result["tasks"]["gsm8k"]["acc"] is None
    assert 0 <= result["tasks"]["quiz"]["acc_norm"] <= 1
    assert result["mean_accuracy"] == pytest.approx((1 / 3 + 1 / 2) / 2) and result["model"] == "M0"


def test_likelihood_can_be_left_out(loaded, tokenizer, work):
    config = EvaluateConfig(max_new_tokens=4, likelihood=False)
    result, _ = evaluate(loaded, tokenizer, [quiz(0, "A")], config, work, name="M1", stage="eval/m1")
    assert result["tasks"]["quiz"]["acc"] is None and result["tasks"]["quiz"]["accuracy"] in (0, 1)
