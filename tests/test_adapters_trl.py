"""TRL's DPOTrainer with our log-probs and with our loss, three steps on a tiny Llama beside TRL's own and beside a loop
written out here from logits and the published formula."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import sys

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from cream_kernels.adapters import trl as adapter
from cream_kernels.adapters.trl import ConsistencyDPOTrainer, cream_head

BETA, RATE = 0.5, 0.02
CONSISTENCY = [1.0, 0.25, 0.5, 0.0]
PAIRS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five"},
    {"prompt": "Name a colour:", "chosen": " red, of course", "rejected": " seven"},
    {"prompt": "abc", "chosen": " def", "rejected": " xyz and more"},
    {"prompt": "The end is", "chosen": " near", "rejected": " far"},
]


def rows(consistency=CONSISTENCY) -> Dataset:
    return Dataset.from_list([pair | {"consistency": c} for pair, c in zip(PAIRS, consistency, strict=True)])


def three_steps(kind, path, tokenizer, out, data=None, *, head=contextlib.nullcontext, batch=4, **changes):
    """The trainer after three steps of all four pairs, with the loss of every micro-batch as `losses`."""
    settings = dict(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
        max_steps=3,
        beta=BETA,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    more = {name: changes.pop(name) for name in ("peft_config", "ref_model", "eval_dataset") if name in changes}
    model = load(path)
    for each in (model, more.get("ref_model", model)):
        each.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    seen: set[str] = set()
    with head():
        trainer = kind(
            model=model,
            args=DPOConfig(**(settings | changes)),
            train_dataset=rows() if data is None else data,
            processing_class=copy.deepcopy(tokenizer),
            **more,
        )
    trainer.losses, trainer.seen = [], seen
    compute = trainer.compute_loss

    def recording(*args, **kwargs):
        loss = compute(*args, **kwargs)
        trainer.losses.append(loss.item())
        return loss

    trainer.compute_loss = recording
    trainer.train()
    assert "fused_lm_head" in seen and "consistency" not in seen  # transformers would swallow it, other models not
    return trainer


def load(path, **changes):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


@pytest.fixture
def train(tiny, tokenizer, tmp_path):
    return lambda kind, *args, **changes: three_steps(kind, tiny, tokenizer, tmp_path, *args, **changes)


@pytest.fixture
def calls(monkeypatch):
    """How often the adapter called linear_logp and weighted_dpo."""
    counts = {"linear_logp_statistics": 0, "weighted_dpo": 0}
    for name in counts:
        ours = getattr(adapter, name)

        def counting(*args, name=name, ours=ours, **kwargs):
            counts[name] += 1
            return ours(*args, **kwargs)

        monkeypatch.setattr(adapter, name, counting)
    return counts


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def close(ours, theirs):
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)


def same_weights(ours, theirs):
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


METRICS = (
    "entropy",
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "mean_token_accuracy",
    "num_tokens",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/margins",
    "rewards/rejected",
)


@pytest.fixture(scope="module")
def theirs(tiny, tokenizer, tmp_path_factory):
    return three_steps(DPOTrainer, tiny, tokenizer, tmp_path_factory.mktemp("theirs"))


def test_stock_trainer_over_our_head(train, calls, theirs):
    ours = train(DPOTrainer, head=cream_head)
    assert calls["linear_logp_statistics"] == 6  # policy and reference, three times
    assert len(set(ours.losses)) == 3
    close(ours.losses, theirs.losses)
    same_weights(ours, theirs)
    for name in METRICS:
        close(logged(ours, name), logged(theirs, name))


def test_head_is_put_back():
    theirs = sys.modules["trl.trainer.dpo_trainer"].add_fused_lm_head
    with pytest.raises(RuntimeError, match="in between"), cream_head():
        assert sys.modules["trl.trainer.dpo_trainer"].add_fused_lm_head is adapter.add_cream_head
        raise RuntimeError("in between")
    assert sys.modules["trl.trainer.dpo_trainer"].add_fused_lm_head is theirs


@pytest.mark.parametrize("head", [contextlib.nullcontext, cream_head], ids=["their head", "our head"])
def test_consistency_of_one_is_trl(train, calls, theirs, head):
    ours = train(ConsistencyDPOTrainer, rows([1.0] * 4), head=head)
    assert calls == {"linear_logp_statistics": 0 if head is contextlib.nullcontext else 6, "weighted_dpo": 3}
    close(ours.losses, theirs.losses)
    same_weights(ours, theirs)
    for name in METRICS:
        close(logged(ours, name), logged(theirs, name))
    assert set(ours.state.log_history[0]) == set(theirs.state.log_history[0]) | {"consistency"}


def sequence_logps(model, batch):
    """From full logits, as in eric-mitchell's _get_batch_logps (Apache-2.0): the completion's tokens summed."""
    logp = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    picked = logp.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (picked * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("batch", [4, 2], ids=["1 x 4", "2 x 2"])
def test_consistency_is_label_smoothing(train, tiny, batch):
    trainer = train(ConsistencyDPOTrainer, head=cream_head, batch=batch)
    everything = trainer.data_collator(list(trainer.train_dataset))
    smoothing = 1 - everything["consistency"]
    policy = load(tiny)
    frozen = load(tiny)
    for step in range(3):
        chosen, rejected = sequence_logps(policy, everything).chunk(2)
        with torch.no_grad():
            chosen_reference, rejected_reference = sequence_logps(frozen, everything).chunk(2)
        logits = (chosen - rejected) - (chosen_reference - rejected_reference)
        losses = (
            -functional.logsigmoid(BETA * logits) * (1 - smoothing) - functional.logsigmoid(-BETA * logits) * smoothing
        )
        losses.mean().backward()
        micro = 4 // batch
        close(sum(trainer.losses[step * micro : (step + 1) * micro]) / micro, losses.mean().item())
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    for a, b in zip(trainer.model.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    close(logged(trainer, "consistency"), [0.4375] * 3)


def test_precomputed_reference_and_evaluation(train, tiny, theirs):
    ones = rows([1.0] * 4)
    settings = dict(precompute_ref_log_probs=True, ref_model=load(tiny), eval_dataset=rows())
    ours = train(ConsistencyDPOTrainer, ones, head=cream_head, **settings)
    close(ours.losses, theirs.losses)
    assert ours.evaluate()["eval_consistency"] == 0.4375
    assert ours.evaluate(rows([0.5] * 4))["eval_consistency"] == 0.5
    assert "consistency" not in ours.seen


def test_trls_own_defaults(train, theirs):
    """bfloat16 autocast and gradient checkpointing, which TRL turns on by itself."""
    ours = train(ConsistencyDPOTrainer, rows([1.0] * 4), head=cream_head, bf16=True, gradient_checkpointing=True)
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=0.03, atol=0)


def test_weight_of_the_loss(train):
    assert train(ConsistencyDPOTrainer, loss_weights=[0.5]).losses[0] == pytest.approx(0.5 * math.log(2))


def test_low_rank_model(train):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = train(DPOTrainer, peft_config=lora)
    ours = train(ConsistencyDPOTrainer, rows([1.0] * 4), head=cream_head, peft_config=lora)
    assert len(set(ours.losses)) == 3
    close(ours.losses, theirs.losses)


def test_stream(train):
    ours = train(ConsistencyDPOTrainer, IterableDataset.from_generator(lambda: iter(list(rows()) * 3)))
    assert len(ours.losses) == 3
    with pytest.raises(ValueError, match="row 1 of a batch has no consistency"):
        ours.data_collator([rows()[0], PAIRS[1]])


@pytest.mark.parametrize(
    "consistency, message",
    [
        ([1.0, 0.5, 1.5, 0.0], "train_dataset row 2 has consistency 1.5: must be in"),
        ([1.0, -0.1, 0.5, 0.0], "train_dataset row 1 has consistency -0.1"),
        ([1.0, 0.5, 0.5, float("nan")], "train_dataset row 3 has consistency nan"),
        ([None, 0.5, 0.5, 0.5], "train_dataset row 0 has no consistency"),
    ],
)
def test_refuses_rows(train, consistency, message):
    with pytest.raises(ValueError, match=message) as raised:
        train(ConsistencyDPOTrainer, rows(consistency))
    assert "\n" not in str(raised.value)


def test_refuses_a_dataset_without_the_column(train):
    with pytest.raises(ValueError, match="train_dataset has no column 'consistency'"):
        train(ConsistencyDPOTrainer, Dataset.from_list(PAIRS))
    with pytest.raises(ValueError, match="held_out has no column 'consistency'"):
        train(ConsistencyDPOTrainer, eval_dataset={"held_out": Dataset.from_list(PAIRS)})


@pytest.mark.parametrize(
    "setting",
    [
        {"loss_type": ["hinge"]},
        {"loss_type": ["sigmoid", "sft"]},
        {"f_divergence_type": "forward_kl"},
        {"label_smoothing": 0.1},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_refuses_settings_by_name(train, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        train(ConsistencyDPOTrainer, **setting)


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({}, 1.0),
        ({"logit_scale": 0.5}, 0.5),
        ({"logits_scaling": 4.0}, 0.25),
        ({"final_logit_softcapping": 1.5, "output_multiplier": 2.0}, 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
def test_head_is_trls_field_by_field(tiny, settings, scale, shifted):
    """Against TRL's head on the same model, all its outputs, with prompts, padding and a temperature."""
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200, (4, 12), generator=generator)
    labels = ids.masked_fill(torch.rand(4, 12, generator=generator) < 0.4, -100)
    given = {"shift_labels" if shifted else "labels": labels}
    found = []
    for add in (sys.modules["trl.trainer.utils"].add_fused_lm_head, adapter.add_cream_head):
        model = load(tiny, **settings)
        plain = model(ids).logits
        add(model, temperature=0.7, outputs=outputs)
        assert torch.equal(model(ids, labels=ids).logits, plain)  # without fused_lm_head nothing has changed
        output = model(ids, **given, fused_lm_head=True)
        (output.log_probs * torch.linspace(-1, 1, output.log_probs.numel()).view_as(output.log_probs)).sum().backward()
        found.append((output, [parameter.grad for parameter in model.parameters()]))
    (theirs, their_grads), (ours, our_grads) = found
    assert adapter.logit_scale(model.config) == scale
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_head_is_the_models_own(family, settings):
    """Against log_softmax of the logits that other families make, each with its own scale or cap."""
    shape = dict(vocab_size=70, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = getattr(transformers, f"{family}Config")(**shape, num_key_value_heads=2, head_dim=8, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)  # so that a scale is seen
        ids = torch.randint(70, (2, 9))
        expected = model(ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        adapter.add_cream_head(model)
        ours = model(ids, labels=ids, fused_lm_head=True).log_probs
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_head_that_is_sharded_by_itself(tiny):
    """FSDP2 over the head alone leaves it sharded while the model runs: it is gathered, and so is its gradient."""
    ids = torch.arange(12).view(2, 6)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        grads = []
        for shard in (False, True):
            model = load(tiny)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
            if shard:
                fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (1,)))
            adapter.add_cream_head(model)
            assert isinstance(model.lm_head.weight, DTensor) == shard
            model(ids, labels=ids, fused_lm_head=True).loss.backward()
            grads.append(model.lm_head.weight.grad)
        assert torch.equal(grads[1].full_tensor(), grads[0])
    finally:
        torch.distributed.destroy_process_group()


