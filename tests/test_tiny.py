"""The whole loop on a random two-layer Llama: two iterations, twice, bit-equal; stages skipped, redone, run alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from cream import train
from cream.train import main

SETTINGS = {
    "model.dtype": "float32",
    "run.threads": "1",
    "data.prompts": "builtin:arithmetic:10 builtin:quiz",
    "data.sft": "builtin:arithmetic:12",
    "data.evaluate": "builtin:arithmetic:4 builtin:quiz",
    "data.prompts_per_iteration": "6",
    "data.evaluate_limit": "3",
    "data.max_prompt_tokens": "600",
    "sft.lr": "1e-3",
    "sft.epochs": "1",
    "sft.batch_size": "4",
    "sft.batch_tokens": "300",
    "sft.checkpoint_every": "1",
    "sample.responses": "3",
    "sample.max_new_tokens": "10",
    "sample.batch_size": "2",
    "sample.chunk_size": "3",
    "score.chunk_size": "2",
    "train.lr": "1e-3",
    "train.batch_size": "2",
    "train.batch_tokens": "400",
    "train.checkpoint_every": "1",
    "evaluate.max_new_tokens": "8",
    "evaluate.batch_size": "4",
}


def arguments(model: Path, directory: Path, *more: str, **changes) -> list[str]:
    settings = SETTINGS | {"model.path": str(model), "run.dir": str(directory)} | changes
    return [*(word for key, value in settings.items() for word in (f"--{key}", *value.split())), *more]


def weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stages(directory: Path) -> list[str]:
    return [row["stage"] for row in rows(directory / "ledger.jsonl")]


LOOP = ["prompts", "eval/m0", "sft", "eval/m1"]
LOOP += ["iter1/sample", "iter1/score", "iter1/rank", "iter1/train", "eval/m2"]
LOOP += ["iter2/sample", "iter2/score", "iter2/rank", "iter2/train", "eval/m3"]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "first"
    main(arguments(tiny, directory))
    return directory


@pytest.fixture
def again(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "again")


def test_two_runs_are_bit_equal(finished, tiny, tmp_path):
    main(arguments(tiny, tmp_path / "second"))
    for model in ("sft/model", "iter1/model", "iter2/model"):
        assert same(finished / model, tmp_path / "second" / model), model
        assert not same(finished / model, tiny), model
    for artifact in ("iter1/responses.jsonl", "iter2/pairs.jsonl", "eval/m3.jsonl"):
        assert (finished / artifact).read_bytes() == (tmp_path / "second" / artifact).read_bytes(), artifact


def test_every_stage_ran_once_and_left_what_it_says(finished):
    assert stages(finished) == LOOP
    prompts = [{row["id"] for row in rows(finished / f"prompts/iter{t}.jsonl")} for t in (1, 2)]
    assert [len(p) for p in prompts] == [6, 6] and not prompts[0] & prompts[1]
    for t in (1, 2):
        responses = rows(finished / f"iter{t}/responses.jsonl")
        assert {r["prompt_id"] for r in responses} == prompts[t - 1] and len(responses) == 18
        ranking, pairs = rows(finished / f"iter{t}/ranking.jsonl"), rows(finished / f"iter{t}/pairs.jsonl")
        [summary] = rows(finished / f"iter{t}/ranking.json")
        assert summary["kept"] == len(pairs) == sum(r["dropped"] is None for r in ranking)
        assert summary["kept"] + sum(summary["dropped"].values()) == 6
        by_response = {(r["prompt_id"], r["index"]): r["ids"] for r in responses}
        agreements = {r["prompt_id"]: r for r in ranking}
        for pair in pairs:
            r = agreements[pair["prompt_id"]]
            assert pair["chosen_ids"] == by_response[pair["prompt_id"], r["chosen"]]
            assert pair["rejected_ids"] == by_response[pair["prompt_id"], r["rejected"]]
            assert r["rewards"][r["chosen"]] == max(r["rewards"]) and pair["agreement"] == r["agreement"]
    assert {r["stage"] for r in rows(finished / "metrics.jsonl")} == {"sft", "iter1/train", "iter2/train"}
    assert not (finished / ".work").exists() or not any((finished / ".work").iterdir())


def test_the_first_step_of_a_round_has_a_loss_of_ln_2(finished):
    for t in (1, 2):
        first = next(r for r in rows(finished / "metrics.jsonl") if r["stage"] == f"iter{t}/train" and r["step"] == 1)
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["rewards/margins"] == pytest.approx(
            0, abs=1e-5
        )


def test_reward_and_loss_have_different_references(finished):
    """The reward's reference is M0 in every round; the loss's is theta_t."""
    table = pyarrow.parquet.read_table(finished / "iter2/scores.parquet").to_pylist()
    for row in table:
        assert row["reward"] == row["logp_policy"] - row["logp_reference"]
        assert row["previous_reward"] == row["logp_previous"] - row["logp_reference"]
    scored = {(r["prompt_id"], r["index"]): r["logp_policy"] for r in table}
    for pair, ranked in zip(
        rows(finished / "iter2/pairs.jsonl"),
        [r for r in rows(finished / "iter2/ranking.jsonl") if not r["dropped"]],
        strict=True,
    ):
        assert pair["logp_chosen"] == scored[ranked["prompt_id"], ranked["chosen"]]
    first = pyarrow.parquet.read_table(finished / "iter1/scores.parquet").to_pylist()
    for row in first:  # theta_0 is M0: its ratio is 0, its mean log-prob stands in
        assert row["logp_previous"] == row["logp_reference"]
        assert row["previous_reward"] == pytest.approx(row["logp_reference"] / row["num_tokens"])


def test_a_second_start_does_nothing(again, tiny, capsys):
    before = (again / "ledger.jsonl").read_bytes()
    main(arguments(tiny, again, "--resume"))
    assert (again / "ledger.jsonl").read_bytes() == before
    assert "M3" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, multiplies, said", [("bfloat16", False, 1), ("bfloat16", True, 0), ("auto", False, 0)])
def test_slow_bfloat16_is_said(dtype, multiplies, said, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "multiplies_halves", lambda _: multiplies)
    main(arguments(tiny, tmp_path / "run", "--run.only", "prompts", **{"model.dtype": dtype}))
    assert capsys.readouterr().err.count("model.dtype: this CPU does not multiply bfloat16") == said


def test_optimizer_settings_reach_both_trainings(again, finished, tiny):
    changed = {"optim.moments": "int8", "optim.clip_by": "tensor"}
    main(arguments(tiny, again, "--resume", "--run.only", "sft", **changed))
    assert stages(again)[len(LOOP) :] == ["sft"] and not same(finished / "sft/model", again / "sft/model")
    main(arguments(tiny, again, "--resume", "--run.only", "iter1/train", **changed))
    assert not same(finished / "iter1/model", again / "iter1/model")


def test_a_changed_setting_redoes_what_depends_on_it(again, tiny):
    main(arguments(tiny, again, "--resume", **{"consistency.level": "constant", "consistency.constant": "1.0"}))
    assert stages(again)[len(LOOP) :] == ["iter1/rank", "iter1/train", "eval/m2"] + [
        "iter2/sample", "iter2/score", "iter2/rank", "iter2/train", "eval/m3"
    ]  # fmt: skip
    assert {p["agreement"] for p in rows(again / "iter1/pairs.jsonl")} == {1.0}


def test_what_decides_no_result_redoes_nothing(again, tiny):
    changed = {"sft.checkpoint_every": "0", "train.checkpoint_every": "3", "sample.cuda_graphs": "false"}
    changed |= {"sample.url": "http://elsewhere", "evaluate.models": "last", "run.timeout": "90"}
    main(arguments(tiny, again, "--resume", **changed))
    assert stages(again) == LOOP
    main(arguments(tiny, again, "--resume", **{"evaluate.batch_size": "3", "evaluate.models": "last"}))
    assert stages(again)[len(LOOP) :] == ["eval/m3"]  # which rounding depends on


def test_damage_is_noticed_and_made_good(again, finished, tiny, capsys):
    path = again / "iter2/model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    main(arguments(tiny, again, "--resume"))
    assert "iter2/train: " in (said := capsys.readouterr().err) and "model.safetensors is not as it was written" in said
    assert same(again / "iter2/model", finished / "iter2/model")


def test_one_stage_alone(again, tiny, capsys):
    (again / "iter1/ranking.json").unlink()
    main(arguments(tiny, again, "--resume", "--run.only", "iter1/rank"))
    assert stages(again)[len(LOOP) :] == ["iter1/rank"]
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, again.parent / "new", "--run.only", "iter1/score"))
    assert stop.value.code == 2 and "prompts" in capsys.readouterr().err.splitlines()[-1]


def test_entries_stop_after_their_stage(tiny, tmp_path, capsys):
    main(arguments(tiny, tmp_path / "run"), until="sft")
    assert stages(tmp_path / "run")[-1] == "sft"
    main(arguments(tiny, tmp_path / "one", **{"evaluate.models": "last"}), until="eval/m0")
    assert stages(tmp_path / "one") == ["prompts", "eval/m0"] and "M0" in capsys.readouterr().out


def test_without_cuda_graphs_neither_sampling_nor_evaluation_has_them(tiny, tmp_path, monkeypatch):
    from cream import evaluate, sample

    asked = []

    def generate(*arguments, cuda_graphs, real=sample.generate, **settings):
        asked.append(cuda_graphs)
        return real(*arguments, cuda_graphs=cuda_graphs, **settings)

    for module in (sample, evaluate):
        monkeypatch.setattr(module, "generate", generate)
    main(arguments(tiny, tmp_path / "run", **{"sample.cuda_graphs": "false"}), until="iter1/sample")
    assert len(asked) > 4 and not any(asked)


def test_models_are_hugging_face_directories_with_their_lineage(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "iter2/model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "iter2/model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    assert model.generate(torch.tensor([ids]), max_new_tokens=3).shape[1] <= len(ids) + 3
    card = (finished / "iter2/model/README.md").read_text()
    for words in (
        "# M3",
        "from M2",
        "parent SHA-256",
        "SHA-256 of pairs.jsonl",
        "mean tau",
        "python -m cream.train --model",
    ):
        assert words in card


def test_a_model_without_a_pad_token_needs_none(tokenizer, tmp_path, capsys):
    """As LLaMA 2 and 3 are published."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.conftest import write_model

    m0 = write_model(tmp_path / "m0", tokenizer, 0, pad_token_id=None)
    settings = json.loads((m0 / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (m0 / "tokenizer_config.json").write_text(json.dumps(settings))
    main(arguments(m0, tmp_path / "run", **{"run.iterations": "1", "evaluate.models": "last"}))
    m2 = tmp_path / "run/iter1/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(m2), AutoTokenizer.from_pretrained(m2)
    assert tokenizer.pad_token is None and model.generation_config.pad_token_id is None
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape[1] > 3
    main(arguments(m2, tmp_path / "alone"), until="eval/m0")
    capsys.readouterr()
    [ours], [theirs] = (rows(tmp_path / place) for place in ("alone/eval/m0.json", "run/eval/m2.json"))
    assert ours["tasks"] == theirs["tasks"]


@pytest.mark.parametrize("choice", ["one", "sft_half"])
def test_other_first_rounds(tiny, tmp_path, choice):
    main(arguments(tiny, tmp_path / "run", **{"score.first_round": choice, "evaluate.enabled": "false"}))
    [summary] = rows(tmp_path / "run/iter1/ranking.json")
    if choice == "one":
        assert summary["tau_mean"] is None and summary["agreement_mean"] == 1.0
    else:
        assert summary["tau_mean"] is not None and not same(tmp_path / "run/sft/half", tmp_path / "run/sft/model")


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"data.prompts": "nowhere.jsonl"}, (), "nowhere.jsonl: no such file"),
        ({"model.path": "./nowhere"}, (), "model.path: ./nowhere is not there"),
        ({"sample.responses": "1"}, (), "sample.responses"),
        ({}, ("--train.lrr", "1"), "did you mean '--train.lr'"),
        ({"data.max_prompt_tokens": "5"}, (), "no prompt is within data.max_prompt_tokens=5"),
        ({"sft.enabled": "false"}, (), "score.reward dpo needs sft.enabled"),
        ({"run.only": "iter3/score"}, (), "run.only: no stage 'iter3/score'; there are import, prompts, eval/m0, sft"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_half_done(tiny, tmp_path, capsys, changes, more, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, tmp_path / "run", *more, **changes))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_given_m1_starts_the_rounds_and_needs_the_same_vocabulary(tiny, other, tokenizer, tmp_path, capsys):
    given = {"sft.enabled": "false", "sft.path": str(other), "evaluate.enabled": "false", "run.iterations": "1"}
    main(arguments(tiny, tmp_path / "run", **given))
    table = pyarrow.parquet.read_table(tmp_path / "run/iter1/scores.parquet").to_pylist()
    assert any(row["reward"] for row in table) and "sft" not in stages(tmp_path / "run")
    foreign = shutil.copytree(other, tmp_path / "foreign")
    tokens = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, tmp_path / "new", **given | {"sft.path": str(foreign)}))
    assert stop.value.code == 2 and "another vocabulary than model.path" in capsys.readouterr().err.splitlines()[-1]


