"""LoRA: adapters as checkpoints over one base, from SFT to the merged model, and back after a kill."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from cream import lora
from cream.checkpoint import hash_tree
from cream.config import LINEAR, LoRAConfig, ModelConfig, ScoreConfig
from cream.log import UserError
from cream.model import Resident, head, hidden_states, load
from cream.score import score_all
from cream.train import main
from tests.test_tiny import arguments, rows, stages

pytest.importorskip("peft", reason="peft is not installed")

FLOAT32 = ModelConfig(dtype="float32", gradient_checkpointing="none")
SMALL = LoRAConfig(r=4, alpha=8, dropout=0.1)
SETTINGS = {"lora.r": "4", "lora.alpha": "8", "sft.lr": "2e-2", "train.lr": "2e-2", "sft.epochs": "2"}
SETTINGS |= {"lora.merge_on_export": "all", "run.iterations": "1"}
MODELS = ("sft/model", "iter1/model")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "first"
    main(arguments(tiny, directory, **SETTINGS))
    return directory


def adapted(tiny, seed=0, config=FLOAT32, **changes) -> lora.Adapted:
    return lora.Adapted(tiny, config, dataclasses.replace(SMALL, **changes), base=str(tiny), seed=seed)


def logits(model) -> torch.Tensor:
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        return hidden_states(model, ids) @ head(model).T


def random_adapter(tiny, directory: Path, seed: int, **changes) -> Path:
    """An adapter whose product is not 0."""
    resident = adapted(tiny, seed, **changes)
    resident.at(tiny, gradients=True)
    generator = torch.Generator().manual_seed(seed)
    for tensor in resident.tensors().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    resident.save(directory, None, "M1", "M0", {})
    return directory


# --- one module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_is_the_base_to_the_last_bit(tiny, dtype):
    config = dataclasses.replace(FLOAT32, dtype=dtype)
    resident, plain = adapted(tiny, config=config, dropout=0.0), load(tiny, config)
    assert torch.equal(logits(resident.at(tiny)), logits(plain))
    model = resident.at(tiny, gradients=True)
    assert torch.equal(logits(model), logits(plain))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32} and model.dtype == plain.dtype


def test_the_seed_decides_where_an_adapter_begins(tiny):
    first, same, other = (adapted(tiny, seed) for seed in (0, 0, 1))
    for resident in (first, same, other):
        resident.at(tiny, gradients=True)
    a, b, c = (torch.cat([t.flatten() for t in r.tensors().values()]) for r in (first, same, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    a.zero_()
    first.at(tiny, gradients=True)
    assert torch.equal(torch.cat([t.flatten() for t in first.tensors().values()]), b)


def test_adapters_take_turns_and_off_is_the_base(tiny, tmp_path):
    one, two = (random_adapter(tiny, tmp_path / str(seed), seed) for seed in (1, 2))
    resident, base = adapted(tiny), logits(load(tiny, FLOAT32))
    found = [logits(resident.at(place)) for place in (one, two, tiny, one)]
    assert torch.equal(found[2], base) and torch.equal(found[3], found[0])
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[0], base)
    assert not any(p.requires_grad for p in resident.model.parameters()) and not resident.model.training


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_changes_no_bit_of_a_gradient(tiny, tmp_path, mode, dropout):
    """With dropout, what fell in the forward pass falls again when a layer is computed again."""
    place, ids, found = random_adapter(tiny, tmp_path / "one", 1), torch.arange(3, 40).view(1, -1), []
    for how in ("none", mode):
        config = dataclasses.replace(FLOAT32, gradient_checkpointing=how)
        model = adapted(tiny, config=config, dropout=dropout).at(place, gradients=True)
        torch.manual_seed(5)
        hidden_states(model, ids).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_work_of_a_step_leaves_out_the_gradients_of_what_is_frozen(tiny):
    """Counted by hand: 2 operations a weight and token forward, as many for the input's gradient; a weight's own
    gradient for the adapters alone."""
    from cream.meter import forward_flops, training_flops
    from cream.packing import pack

    model = adapted(tiny).at(tiny, gradients=True)
    packed = pack([([5] * 7, ([6] * 4, [7] * 3))], torch.device("cpu"))
    matrices, small = (
        2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    vocabulary, T, N = head(model).shape[0], packed.tokens, 7
    attended = 4 * 2 * 32 * packed.segments.seen
    assert forward_flops(model, packed) == 2 * T * (matrices + small) + attended + 2 * N * vocabulary * 32
    assert training_flops(model, packed) == 2 * (2 * T * matrices + 2 * N * vocabulary * 32) + 3 * (
        2 * T * small + attended
    )


# --- a whole run


def test_only_adapters_move(finished, tiny, tmp_path):
    assert stages(finished)[2:4] == ["sft", "sft/merge"] and stages(finished)[-2:] == ["iter1/merge", "eval/m2"]
    whole = [path.parent.name for path in finished.rglob("model.safetensors")]
    assert sorted(whole) == ["merged", "merged"]  # the base is on disk once, where it was
    for model in MODELS:
        files = {path.name for path in (finished / model).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert all(name.split(".")[-2] in ("lora_A", "lora_B") for name in load_file(finished / model / lora.ADAPTER))
    sizes = [sum(f.stat().st_size for f in (finished / place).iterdir()) for place in ("iter1/model", "iter1/merged")]
    assert 2 * sizes[0] < sizes[1]
    inputs = {row["stage"]: row["inputs"] for row in rows(finished / "ledger.jsonl")}
    assert inputs["iter1/score"]["reference"] == inputs["sft"]["m0"] == hash_tree(tiny)
    one, two = (load_file(finished / model / lora.ADAPTER) for model in MODELS)
    assert one.keys() == two.keys() and not any(torch.equal(one[name], two[name]) for name in one)


def test_peft_reads_the_adapters(finished, tiny):
    import peft

    settings = json.loads((finished / "iter1/model/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny) and settings["target_modules"] == sorted(LINEAR)
    assert (finished / "iter1/model/README.md").read_text().startswith("---\nlibrary_name: peft\n")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(finished / "iter1/model")
    ids = torch.arange(3, 40).view(1, -1)
    ours = logits(adapted(tiny).at(finished / "iter1/model"))
    torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=1e-5)


def test_merged_models_are_the_adapters_over_the_base(finished, tiny):
    resident = adapted(tiny)
    for model in MODELS:
        place = finished / model
        whole = load(place.with_name("merged"), FLOAT32)
        torch.testing.assert_close(logits(whole), logits(resident.at(place)), rtol=0, atol=1e-5)
        assert (logits(whole) - logits(resident.at(tiny))).abs().max() > 1e-2


def test_scores_by_switching_are_those_of_three_models(finished, tiny, work, tmp_path):
    places = {"policy": "iter1/model", "previous": "sft/model"}
    switched = {name: finished / place for name, place in places.items()} | {"reference": tiny}
    whole = {name: finished / Path(place).with_name("merged") for name, place in places.items()} | {"reference": tiny}
    answers = rows(finished / "iter1/responses.jsonl")
    found = []
    for n, (resident, checkpoints) in enumerate([(adapted(tiny), switched), (Resident(tiny, FLOAT32), whole)]):
        part = type(work)()
        part.directory = tmp_path / str(n)
        table = score_all(resident, checkpoints, answers, ScoreConfig(), part, iteration=2)
        found.append([table.column(f"logp_{name}").to_numpy() for name in checkpoints])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5)
    assert len({tuple(column) for column in found[0]}) == 3
    table = pyarrow.parquet.read_table(finished / "iter1/scores.parquet")  # the run's own, whose reference is the base
    np.testing.assert_allclose(found[0][2], table.column("logp_reference").to_numpy(), rtol=1e-6, atol=1e-5)


class Killed(Exception):
    pass


def test_resumed_in_the_middle_of_training_it_is_bit_equal(finished, tiny, tmp_path, monkeypatch):
    """Dropout and all: a step's draws are its own."""
    from cream import optim

    def save_step(directory, step, tensors, meta, save=optim.save_step):
        save(directory, step, tensors, meta)
        assert all("lora_" in name for name in tensors)
        if step == 3 or meta["stage"] == "iter1/train":
            raise Killed

    directory, begun = tmp_path / "run", []
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(optim, "save_step", save_step)
            with pytest.raises(Killed):
                main(arguments(tiny, directory, *begun, **SETTINGS))
        begun = ["--resume"]
    main(arguments(tiny, directory, *begun, **SETTINGS))
    for model in MODELS:
        first, second = ((place / model / lora.ADAPTER).read_bytes() for place in (finished, directory))
        assert first == second, model
    settings = [(place / "sft/model/adapter_config.json").read_bytes() for place in (finished, directory)]
    assert settings[0] == settings[1]


