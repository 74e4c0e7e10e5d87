"""The memory and disk plan against numbers worked by hand, and the doctor on a machine where things are broken."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch

import cream.adamw
import cream.plan
from cream import doctor, fuse
from cream.config import Config, LoRAConfig, load_recipe
from cream.log import UserError
from cream.lora import attach, ready
from cream.plan import (
    HEAD_BLOCK,
    HEAD_CHUNK,
    HEAD_TILE,
    LLAMA3_8B,
    SHAPES,
    Shape,
    activation_bytes,
    dpo_bytes,
    gradient_checkpointing,
    known_shape,
    plan,
    shape_of,
)
from cream_kernels.products import multiplies_halves
from tests.test_fuse import using

LLAMA2_7B, SMOLLM2 = SHAPES["llama-2-7b"], SHAPES["smollm2-135m"]


def recipe(**changes) -> Config:
    """The paper's numbers (the defaults) with section__field=value changed."""
    config = Config()
    for key, value in changes.items():
        section, field = key.split("__")
        assert hasattr(getattr(config, section), field)
        setattr(getattr(config, section), field, value)
    return config


def stages(made):
    return {stage.name: stage for stage in made.stages}


# --- shapes


@pytest.mark.parametrize(
    "shape, parameters",  # as the models' own pages and checkpoints have them
    [(LLAMA2_7B, 6_738_415_616), (LLAMA3_8B, 8_030_261_248), (SMOLLM2, 134_515_008)],
)
def test_parameters(shape, parameters):
    assert shape.parameters == parameters


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_real_model(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shape_of(config).parameters == sum(p.numel() for p in model.parameters())


def test_known_shapes():
    assert known_shape("meta-llama/Llama-2-7b-chat-hf") == LLAMA2_7B
    assert known_shape("meta-llama/Meta-Llama-3-8B-Instruct") == LLAMA3_8B
    assert known_shape("HuggingFaceTB/SmolLM2-135M-Instruct") == known_shape("smollm2-135m") == SMOLLM2
    assert known_shape("meta-llama/Llama-2-70b-hf") is None and known_shape("someone/else") is None


@pytest.mark.parametrize("name", ["smoke", "smollm2-135m", "llama2-7b", "llama2-7b-lora", "llama3-8b"])
def test_shipped_recipes_need_no_look_up(name):
    assert known_shape(load_recipe(name).model.path) is not None


def test_what_is_no_llama_is_refused():
    mixture = types.SimpleNamespace(model_type="mixtral", num_local_experts=8)
    with pytest.raises(ValueError, match="mixtral is a mixture of experts"):
        shape_of(mixture)
    with pytest.raises(ValueError, match="t5 does not describe itself as LLaMA-class models do"):
        shape_of(types.SimpleNamespace(model_type="t5", num_attention_heads=8))


# --- memory


def test_states_of_7b_in_bfloat16():
    """6.738 billion parameters: bf16 weights 13.5 GB, 16 low bits 13.5, two float32 moments 53.9, float32 sums of
    gradients 27.0."""
    train = stages(plan(recipe(), LLAMA2_7B, "bfloat16"))["train"]
    parts = {what: round(train.bytes_of(what) / 1e9, 1) for what in ("weights", "low bits", "moments", "gradients")}
    assert parts == {"weights": 13.5, "low bits": 13.5, "moments": 53.9, "gradients": 27.0}


def test_states_of_7b_in_six_bytes_a_parameter():
    """8-bit moments: 13.5 GB, with scales and the norms' float32 ones. State in all 40.7 GB."""
    made = recipe(optim__moments="int8", optim__sums="bfloat16")
    train = stages(plan(made, LLAMA2_7B, "bfloat16"))["train"]
    state = [train.bytes_of(what) for what in ("weights", "low bits", "moments")]
    assert round(state[2] / 1e9, 1) == 13.7 and 40e9 < sum(state) <= 41e9
    assert train.bytes_of("gradients") == 2 * 6_738_415_616 and cream.plan.BLOCK == cream.adamw.BLOCK


def test_states_in_float32_have_no_low_bits():
    """134.5 million parameters at 16 bytes: weights, gradients, two moments."""
    train = stages(plan(recipe(), SMOLLM2, "float32"))["train"]
    assert train.bytes_of("low bits") == 0
    held = sum(train.bytes_of(what) for what in ("weights", "gradients", "moments"))
    assert held - 16 * 134_515_008 in (0, 4 * 49152 * 576)  # a tied head's gradient waits for the embedding's


def test_gradients_of_a_step_of_one_micro_batch():
    """They come as the activations go, so the peak is where either is largest; released, they take nothing."""
    one = dict(train__batch_size=1, train__batch_tokens=1, train__max_length=64, optim__moments="int8")
    one["model__gradient_checkpointing"] = "none"
    few_tokens = stages(plan(recipe(**one), LLAMA2_7B))["train"]
    assert few_tokens.bytes_of("gradients") == 2 * 6_738_415_616
    many_tokens = recipe(**(one | dict(train__max_length=2048)))
    assert stages(plan(many_tokens, LLAMA2_7B))["train"].bytes_of("gradients") <= 2 * 32000 * 4096
    for how in (dict(optim__clip_by="tensor"), dict(train__clip=0.0)):
        assert stages(plan(recipe(**one, **how), LLAMA2_7B))["train"].bytes_of("gradients") <= 2 * 32000 * 4096


@pytest.mark.parametrize(
    "name, tokens, mode", [("llama2-7b", 4096, "none"), ("llama2-7b", 8192, "full"), ("llama3-8b", 8192, "full")]
)
def test_full_fine_tuning_of_the_llama_recipes_fits_80_gb(name, tokens, mode):
    config, own = load_recipe(name), load_recipe(name).train.batch_tokens
    config.sft.batch_tokens = config.train.batch_tokens = tokens
    shape = known_shape(config.model.path)
    assert (own == tokens) == (name != "llama2-7b" or mode == "none")  # each recipe's own is here
    config.model.gradient_checkpointing = gradient_checkpointing(config, shape, "bfloat16", 80e9)
    assert config.model.gradient_checkpointing == mode
    for stage in plan(config, shape).stages:
        assert stage.peak <= 80e9, stage.name


def test_lora_of_7b_fits_24_gb():
    """Rank 32 over all seven maps of a layer: 32 * 32 * (4 * 8192 + 3 * 15104) = 79,953,920 elements of 16 bytes, 1.3
    GB, where full fine-tuning of 6.738 billion takes 54 GB at its least."""
    config = load_recipe("llama2-7b-lora")
    made = plan(config, LLAMA2_7B)
    assert cream.plan.adapter_parameters(LLAMA2_7B, config.lora) == 79_953_920
    for stage in made.stages:
        assert stage.peak <= 24e9, stage.name
    train = stages(made)["train"]
    parts = {what: train.bytes_of(what) for what in ("weights", "low bits", "moments", "gradients")}
    adapter = 4 * 79_953_920
    assert parts == {
        "weights": 2 * 6_738_415_616 + adapter,
        "low bits": 0,
        "moments": 2 * adapter,
        "gradients": adapter,
    }
    assert [(what, round(size / 1e9, 2)) for what, size in made.disk[:2]] == [
        ("models M3", 13.48),
        ("adapters M1, M2, M3", 0.96),
    ]


def test_cache_of_sampling():
    """Llama-2-7B keeps 2 * 32 layers * 32 heads * 128 * 2 bytes = 524,288 bytes a token; 32 prompts * 5 responses *
    (1024 + 768) tokens = 286,720 tokens: 150.3 GB."""
    sample = stages(plan(recipe(), LLAMA2_7B))["sample"]
    assert sample.bytes_of("KV cache") == 286_720 * 524_288
    grouped = stages(plan(recipe(), LLAMA3_8B))["sample"]  # 8 kv heads where Llama 2 has 32
    assert 4 * grouped.bytes_of("KV cache") == sample.bytes_of("KV cache")


def test_head_never_holds_all_logits():
    """Llama-3-8B, 8,192 tokens: 8192 * 128256 logits would be 4.2 GB in float32 and as much for their gradient; the
    fused loss holds 2,048 rows of them (1.1 GB), the head's gradient in float32 and in bf16 (3.2 GB), hidden states
    and they and their gradient in float32 (0.3 GB), and a tile (1.1 GB)."""
    head = dpo_bytes(LLAMA3_8B, 2, "cuda", 1536, 8192)
    tile = 4 * 16384 * (2 * 4096 + 2 * 4096)
    assert head == 2048 * 128256 * 4 + 128256 * 4096 * 6 + 8192 * 4096 * 10 + tile
    assert head == stages(plan(recipe(), LLAMA3_8B))["train"].bytes_of("head")
    longer = dpo_bytes(LLAMA3_8B, 2, "cuda", 4096, 8192)  # a pair is never cut
    assert longer - head == 2048 * 128256 * 4


def test_head_on_a_cpu():
    """Up to 3 D = 12,288 rows are one chunk, of which at most D lie in the gradient's memory; several need a float32
    sum of it."""
    V, D, block = 128256, 4096, 4032
    few, one, wider, several = (dpo_bytes(LLAMA3_8B, 2, "cpu", 512, rows) for rows in (512, 4096, 8192, 16384))
    assert few == 512 * D * 2 + V * D * 2 + 4 * (512 * D + 2016 * (512 + D))  # hidden states and tiles in float32
    assert one == 4096 * D * 2 + V * D * 2 + 4096 * (D * 6 + block * 2)  # their gradient, and a block
    assert wider == 8192 * (D * 2 + V * 2) + V * D * 2 + 8192 * (D * 6 + block * 2)
    tile = 4 * 2016 * (2 * 2048 + 2 * D)
    assert several == 16384 * D * 10 + 4096 * (V + block) * 2 + V * D * 6 + tile


def test_rows_and_tiles_are_those_of_the_kernels():
    from cream_kernels import linear_weighted_dpo, linear_weighted_dpo_torch, tiles

    body = sys.modules[linear_weighted_dpo.__module__]
    for name, device in (("cpu", "cpu"), ("cuda", "meta")):  # no card is needed to ask
        shapes = {
            dtype.itemsize: body.tile_shape(torch.device(device), dtype) for dtype in (torch.float32, torch.bfloat16)
        }
        assert HEAD_TILE[name] == shapes
    sizes = [body.tile_shape(torch.device("cpu"), torch.float32, rows) for rows in (1, 512, 513, 1024, 1025, 9999)]
    assert sizes == [(512, 4032)] * 2 + [(1024, 2016)] * 2 + [(2048, 1008)] * 2
    assert HEAD_CHUNK == {"cpu": body.CHUNK_ROWS, "cuda": tiles.CHUNK_ROWS}
    assert HEAD_BLOCK == linear_weighted_dpo_torch.BLOCK


def saved_bytes(config, size, lora=None, fused=False):
    """Bytes a token that autograd really keeps for S = 2 sequences of T = 64 tokens, parameters not counted."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    dtype = {4: torch.float32, 2: torch.bfloat16}[size]
    whole = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    if fused:
        fuse.fuse(whole)
    if lora:
        attach(whole, lora)
        ready(whole, lora, "none")
    model = whole.model
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.randint(0, config.vocab_size, (2, 64)), use_cache=False)
    return sum(count for count, _ in kept.values()) / (2 * 64)


@pytest.mark.parametrize("adapters", [{}, {"dropout": 0.1}, {"dropout": 0.0}, {"targets": ["o_proj", "up_proj"]}])
@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_activations_are_what_autograd_keeps(size, adapters, fused, monkeypatch):
    from transformers import LlamaConfig

    using("aot_eager", monkeypatch)  # saves what it would save with its code generator
    lora = LoRAConfig(r=8, **adapters) if adapters else None
    if lora:
        pytest.importorskip("peft", reason="peft is not installed")

    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=112, num_attention_heads=4, num_key_value_heads=2)
    configs = [LlamaConfig(**shape, num_hidden_layers=layers) for layers in (2, 4)]
    measured = [saved_bytes(config, size, lora, fused) for config in configs]
    planned = [activation_bytes(shape_of(config), size, "none", lora, "cpu", fused)[0] for config in configs]
    assert measured[1] - measured[0] == planned[1] - planned[0]  # two layers more, to the byte
    if lora:  # the first layer's input wants no gradient, so that its first norm keeps nothing
        return
    rest = measured[0] + 64 * size - planned[0]  # the head keeps the final norm's output, and there is no head here
    assert 0 <= rest <= 8 + 2 * 16 * size + 8  # token ids, and the rotary tables that the layers share


def test_checkpointing_keeps_a_layer_input_and_one_layer():
    """Llama-2-7B in bf16: 32 * 4096 * 2 bytes = 262 kB a token, where 5.97 MB are kept without."""
    held, recomputed = activation_bytes(LLAMA2_7B, 2, "full")
    assert held == 32 * 4096 * 2 + (4096 * 8 + 4)
    layer = 2 * (4096 * 8 + 4) + 2 * (4 * 4096 + 4 * 11008) + 4 * 32
    assert recomputed == layer
    assert activation_bytes(LLAMA2_7B, 2, "none") == (32 * layer + 4096 * 8 + 4, 0)
    assert round(32 * layer / 1e6, 2) == 5.97


def test_selective_checkpointing_keeps_what_products_made():
    """Llama-2-7B in bf16: the layer's input, seven products and attention's output, 3.25 MB a token of 5.97."""
    held, recomputed = activation_bytes(LLAMA2_7B, 2, "selective")
    layer = 2 * (4096 + 3 * 4096 + 4096 + 4096 + 2 * 11008 + 4096) + 4 * 32
    assert held == 32 * layer + 4096 * 8 + 4 and recomputed == activation_bytes(LLAMA2_7B, 2, "full")[1]
    assert round(32 * layer / 1e6, 2) == 3.25


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_keeps_what_is_planned(mode, dtype, rank):
    """Of two layers more, to the byte; what checkpointing keeps is held by Python objects."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cream import attention
    from cream.model import hidden_states, recompute

    lora = LoRAConfig(r=rank)
    if rank:
        pytest.importorskip("peft", reason="peft is not installed")

    def held() -> dict[int, int]:
        plain = (torch.Tensor, torch.nn.Parameter)  # and not what a compiled test before this one may have left, traced
        tensors = (o for o in gc.get_objects() if type(o) in plain and not torch._is_functional_tensor(o))
        found = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
        return {storage.data_ptr(): storage.nbytes() for storage in found}

    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=112, num_attention_heads=4, num_key_value_heads=2)
    name, kept, planned = attention.register(attention.choose("sdpa")), [], []
    for layers in (2, 4):
        config = LlamaConfig(**shape, num_hidden_layers=layers)
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=name)
        if rank:
            attach(model, lora)
            ready(model, lora, mode)
        else:
            recompute(model, mode)
        gc.collect()
        before = held()
        hidden = hidden_states(model, torch.randint(0, 64, (2, 64)))
        gc.collect()
        kept.append(sum(size for place, size in held().items() if place not in before))
        planned.append(activation_bytes(shape_of(config), dtype.itemsize, mode, lora)[0] * 128)
        del hidden
    generators = 2 * torch.get_rng_state().nbytes if rank else 0  # a layer's, so that dropout falls as it fell
    assert kept[1] - kept[0] == pytest.approx(planned[1] - planned[0] + generators, abs=128)  # scalars come and go


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_auto_recomputes_as_little_as_memory_allows(device):
    def peak(config):
        return stages(plan(config, LLAMA2_7B, "bfloat16", device))["train"].peak

    config, modes = recipe(sft__enabled=False), ("none", "selective", "full")
    peaks = {mode: peak(recipe(sft__enabled=False, model__gradient_checkpointing=mode)) for mode in modes}
    assert peaks["none"] > peaks["selective"] > peaks["full"] == peak(config)
    for mode, memory in peaks.items():
        assert gradient_checkpointing(config, LLAMA2_7B, "bfloat16", memory, device) == mode
        below = {"none": "selective"}.get(mode, "full")
        assert gradient_checkpointing(config, LLAMA2_7B, "bfloat16", memory - 1, device) == below