def test_no_pair_at_all_is_said_and_what_was_done_stays(tiny, tmp_path, capsys):
    """Greedy-like sampling: all answers to a prompt are the same, so all rewards are tied."""
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, tmp_path / "run", **{"sample.top_p": "1e-6", "evaluate.enabled": "false"}))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "iter1/rank: none of 6 prompts make a pair (6 tied); sample more responses" in last
    assert stages(tmp_path / "run") == ["prompts", "sft", "iter1/sample", "iter1/score"]


@pytest.mark.parametrize(
    ("stage", "where", "advice"),
    [
        ("sft", "sft.train", "lower sft.batch_tokens and"),
        ("iter1/sample", "sample", "lower sample.batch_size and"),
        ("iter2/score", "score_all", "lower score.batch_tokens and"),
        ("iter1/train", "dpo.train", "lower train.batch_tokens and"),
        ("eval/m2", "evaluate", "lower evaluate.batch_size and evaluate.batch_tokens and"),
    ],
)
def test_a_gpu_that_is_too_small_is_one_line_with_what_to_lower(again, tiny, monkeypatch, capsys, stage, where, advice):
    import torch

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 2")

    monkeypatch.setattr(f"cream.train.{where}", fails)
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, again, "--resume", "--run.only", stage, **{"run.seed": "1"}))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "total capacity" not in last
    assert last.startswith(f"error: {stage}: CUDA out of memory. Tried to allocate 20.00 GiB; {advice}")