def test_where_adapters_are_merged_decides_no_other_result(finished, tiny, tmp_path, capsys):
    again = shutil.copytree(finished, tmp_path / "again")
    main(arguments(tiny, again, "--resume", **SETTINGS | {"lora.merge_on_export": "none"}))
    capsys.readouterr()
    assert stages(again) == stages(finished)


def test_an_adapter_as_the_model_is_merged_with_its_base(finished, tmp_path, capsys):
    main(arguments(finished / "iter1/model", tmp_path / "run"), until="eval/m0")
    capsys.readouterr()
    assert stages(tmp_path / "run") == ["import", "prompts", "eval/m0"]
    [ours], [theirs] = (rows(place) for place in (tmp_path / "run/eval/m0.json", finished / "eval/m2.json"))
    assert ours["tasks"] == theirs["tasks"]


def test_a_given_m1_is_an_adapter_of_the_same_kind(finished, tiny, other, tmp_path, capsys):
    given = {"sft.enabled": "false", "evaluate.enabled": "false", "lora.merge_on_export": "none"}
    given |= {"sft.path": str(finished / "sft/model")}
    main(arguments(tiny, tmp_path / "run", **SETTINGS | given))
    assert stages(tmp_path / "run")[-1] == "iter1/train"
    later = ("--resume", "--run.only", "iter1/merge")
    main(arguments(tiny, tmp_path / "run", *later, **SETTINGS | given))
    assert stages(tmp_path / "run")[-1] == "iter1/merge" and (tmp_path / "run/iter1/merged/config.json").is_file()
    for changes, message in (
        ({"sft.path": str(other)}, "is a whole model, but lora.r asks for adapters over M0"),
        ({"lora.r": "0"}, "is an adapter, but lora.r is 0"),
        ({"lora.alpha": "16"}, "adapter with alpha 8, but lora.alpha is 16"),
        ({"lora.targets": "q_proj v_proj"}, "but lora.targets is ['q_proj', 'v_proj']; make them equal"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments(tiny, tmp_path / "new", **SETTINGS | given | changes))
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "new").exists()