def test_fewer_tokens_than_a_pair_has_save_nothing():
    stage = stages(plan(recipe(train__batch_tokens=1), LLAMA2_7B))["train"]
    assert stage.count == 2 * 2048
    assert stage.largest(stage.peak) == 4096 and stage.largest(stage.peak - 1) == 0


def test_largest_is_the_last_value_that_fits():
    for stage in plan(recipe(), LLAMA3_8B).stages:
        section, field = stage.field.split(".")
        limit = stage.peak * 1.37
        largest = stage.largest(limit)
        changed = ({f"{section}__{field}": n} for n in (largest, largest + 1))
        fits, bursts = (stages(plan(recipe(**changes), LLAMA3_8B))[stage.name].peak for changes in changed)
        assert fits <= limit < bursts, stage.name
    assert stage.largest(1e9) == 0  # less than the weights


def test_stages_that_are_switched_off_are_not_planned():
    made = plan(recipe(sft__enabled=False, evaluate__enabled=False, sample__batch_size=1), LLAMA2_7B)
    assert list(stages(made)) == ["sample", "score", "train"]
    assert made.peak == stages(made)["train"].peak > stages(made)["sample"].peak


MEASURE = """
import gc, json, sys
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from cream import attention, dpo
from cream.config import Config
from cream.lora import attach, ready
from cream.model import recompute
from cream.optim import AdamW
from cream.plan import plan, shape_of
from cream_kernels.products import multiplies_halves

dtype, mode, moments, sums, rank = sys.argv[1:]
config = Config()
config.lora.r = int(rank)
config.model.gradient_checkpointing, config.optim.moments, config.optim.sums = mode, moments, sums
# Products of bfloat16 take most of a minute on a CPU without instructions for them.
response = 240 if dtype == "float32" or multiplies_halves(torch.device("cpu")) else 80
config.train.max_length, config.train.batch_tokens, config.train.batch_size = 16 + response, 2 * (16 + response), 2
config.sample.max_new_tokens = response
name = attention.register(attention.choose("sdpa", torch.float32))


def memory(what):
    text = open("/proc/self/status").read()
    return 1024 * int(text.split(what + ":")[1].split()[0])


def step(shape, micro, prompt, response):
    model = LlamaForCausalLM._from_config(shape, dtype=getattr(torch, dtype), attn_implementation=name)
    if config.lora.r:
        attach(model, config.lora)
        ready(model, config.lora, mode)
    else:
        recompute(model, mode)
    optimizer = AdamW(model, config.optim, weight_decay=0.01, clip=1.0)
    optimizer.begin(1e-6, 2)
    for _ in range(2):
        pair = dict(prompt_ids=[1] * prompt, chosen_ids=[2] * response, rejected_ids=[3] * response)
        pair |= dict(logp_chosen=0.0, logp_rejected=0.0, agreement=0.8)
        dpo.loss_of(model, [pair] * micro, 0.1)[0].sum().backward()
    optimizer.step()
    optimizer.close()


small = dict(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False)
small |= dict(vocab_size=8192, hidden_size=512, intermediate_size=1408)
step(LlamaConfig(num_hidden_layers=1, **small), 1, 16, response)  # whose kernels' code, up to 13 MB, is not the plan's
gc.collect()
shape = LlamaConfig(num_hidden_layers=6, **small)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
step(shape, 1, 16, response)
[planned] = [s.peak for s in plan(config, shape_of(shape), dtype, "cpu").stages if s.name == "train"]
print(json.dumps([memory("VmHWM") - before, planned, shape_of(shape).parameters]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(
    "settings",
    [
        ("float32", "none", "float32", "float32", "0"),
        ("bfloat16", "full", "int8", "bfloat16", "0"),
        ("float32", "none", "float32", "float32", "16"),
        ("bfloat16", "full", "float32", "float32", "16"),
    ],
    ids="-".join,
)
def test_plan_is_within_a_tenth_of_what_a_process_takes(settings):
    """A DPO step of two micro-batches on a random Llama of 26 million parameters, in a process of its own; all its
    weights trained, or adapters of rank 16."""
    if settings[-1] != "0":
        pytest.importorskip("peft", reason="peft is not installed")
        if settings[0] == "bfloat16" and not multiplies_halves(torch.device("cpu")):
            pytest.skip("this CPU does not multiply bfloat16: a minute each, and without adapters it is done")
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *settings], capture_output=True, text=True, timeout=300,
        env={**os.environ, **limits, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured, planned, parameters = json.loads(done.stdout)
    assert 20e6 < parameters < 60e6
    assert planned == pytest.approx(measured, rel=0.1)


# --- disk


def test_disk():
    """M1, M2, M3 of Llama-2-7B in bf16: 40.4 GB. A step checkpoint holds weights, low bits and moments, 80.9 GB, three
    at once."""
    path = "meta-llama/Llama-2-7b-chat-hf"
    made = plan(recipe(model__path=path, train__checkpoint_every=50), LLAMA2_7B)
    assert [(what.split(" ")[0], round(size / 1e9, 1)) for what, size in made.disk] == [("models", 40.4), ("3", 242.6)]
    assert made.disk[0][0] == "models M1, M2, M3"
    assert plan(recipe(model__path=path), LLAMA2_7B).disk_bytes == made.disk[0][1]


def test_disk_of_a_converted_model_and_its_text():
    config = recipe(model__path="x.gguf", run__iterations=1, sft__enabled=False, data__prompts_per_iteration=100)
    made = plan(config, SMOLLM2, "float32")
    assert made.disk[0] == ("models M0, M2", 2 * 4 * 134_515_008)
    assert made.disk[1][1] == 100 * (5 + 2) * (1024 + 768) * 11
    halfway = plan(recipe(score__first_round="sft_half"), SMOLLM2)
    assert halfway.disk[0][0] == "models M0, M1, M1 halfway, M2, M3"


# --- finding the shape


def test_shape_of_a_local_directory(tiny):
    shape = doctor.find_shape(recipe(model__path=str(tiny)))
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.tied) == (2, 32, 4, 2, True)


def test_shape_that_cannot_be_had_says_why(tmp_path):
    for path in ("nobody/nothing-here", str(tmp_path), str(tmp_path / "none.gguf")):
        with pytest.raises(UserError, match="cannot be had offline") as error:
            doctor.find_shape(recipe(model__path=path))
        assert "\n" not in str(error.value) and path in str(error.value)


def test_directory_with_code_runs_none_of_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(UserError, match="cannot be had offline"):
        doctor.find_shape(recipe(model__path=str(tmp_path)))
    assert not (tmp_path / "marker").exists()


# --- the program


def test_free_disk_of_a_directory_to_be(tmp_path):
    assert doctor.free_disk(str(tmp_path / "a" / "b")) == pytest.approx(doctor.free_disk(str(tmp_path)), rel=0.01)


def found(config=None):
    return dict(doctor.findings(config or recipe()))


def test_findings_name_what_is_here():
    rows = found()
    assert rows["torch"].startswith(torch.__version__) and rows["attention sdpa"] == "can run"
    assert "threading layer" in rows["numba"] and "GB available" in rows["RAM"]
    for name in (
        "python",
        "CPU",
        "disk",
        "triton",
        "cream_kernels",
        "native library",
        *doctor.REQUIRED,
        *doctor.OPTIONAL,
    ):
        assert rows[name], name


@pytest.mark.parametrize(
    "error, words",
    [
        ("ImportError('no lib')", "no lib"),
        ("OSError('libcuda.so.1: cannot open')", "libcuda.so.1: cannot open"),
        ("RuntimeError('bad\\nmore')", "bad"),
        ("ValueError('numpy.dtype size changed')", "numpy.dtype size changed"),
        ("AttributeError('')", "AttributeError"),
    ],
)
@pytest.mark.parametrize("package", ["triton", "numba"])
def test_broken_package_costs_one_line(tmp_path, monkeypatch, package, error, words):
    (tmp_path / f"{package}.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    assert found()[package] == f"cannot be used: {words}"


def test_small_control_group_is_what_counts(monkeypatch):
    values = {"memory.max": 10**9, "memory.current": 4 * 10**8}
    monkeypatch.setattr(doctor, "_number_in", lambda path: values[path.name])
    assert doctor.ram() == (10**9, 6 * 10**8)


def test_program(capsys, tmp_path):
    doctor.main(["--config", "llama2-7b", "--run.dir", str(tmp_path / "run"), "--sample.batch_size", "4"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert "6.738 billion parameters, bfloat16 here" in out
    assert ["train", "13.5", "13.5", "13.7", "13.5"] in [row[:5] for row in rows]
    fits = {row[0]: row for row in rows if len(row) > 2 and row[1].endswith(("batch_size", "batch_tokens"))}
    assert fits["sample"][:6] == ["sample", "sample.batch_size", "4", "2", "fits", "fits"]
    assert fits["train"][3:9] == ["does", "not", "fit"] * 2 and fits["train"][9] == "fits"  # 24, 40 and 80 GB
    assert not (tmp_path / "run").exists()


def test_fit_counts_auto_on_cards_as_bfloat16():
    half, full = (plan(recipe(train__batch_tokens=10**6), SMOLLM2, dtype) for dtype in ("bfloat16", "float32"))
    train = next(row for row in doctor.fit_rows(half, full, 24 * 2**30) if row[0] == "train")
    assert train[3] == f"{stages(half)['train'].largest(24e9):,}"
    assert train[6] == f"{stages(full)['train'].largest(24e9):,}"
    assert int(train[3].replace(",", "")) > int(train[6].replace(",", "")) > 0


def test_program_without_a_shape(capsys):
    doctor.main(["--model.path", "nobody/nothing-here"])
    out = capsys.readouterr().out
    assert "attention sdpa" in out
    assert out.rstrip().splitlines()[-1].startswith("no plan: the shape of nobody/nothing-here cannot be had offline")


def test_program_refuses_an_unknown_key(capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--sample.batch_sise", "4"])
    assert stop.value.code == 2 and "sample.batch_size" in capsys.readouterr().err


def test_program_without_torch_still_answers(tmp_path):
    """In a process of its own, with a torch that does not load: the day when the doctor is called for."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: undefined symbol')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "cream.doctor", "--config", "llama2-7b"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cannot be used: libtorch_cpu.so: undefined symbol" in done.stdout
    assert "6.738 billion parameters" in done.stdout
    assert time.monotonic() - start < 30


def test_shape_is_hashable_and_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LLAMA2_7B.layers = 1
    assert len({LLAMA2_7B, Shape(**dataclasses.asdict(LLAMA2_7B))}) == 1
