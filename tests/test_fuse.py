"""Fused norms, SwiGLUs and rotations: transformers' numbers before they are compiled, no worse after, less kept."""

import functools

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from cream import fuse
from cream.config import ModelConfig
from cream.dpo import loss_of
from cream.log import UserError
from cream.model import load, recompute
from tests.conftest import tiny_config
from tests.test_dpo import pairs_of


@pytest.fixture(params=["inductor", "aot_eager"])
def backend(request, monkeypatch):
    """torch.compile as a run has it, and without its code generator, for what does not depend on that."""
    return using(request.param, monkeypatch)


def using(name, monkeypatch):
    if name == "inductor":
        pytest.importorskip("torch._inductor.cpp_builder")
        try:
            fuse.check("compile")
        except UserError as error:
            pytest.skip(str(error))
    monkeypatch.setattr(fuse, "BACKEND", name)
    monkeypatch.setattr(fuse, "compiled", functools.cache(fuse.compiled.__wrapped__))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # put back after
    torch._dynamo.reset()
    return name


def uncompiled(monkeypatch):
    monkeypatch.setattr(fuse, "compiled", lambda function: function)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # put back after


def loaded(directory, dtype, fused):
    return load(directory, ModelConfig(path=str(directory), dtype=dtype, fuse="compile" if fused else "none"))


def step(model, pairs):
    """The loss of a step and every gradient, float64."""
    model.requires_grad_(True)
    loss = loss_of(model, pairs, 0.1)[0].mean()
    loss.backward()
    found = {"loss": loss.detach().double()}
    for name, parameter in model.named_parameters():
        found[name], parameter.grad = parameter.grad.double(), None
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_uncompiled_it_is_transformers(tiny, monkeypatch, dtype):
    plain = step(loaded(tiny, dtype, False), pairs_of(loaded(tiny, dtype, False)))
    uncompiled(monkeypatch)
    model = loaded(tiny, dtype, True)
    assert fuse.fuse(model) == 3 * model.config.num_hidden_layers + 1  # two norms and a SwiGLU a layer, the last norm
    for name, value in step(model, pairs_of(model)).items():
        # bit for bit, but that the residual's gradient is summed in another order
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0 if name == "loss" else 4e-7 * plain[name].norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_it_is_no_worse_than_transformers(tiny, backend, dtype):
    plain = loaded(tiny, dtype, False)
    pairs = pairs_of(plain)
    exact = step(loaded(tiny, dtype, False).double(), pairs)
    before, after = step(plain, pairs), step(loaded(tiny, dtype, True), pairs)
    assert modeling_llama.apply_rotary_pos_emb.func is fuse._rotate
    different = 0
    for name, truth in exact.items():
        error, allowed = ((found[name] - truth).norm() / truth.norm() for found in (after, before))
        assert error <= 2 * allowed + 1e-6, name
        different += not after[name].equal(before[name])
    assert different or backend != "inductor" or dtype == "float32"  # it was compiled: bfloat16 is rounded less


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_gives_the_same_gradients(tiny, monkeypatch, mode):
    using("aot_eager", monkeypatch)
    model = loaded(tiny, "float32", True)
    pairs = pairs_of(model)
    kept = step(model, pairs)
    recompute(model, mode)
    for name, value in step(model, pairs).items():
        torch.testing.assert_close(value, kept[name], rtol=1e-5, atol=1e-9)


def test_any_number_of_tokens_is_one_compilation(tiny, monkeypatch):
    using("aot_eager", monkeypatch)
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(fuse, "BACKEND", counting)
    model = loaded(tiny, "float32", True)
    pairs = pairs_of(model, 5)
    with torch.no_grad():
        for count in (5, 2, 4, 1, 3):
            loss_of(model, pairs[:count], 0.1)
    assert len(made) == 3  # a norm, a SwiGLU, a rotation; of any layer and batch


def test_what_computes_something_else_stays(tokenizer, monkeypatch):
    class Shifted(modeling_llama.LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + x * 0.125

    uncompiled(monkeypatch)
    model = LlamaForCausalLM(tiny_config(tokenizer, hidden_act="gelu"))
    for layer in model.model.layers:
        layer.input_layernorm.__class__ = Shifted
    assert fuse.fuse(model) == model.config.num_hidden_layers + 1  # the other norms
    layer = model.model.layers[0]
    assert "forward" not in vars(layer.input_layernorm) and "forward" not in vars(layer.mlp)


def test_a_gpu_fuses_by_itself_and_a_cpu_where_asked(monkeypatch):
    auto, none, compile = (ModelConfig(fuse=name) for name in ("auto", "none", "compile"))
    assert auto.fuses("cuda") and not auto.fuses("cpu") and compile.fuses("cpu") and not none.fuses("cuda")
    monkeypatch.setenv("CXX", "no-such-compiler")
    fuse.check("auto")
    with pytest.raises(UserError, match="model.fuse: compile needs a C.. compiler, and there is no no-such-compiler"):
        fuse.check("compile")