def test_no_label_at_all(tiny):
    model = load(tiny)
    adapter.add_cream_head(model, outputs=("log_probs", "entropy"))
    ids = torch.arange(12).view(2, 6)
    output = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0 and output.entropy.eq(0).all()


@pytest.mark.parametrize(
    "settings, arguments, message",
    [
        ({"logit_scale": 0.0}, {}, "llama multiplies its logits by 0.0"),
        ({}, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
        ({}, {"outputs": ("log_probs", "log_sum_sq_probs")}, "log_sum_sq_probs"),
    ],
)
def test_head_refuses_by_name(tiny, settings, arguments, message):
    model = load(tiny, **settings)
    with pytest.raises(ValueError, match=message):
        adapter.add_cream_head(model, **arguments)


def test_head_refuses_a_routers_loss(tiny):
    model = load(tiny)
    adapter.add_cream_head(model)
    ids = torch.arange(6)[None]
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        model(ids, labels=ids, fused_lm_head=True, output_router_logits=True)


@pytest.mark.parametrize("module, name", [("dpo_trainer", "add_fused_lm_head"), ("utils", "FusedCausalLMOutput")])
def test_refuses_an_older_trl(monkeypatch, module, name):
    monkeypatch.delattr(sys.modules[f"trl.trainer.{module}"], name)
    with pytest.raises(ImportError, match="cream_kernels.adapters.trl needs trl 1.15 or newer"):
        adapter.__spec__.loader.exec_module(importlib.util.module_from_spec(adapter.__spec__))
