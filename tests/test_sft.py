"""SFT learns the assistant's tokens, the end of the turn included, and nothing else."""

import json

import pytest
import torch
import torch.nn.functional as F

from cream.config import ModelConfig, SFTConfig
from cream.data import Conversation, encode_conversation
from cream.log import Metrics, UserError
from cream.model import load
from cream.sft import loss_of, train


def conversations(count=10):
    return [
        Conversation(
            f"c{i}",
            ({"role": "user", "content": "?" * (1 + i % 4)}, {"role": "assistant", "content": f"the answer is {i}"}),
        )
        for i in range(count)
    ]


def test_loss_is_transformers_on_labels_alone(loaded, tokenizer):
    sequences = [encode_conversation(tokenizer, c.messages) for c in conversations(4)]
    found = float(loss_of(loaded, sequences)[0])
    total = 0.0
    for ids, labels in sequences:
        logits = loaded(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        total += float(F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"))
    assert found == pytest.approx(total, rel=1e-6)


def test_conversations_side_by_side_are_each_its_own(loaded, tokenizer):
    """The released code's labels hold the pad id, and its loss ignores -100 only: M1 learns to emit padding."""
    short, long = (encode_conversation(tokenizer, c.messages) for c in conversations(4)[::3])
    assert len(short[0]) < len(long[0])
    together = float(loss_of(loaded, [short, long])[0])
    apart = [float(loss_of(loaded, [one])[0]) for one in (short, long)]
    assert together == pytest.approx(sum(apart), rel=1e-6)


def test_the_answer_is_learnt_and_so_is_its_end(tmp_path, tiny, tokenizer, work):
    model = load(tiny, ModelConfig(dtype="float32")).requires_grad_(True)
    halves = []
    config = SFTConfig(lr=1e-2, epochs=30, batch_size=4, batch_tokens=200)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    train(model, tokenizer, conversations(), config, work, metrics, seed=0, halfway=lambda: halves.append(1))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 90 and halves == [1]
    assert sum(losses[-3:]) < 0.4 * sum(losses[:3])
    ids, labels = encode_conversation(tokenizer, conversations()[0].messages)
    assert tokenizer.eos_token_id in labels  # the end of the answer's turn is a label, though it is the pad token too
    end = labels.index(tokenizer.eos_token_id)
    before = load(tiny, ModelConfig(dtype="float32"))
    for module, bound in ((before, 0.2), (model, 1.1)):
        p = torch.softmax(module(torch.tensor([ids[:end]]), use_cache=False).logits[0, -1], -1)
        assert float(p[tokenizer.eos_token_id]) < bound
    assert float(p[tokenizer.eos_token_id]) > 0.5


def test_no_token_is_computed_that_teaches_nothing(tmp_path, tiny, tokenizer, work):
    """What the model is fed ends, in every conversation, with the token that predicts its last label; no padding."""
    model, fed = load(tiny, ModelConfig(dtype="float32")).requires_grad_(True), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    metrics = Metrics(tmp_path / "metrics.jsonl")
    config = SFTConfig(epochs=1, batch_size=4, batch_tokens=100)
    train(model, tokenizer, conversations(), config, work, metrics, seed=0)
    encoded = [encode_conversation(tokenizer, c.messages) for c in conversations()]
    needed = [max(i for i, label in enumerate(labels) if label != -100) for _, labels in encoded]
    assert sum(fed) == sum(row["tokens"] for row in metrics.rows()) == sum(needed) < sum(len(ids) for ids, _ in encoded)
    assert max(fed) <= 100 and [row["sequence_forwards_per_prompt"] for row in metrics.rows()] == pytest.approx([1] * 3)


def test_nothing_that_fits_is_a_mistake(tmp_path, loaded, tokenizer, work):
    with pytest.raises(UserError, match="data.sft: no conversation fits sft.max_length"):
        train(loaded, tokenizer, conversations(2), SFTConfig(max_length=5), work, Metrics(tmp_path / "m"), seed=0)