def test_a_question_without_a_gold_answer_is_named(tiny, tmp_path, capsys):
    """It would count as answered wrongly."""
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"prompt": "Say hello."}) + "\n")
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, tmp_path / "run", **{"data.evaluate": f"builtin:quiz {file}"}), until="eval/m0")
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith(f"error: {file}:1: a question without a gold answer")
    assert not (tmp_path / "run").exists()


def test_a_prompt_beyond_the_context_is_named(tiny, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 2000}) + "\n")
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, tmp_path / "run", **{"data.prompts": str(tmp_path / "long.jsonl")}))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "tokens; the model's context is 1024" in last
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(finished, tiny, capsys):
    before = sorted(str(p) for p in finished.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny, finished))
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err
    assert sorted(str(p) for p in finished.rglob("*")) == before


REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data here: real rows of the five tasks are not shipped")
def test_real_rows_of_five_tasks_mixed_with_prompt_only_rows(tiny, tmp_path):
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"prompt": "Say hello."}) + "\n" + json.dumps({"prompt": "Say goodbye."}) + "\n"
    )
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "And you?"}]}) + "\n")
    tasks = ("gsm8k", "arc_easy", "arc_challenge", "openbookqa", "social_i_qa")
    files = {split: " ".join(str(REAL / task / f"{split}.jsonl") for task in tasks) for split in ("train", "test")}
    main(
        arguments(
            tiny,
            tmp_path / "run",
            **{
                "data.prompts": f"{files['train']} {tmp_path}/own.jsonl {tmp_path}/chat.jsonl",
                "data.sft": f"{REAL}/sft_oasst1/messages.jsonl {REAL}/sft_self_instruct/train.jsonl",
                "data.sft_limit": "8",
                "data.evaluate": files["test"],
                "data.evaluate_limit": "2",
                "data.prompts_per_iteration": "12",
                "run.iterations": "1",
                "sft.max_length": "900",
            },
        )
    )
    [result] = rows(tmp_path / "run/eval/m2.json")
    assert {task: t["n"] for task, t in result["tasks"].items()} == dict.fromkeys(
        ("gsm8k", "arc_easy", "arc_challenge", "openbookqa", "siqa"), 2
    )
    assert len(rows(tmp_path / "run/prompts/iter1.jsonl")) == 12