def test_a_given_m1_is_of_its_own_repositorys_newest_revision(other, monkeypatch):
    asked = []

    def download(name, revision):
        asked.append((name, revision))
        return str(other)

    monkeypatch.setattr("cream.model._download", download)
    config = ModelConfig(path="someone/m0", revision="v1")
    assert lora.given("someone/m1", config, LoRAConfig()) == other and asked == [("someone/m1", None)]


# --- what is refused


def test_a_given_m1_that_is_not_there_is_said_of_its_own_field():
    with pytest.raises(UserError, match="^sft.path: ./nowhere is not there; give a model directory"):
        lora.given("./nowhere", FLOAT32, LoRAConfig())


def test_adapters_of_another_model_or_none_are_refused(tiny, tmp_path, tokenizer):
    from tests.conftest import write_model

    wide = write_model(tmp_path / "wide", tokenizer, 0, intermediate_size=64)
    place = random_adapter(wide, tmp_path / "one", 1)
    with pytest.raises(UserError, match="an adapter of another model"):
        adapted(tiny).at(place)
    with pytest.raises(UserError, match="does not fit"):
        lora.merged(tiny, place, FLOAT32)
    deep = write_model(tmp_path / "deep", tokenizer, 0, num_hidden_layers=3)
    with pytest.raises(UserError, match="layers.2.* is in one of adapter and model only"):
        adapted(tiny).at(random_adapter(deep, tmp_path / "two", 1))
    with pytest.raises(UserError, match="not the configuration of an adapter"):
        adapted(tiny).at(tmp_path)
    tensors = load_file(place / lora.ADAPTER)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, place / lora.ADAPTER)
    with pytest.raises(UserError, match="layers.0.* is in one of adapter and model only"):
        lora.merged(wide, place, FLOAT32)
    (place / lora.ADAPTER).write_bytes(b"{}")
    with pytest.raises(UserError, match="adapter_model.safetensors: cannot be read"):
        lora.merged(wide, place, FLOAT32)
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(UserError, match="base_model_name_or_path: /nowhere is not there.*write there where the base"):
        lora.base_of(place, FLOAT32)
    (place / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="an adapter of kind IA3; cream reads LoRA adapters"):
        lora.base_of(place, FLOAT32)


@pytest.mark.parametrize(
    "name, value",
    [
        ("alpha_pattern", {"q_proj": 32}),
        ("rank_pattern", {"layers.0.mlp.up_proj": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("use_dora", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("alora_invocation_tokens", [1, 2]),
    ],
)
def test_adapters_that_mean_something_else_are_refused_by_the_settings_name(finished, tiny, tmp_path, name, value):
    place = shutil.copytree(finished / "sft/model", tmp_path / "m1")
    lora.given(str(place), FLOAT32, SMALL)
    settings = json.loads((place / "adapter_config.json").read_text())
    assert name in settings
    for harmless in ({"init_lora_weights": "gaussian"}, {"use_rslora": True, "lora_alpha": 4}):
        (place / "adapter_config.json").write_text(json.dumps(settings | harmless))
        lora.given(str(place), FLOAT32, SMALL)
    (place / "adapter_config.json").write_text(json.dumps(settings | {name: value}))
    with pytest.raises(UserError, match=rf"m1: adapter with {name} .*, which cream does not train on; merge it"):
        lora.given(str(place), FLOAT32, SMALL)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora.targets": "q_proj lm_head"}, "lora.targets is ['q_proj', 'lm_head'] on the command line, but must be"),
        ({"lora.dropout": "1"}, "lora.dropout"),
        ({"lora.r": "0", "run.only": "iter1/merge"}, "iter1/merge: lora.r is 0, so there is no adapter to merge"),
    ],
)
def test_mistakes_are_one_line(finished, tiny, tmp_path, capsys, changes, message):
    again = shutil.copytree(finished, tmp_path / "again")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, again, "--resume", **SETTINGS | changes))
    assert stop.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("program", ["train", "doctor"])
def test_without_peft_it_is_one_line(tiny, tmp_path, monkeypatch, capsys, program):
    from importlib import metadata

    from cream import doctor

    real = metadata.version

    def version(package: str) -> str:
        if package == "peft":
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as stop:
        {"train": main, "doctor": doctor.main}[program](arguments(tiny, tmp_path / "run", **SETTINGS))
    [line] = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "pip install -e .[peft]" in line and not (tmp_path / "run").exists()
