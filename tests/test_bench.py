"""The benches: what the protocol refuses, what a row holds, peers that compute what we do, a README that agrees."""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama import modeling_llama

from bench import __main__ as bench_all
from bench import (
    gather_logp,
    harness,
    kendall,
    ladder,
    linear_logp,
    models,
    options,
    peak,
    peers,
    report,
    step,
    tables,
    top_p,
    tune,
)
from bench import native as native_bench
from bench import weighted_dpo as dpo
from bench.shapes import HEAD_SIZES
from cream.config import ModelConfig
from cream.dpo import loss_of
from cream.model import load, load_tokenizer
from cream_kernels import linear_logp_native, tiles
from tests.conftest import Processor
from tests.test_fuse import using

ROOT = Path(__file__).resolve().parents[1]
TINY = {"model": "tiny", "N": 48, "dtype": "float32", "device": "cpu", "weigh": True}


def arguments(**changes) -> argparse.Namespace:
    known = dict(device="cpu", peers=None, repeats=3, budget=0.0, memory=False, size="tiny")
    return argparse.Namespace(**(known | changes))


def case(**ways: float) -> harness.Case:
    """Ways to compute [1, 2, 3], each off by a factor."""
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    run = {name: lambda factor=factor: {"out": exact * factor} for name, factor in ways.items()}
    key = {"model": "none", "shape": [3], "dtype": "float64", "mode": "forward"}
    return harness.Case(key, run, {}, lambda name: {"out": exact})


def row(**changes) -> dict:
    known = {"date": "2026-01-01T00:00:00+00:00", "device": "A B", "threads": 1, "shape": [3], "dtype": "float32"}
    ms = changes.get("ms", 1.5)
    return known | {"impl": "cream", "ms": ms, "p20": 0.9 * ms, "p80": 1.1 * ms} | changes


# The protocol


def test_readme_and_plots_equal_the_rows():
    assert report.differences(report.README, harness.RESULTS, tables.PLOTS) == []


@pytest.mark.parametrize("excess", [1.01, math.nan])
def test_record_refuses_a_red_row(tmp_path, excess):
    with pytest.raises(ValueError, match="no row"):
        harness.record("x", [row(excess=0.5), row(excess=excess)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_record_appends(tmp_path):
    harness.record("x", [row(excess=1.0)], tmp_path / "new")
    harness.record("x", [row(), row(impl="peer")], tmp_path / "new")
    assert [found["impl"] for found in harness.read("x", tmp_path / "new")] == ["cream", "cream", "peer"]
    assert harness.read("y", tmp_path) == []


def test_the_wrong_get_no_row(capsys):
    rows = harness.measure(
        case(cream=1 + 1e-7, eager=1 + 1e-3, near=1 + 1.9e-3, far=1 + 2.1e-3, sick=math.nan), arguments(), {}
    )
    assert [found["impl"] for found in rows] == ["cream", "eager", "near"]
    printed = capsys.readouterr().out
    assert "far is wrong" in printed and "sick is wrong" in printed


def test_a_peer_that_raises_gets_no_row_and_ours_may_not(capsys):
    def broken():
        raise KeyError("no such tile")

    found = case(cream=1.0, eager=1.0)
    found.run["peer"] = broken
    assert [r["impl"] for r in harness.measure(found, arguments(), {})] == ["cream", "eager"]
    assert "no peer: it raised KeyError" in capsys.readouterr().out
    found.run["cream"] = broken
    with pytest.raises(KeyError):
        harness.measure(found, arguments(), {})


def test_a_processor_has_a_number_beside_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "CPUINFO", tmp_path / "cpuinfo")
    assert harness.device_name("cpu") == harness.platform.machine()
    one = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Xeon: 2 GHz\nbugs\t\t:\n"
    harness.CPUINFO.write_text(f"{one}\n{one.replace('207', '8')}\n")
    assert harness.device_name("cpu") == "Xeon: 2 GHz (family 6, model 207)"
    harness.CPUINFO.write_text("processor\t: 0\nmodel name\t: Cortex\n")
    assert harness.device_name("cpu") == "Cortex"


def test_results_do_not_make_a_commit_another(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)

    for name in ("bench/results/x.jsonl", "README.md", "code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    found = []
    for changed in (None, "bench/results/x.jsonl", "README.md", "code.py"):
        if changed:
            (tmp_path / changed).write_text("two\n")
        found.append(harness.commit.__wrapped__())
    assert found[0] and found == [found[0]] * 3 + [found[0] + "+"]


def test_a_row_holds_what_it_takes_to_believe_it():
    found = case(cream=1.0, eager=1.0)
    found.limits_ms["bytes"], found.versions["cream"], found.scale["eager"] = 1e-6, "cream-trainer 1", 10.0
    found.weight_gradient_bytes = 2**20
    ours, plain = harness.measure(found, arguments(), {"cream": 3.0})
    wanted = {"date", "commit", "device", "threads", "python", "torch", "triton", "transformers"}
    wanted |= {"model", "shape", "dtype", "mode", "impl", "version", "ms", "p20", "p80", "repeats"}
    wanted |= {"mib", "extra_mib", "limits_ms", "of_limit", "error", "excess"}
    assert set(ours) == wanted
    assert (ours["mib"], ours["extra_mib"], plain["scaled_by"]) == (3.0, 2.0, 10.0)
    assert ours["of_limit"] == round(1e-6 / ours["ms"], 4)
    json.dumps([ours, plain], allow_nan=False)


def test_only_the_asked_are_timed():
    rows = harness.measure(case(cream=1.0, eager=1.0, peer=1.0), arguments(peers=["peer"]), {})
    assert [found["impl"] for found in rows] == ["cream", "peer"]


def test_turns_interleave():
    calls = []
    times = harness.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 2, "cpu")
    assert calls == list("abc") * 3
    assert {name: len(ms) for name, ms in times.items()} == dict(a=2, b=2, c=2)


def test_the_slow_leave_the_others_their_turns(monkeypatch):
    """What is timed once takes no share of the budget."""
    found = case(cream=1.0, eager=1.0, peer=1.0)
    takes = {found.run["cream"]: 10.0, found.run["eager"]: 400.0, found.run["peer"]: 30.0}
    monkeypatch.setattr(harness, "_milliseconds", lambda function, device: takes[function])
    rows = harness.measure(found, arguments(repeats=12, budget=0.4), {})
    assert {found["impl"]: found["repeats"] for found in rows} == {"cream": 10, "eager": 1, "peer": 10}


def test_spread():
    assert harness.spread([5.0, 1.0, 3.0]) == {"ms": 3.0, "p20": 1.0, "p80": 5.0}
    assert harness.spread([float(i) for i in range(11)]) == {"ms": 5.0, "p20": 1.4, "p80": 8.6}


def test_errors_leave_what_they_compare_alone():
    out, exact = torch.tensor([2.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert harness.relative_errors({"out": out}, {"out": exact}) == {"out": pytest.approx(1 / math.sqrt(5))}
    assert out.tolist() == [2.0, 2.0] and exact.tolist() == [1.0, 2.0]
    assert harness.relative_errors({"out": out}, {"out": 0 * exact})["out"] == pytest.approx(math.sqrt(8))


@pytest.mark.skipif(not peak.CLEAR.exists(), reason="the high-water mark of a process can be put back on Linux only")
def test_peaks_are_of_one_call():
    torch.ones(2**26)  # 256 MiB that are no longer there
    kept = torch.ones(2**24)
    found = peak.resident_peak_mib(lambda: (torch.ones(2**24) + kept).sum())  # two of 64 MiB at once
    assert 127 <= found <= 140


@pytest.mark.skipif(not peak.CLEAR.exists(), reason="the high-water mark of a process can be put back on Linux only")
def test_peaks_come_from_a_process_of_their_own(capsys):
    spec = {"model": "SmolLM2-135M", "N": 64, "dtype": "float32", "mode": "forward"}
    mib, absent = (
        harness.child_peaks("bench.gather_logp", "eager", [spec]),
        harness.child_peaks("bench.no", "eager", [spec]),
    )
    # The log-softmax of logits of 12 MiB, less the pages that freed memory had left in place.
    assert 11.75 <= mib[0] <= 16
    assert absent == [None] and "No module named 'bench.no'" in capsys.readouterr().out


# Peers


def tables_of_peers():
    for mode, table in {**linear_logp.TABLES, **dpo.TABLES, "both": peers.GATHER_LOGP, "tau": peers.KENDALL}.items():
        if mode not in ("forward", "trained"):  # frozen has the same functions
            for name in table:
                yield pytest.param(mode, name, id=f"{mode}-{name}")


@pytest.mark.parametrize("mode, name", [*tables_of_peers()])
def test_peers_agree_with_float64(mode, name):
    if mode == "tau":
        found = kendall.case(P=12, R=7, device="cpu", names=[name], weigh=True)
    else:
        module = linear_logp if mode in linear_logp.TABLES else dpo if mode in dpo.TABLES else gather_logp
        found = module.case(**TINY, mode=mode, names=[*dict.fromkeys([name, "eager"])])
    if name in found.absent:
        pytest.skip(found.absent[name])
    errors = {way: harness.relative_errors(run(), found.truth(way)) for way, run in found.run.items()}
    plain = errors[found.yardstick] if found.yardstick else dict.fromkeys(errors[name], 0.0)
    assert harness.excess(errors[name], plain, found.rounding) <= 1, errors


def test_what_is_absent_has_a_reason():
    nowhere = peers.Peer(lambda: None, "no_such_module", "no-such-package")
    assert peers.why_not(nowhere, "cpu") == "no-such-package is not installed: pip install .[bench]"
    assert peers.why_not(nowhere._replace(cuda_only=True), "cpu") == "needs a CUDA device"
    there, absent, versions = peers.split({"x": nowhere, "y": peers.LINEAR_LOGP["eager"]}, "cpu", ["x", "y", "quack"])
    assert list(there) == ["y"] and versions == {"y": f"torch {harness.version('torch')}"}
    assert set(absent) == {"x", "quack"}


def test_exact_kendall_is_that_of_the_reference():
    from cream_kernels import reference

    x, y = kendall.rewards(20, 6)
    assert kendall.exact(x, y).tolist() == pytest.approx(reference.kendall_tau(x.tolist(), y.tolist()), abs=1e-15)


# The benches themselves


@pytest.mark.parametrize(
    "main, name, argv",
    [
        (kendall.main, "kendall", []),
        (top_p.main, "top_p", []),
        (gather_logp.main, "gather_logp", ["--peers", "eager,torch"]),
        (linear_logp.main, "linear_logp", ["--peers", "eager,torch,liger"]),
        (dpo.main, "weighted_dpo", ["--peers", "eager,torch,liger,liger-dpo"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tiny_run(main, name, argv, tmp_path, capsys):
    main(["--tiny", "--no-memory", "--device", "cpu", "--results", str(tmp_path), *argv])
    rows = harness.read(name, tmp_path)
    assert any(found["impl"].startswith("cream") for found in rows)
    assert all(found["ms"] > 0 and found.get("excess", 0) <= 1 for found in rows)
    (drawn,) = tmp_path.glob("*.svg")
    assert drawn.name == f"{name}-{tables.slug(rows[0]['device'])}.svg"
    printed = capsys.readouterr().out
    assert "orrectness first" in printed or harness.PROTOCOL in printed
    assert printed.count("-----") and all(f" {found['impl']} " in printed for found in rows)


@pytest.mark.parametrize("main, name", [(gather_logp.main, "gather_logp"), (top_p.main, "top_p")])
def test_no_case_begins_after_the_end(main, name, tmp_path, capsys):
    given = ["--tiny", "--no-memory", "--device", "cpu", "--results", str(tmp_path)]
    main([*given, "--until", "0"])
    (shape,) = {(*found["shape"], found["dtype"], found.get("mode")) for found in harness.read(name, tmp_path)}
    assert shape[2] == "float32" and " left out (--until inf measures all)" in capsys.readouterr().out
    main([*given, "--until", "inf"])
    assert len({found["dtype"] for found in harness.read(name, tmp_path)}) == 2


class Clock:
    """Seconds that pass when benchmarks take them."""

    def __init__(self, takes: float):
        self.now, self.takes, self.commands = 1e9, takes, []

    def run(self, command: list[str]) -> argparse.Namespace:
        self.commands.append((self.now, command))
        self.now += self.takes
        return argparse.Namespace(returncode=0)


def ends(monkeypatch, tmp_path, takes: float, *given: str) -> dict[str, float | None]:
    """Of all benchmarks that begin: the seconds that each is left, None without a limit."""
    clock = Clock(takes)
    monkeypatch.setattr(sys, "argv", ["bench", "--results", str(tmp_path), *given])
    monkeypatch.setattr(bench_all.subprocess, "run", clock.run)
    monkeypatch.setattr(bench_all.time, "time", lambda: clock.now)
    bench_all.main()
    parsed = {c[2]: (now, options.parser("").parse_args(c[3:]).until) for now, c in clock.commands}
    return {name.removeprefix("bench."): end if end is None else end - now for name, (now, end) in parsed.items()}


def test_all_benchmarks_share_the_time(monkeypatch, tmp_path):
    found = ends(monkeypatch, tmp_path, 10.0, "--small")
    assert list(found) == list(bench_all.ORDER["small"])
    left = 300.0 - 3 * 10
    for name in ("kendall", "top_p", "gather_logp", "linear_logp", "weighted_dpo"):
        assert found[name] == pytest.approx(bench_all.ORDER["small"][name] * left, abs=1)
        left -= 10
    assert [found[name] for name in ("score", "sample", "step")] == [None] * 3
    found = ends(monkeypatch, tmp_path, 90.0, "--full")  # whole models want a minute
    assert list(found) == ["step", "linear_logp", "weighted_dpo", "gather_logp", "score", "top_p", "kendall"]
    for given in (["--tiny"], ["--small", "--until", "inf"]):
        found = ends(monkeypatch, tmp_path, 1e6, *given)
        assert len(found) == 8 and [end for end in found.values() if end not in (None, math.inf)] == []
    with pytest.raises(SystemExit) as stop:
        ends(monkeypatch, tmp_path, 1.0, "--peers", "eager")
    assert stop.value.code == 2


def test_all_end_with_one_table_and_one_plot(monkeypatch, tmp_path, capsys):
    harness.record("score", [row(date="2001-01-01T00:00:00+00:00", model="old"), row(impl="peer")], tmp_path)

    def run(command: list[str]) -> argparse.Namespace:
        if command[2] == "bench.linear_logp":
            now = {"date": "2999-01-01T00:00:00+00:00", "mode": "forward", "extra_mib": 1.0}
            peer = {"impl": "eager", "ms": 3.0, "extra_mib": 8.0}
            harness.record("linear_logp", [row(**now), row(**(now | peer))], tmp_path)
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--results", str(tmp_path)])
    monkeypatch.setattr(bench_all.subprocess, "run", run)
    bench_all.main()
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("linear_logp ")]
    assert line.split()[-4:] == ["MiB", "eager", "2.00", "12%"] and "\nscore " not in printed
    assert (tmp_path / "all-a-b.svg").exists() and "all-a-b.svg" in printed


NEEDS_BFLOAT16 = ("score", "logits tile")
NATIVE_PIECES = {
    "score": lambda: native_bench.head(9, 16, 300),
    "logits tile": lambda: native_bench.tile_of_logits(9, 16, 30),
    "logits": lambda: native_bench.product_logits(9, 16, 30, torch.float32),
    "dhidden": lambda: native_bench.product_dhidden(9, 16, 30, torch.bfloat16),
    "dweight": lambda: native_bench.product_dweight(9, 16, 30, torch.bfloat16),
    "fold": lambda: native_bench.fold_of_a_tile(9, 30),
    "scale": lambda: native_bench.scale_of_a_tile(9, 30),
    "gather_logp, float32": lambda: native_bench.rows_of_logits(9, 300, torch.float32),
    "gather_logp, bfloat16": lambda: native_bench.rows_of_logits(9, 300, torch.bfloat16),
    "decode attention": lambda: native_bench.decoding(10, 8, torch.float32),
}


@pytest.mark.parametrize("name", NATIVE_PIECES)
def test_a_native_piece_is_what_it_replaces(name, monkeypatch):
    half, tile = torch.empty(1, 2, dtype=torch.bfloat16), torch.empty(1, 2)
    if reason := linear_logp_native.why_not_fold(tile) or (
        linear_logp_native.why_not(half, half) if name in NEEDS_BFLOAT16 else None
    ):
        pytest.skip(reason)
    processor = Processor(cream_multiply_isa=1)  # products of float32, also where another is faster
    monkeypatch.setattr(linear_logp_native.native, "load", lambda: processor)
    truth, run = NATIVE_PIECES[name]()
    errors = native_bench.check(truth, run)
    assert errors.keys() == run.keys() - {native_bench.LOGITS_ONLY} and len(errors) > 1
    with pytest.raises(AssertionError):
        native_bench.check(truth, run | {"native": lambda: run["native"]() + 1})


def test_unknown_names_stop(tmp_path, capsys):
    for given, said in (
        ("--peers eagre", "no peer 'eagre' here; there are cream, eager"),
        ("--models G", "no model 'G'"),
    ):
        with pytest.raises(SystemExit) as stop:
            linear_logp.main(["--tiny", *given.split(), "--results", str(tmp_path)])
        assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("multiplies, dtypes", [(True, ["float32", "bfloat16"]), (False, ["float32"])])
def test_small_leaves_bfloat16_out_where_a_cpu_does_not_multiply_it(multiplies, dtypes, monkeypatch):
    monkeypatch.setattr(options, "multiplies_halves", lambda _: multiplies)
    assert options.parse("", ["--device", "cpu", "--small"]).dtypes == dtypes
    assert options.parse("", ["--device", "cpu"]).dtypes == ["float32", "bfloat16"]
    assert options.parse("", ["--device", "cpu", "--small", "--dtypes", "bfloat16"]).dtypes == ["bfloat16"]


def test_a_quick_look_leaves_the_committed_rows_alone():
    for given, folder in (("--tiny", options.QUICK), ("--small", options.QUICK), ("--full", None)):
        assert options.parse("", ["--device", "cpu", given]).results == folder
    assert options.parse("", ["--device", "cpu", "--small", "--results", "x"]).results == Path("x")


def test_on_a_gpu_what_matters_most_comes_first():
    args = options.parse("", ["--device", "cpu", "--full"])
    assert options.heads(args, HEAD_SIZES)[:2] == [("LLaMA-2-7B", 8192), ("LLaMA-3-8B", 8192)]
    assert options.chosen(None, [*linear_logp.TABLES], "mode", default=linear_logp.MODES["full"])[0] == "trained"


def test_sizes_can_be_narrowed():
    args = options.parse("", ["--device", "cpu", "--models", "LLaMA-2-7B", "--tokens", "3,5"])
    assert args.size == "cpu" and args.dtypes == ["float32", "bfloat16"]
    assert options.heads(args, {"cpu": [("SmolLM2-135M", 512)]}) == [("LLaMA-2-7B", 3), ("LLaMA-2-7B", 5)]


def eight_pairs():
    ids = [7 + (13 * i) % 90 for i in range(200)]
    return [
        {"prompt_id": str(p), "prompt_ids": ids[p : p + 9 + p], "chosen_ids": ids[50 : 60 + p], "agreement": 1.0}
        | {"rejected_ids": ids[90 + p : 104], "logp_chosen": -50.0 + p, "logp_rejected": -60.0 - p}
        for p in range(8)
    ]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_is_the_same_work_for_trl(tiny, checkpointing):
    pytest.importorskip("trl", reason="trl is not installed: pip install .[bench]")
    pairs = eight_pairs()
    our_step, our_loss = step.make_cream(tiny, pairs, "float32")
    their_step, their_loss = step.make_trl(tiny, pairs, "float32", checkpointing)
    assert our_loss() == pytest.approx(their_loss(), rel=1e-5)
    for count in (4, 8):  # the uncounted step, a counted one
        assert our_step(count) > 0 and their_step(count) > 0


@pytest.mark.parametrize("size", ["cpu", "full"])
def test_a_worker_has_the_pairs_that_its_parent_checks(size, tiny, monkeypatch):
    given, checked = [], []
    monkeypatch.setattr(step, "directory_of", lambda *_: tiny)
    monkeypatch.setattr(
        step, "MAKERS", {"cream": lambda directory, pairs, dtype: (None, lambda: given.append(pairs) or 0.0)}
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    step.main(["--worker", "cream", "tiny", "3", "float32", size])
    monkeypatch.setattr(step, "checked_loss", lambda directory, pairs, *_: checked.append(pairs) or 0.0)
    monkeypatch.setattr(
        step, "Worker", lambda *spec: checked.append(spec) or argparse.Namespace(loss=math.nan, end=lambda: 0)
    )
    step.measure("tiny", 3, "float32", ["cream"], arguments(size=size))
    assert given[0] == checked[0] and checked[-1][-1] == size


def test_models_are_made_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "CACHE", tmp_path)
    monkeypatch.setattr(models, "smollm2", lambda dtype: tiny)
    made = models.directory_of("tiny", "bfloat16")
    assert load(made, ModelConfig(dtype="bfloat16")).config.vocab_size == 512
    assert len(load_tokenizer(made)) == len(load_tokenizer(tiny))
    monkeypatch.setattr(models, "smollm2", None)
    assert models.directory_of("tiny", "bfloat16") == made


def test_peers_rotate_as_transformers_does(tiny, monkeypatch):
    own = modeling_llama.apply_rotary_pos_emb
    own = getattr(own, "args", [own])[0]
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own)  # whatever a test before this one left
    model = load(tiny, ModelConfig(path=str(tiny), dtype="float32", fuse="compile"))
    ours = modeling_llama.apply_rotary_pos_emb
    with models.untouched(model):
        assert modeling_llama.apply_rotary_pos_emb is own
    assert ours is not own and modeling_llama.apply_rotary_pos_emb is ours


def test_whole_models_on_a_cpu_need_the_gpu_hidden(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = options.parser("").parse_args(["--device", "cpu", "--small"])
    with pytest.raises(SystemExit) as stop:
        options.resolve_models(args, ["float32"])
    assert stop.value.code == 2 and "CUDA_VISIBLE_DEVICES= python" in capsys.readouterr().err


def test_the_rungs_of_the_ladder_are_one_loss_and_less_work_each(tiny, monkeypatch):
    monkeypatch.setattr(ladder, "directory_of", lambda *_: tiny)
    using("aot_eager", monkeypatch)
    rows = ladder.measure("tiny", eight_pairs(), "float32", argparse.Namespace(device="cpu", repeats=1))
    names = [row["impl"] for row in rows]
    named = ["prompts shared", "2048 tokens at once", "selective recomputation", "no recomputation"]
    assert names[1:] == [*named, "norms, SwiGLU and rotations compiled"]
    assert all(row["error"] <= 1e-5 and row["ms"] > 0 and 0 < row["mfu"] < 1 for row in rows)
    shared, packed, selective, none, compiled = (row["predicted"] for row in rows[1:])
    # Tokens that two answers need with the prompt twice and once, but for the head: more than these in all.
    assert 1 < shared < 1.6 and (packed, none, compiled) == (1, 1, 1) and 1.2 < selective < 4 / 3


def test_a_rung_is_how_the_trainer_runs(tiny):
    model = load(tiny, ModelConfig(path=str(tiny), dtype="float32")).requires_grad_(True)
    pairs, tokens = eight_pairs(), []
    watch = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    base, *_, last = ladder.rungs(2048, "sdpa")
    for rung in (base, last):
        with ladder.on(rung, model):
            loss_of(model, pairs, 0.1)
    watch.remove()
    prompts = sum(len(pair["prompt_ids"]) for pair in pairs)
    assert tokens[0] - tokens[1] == prompts and not model.training


# The report


def test_the_newest_row_stands():
    old, new, other = row(), row(date="2026-01-02T00:00:00+00:00", ms=2.5), row(threads=2)
    assert tables.newest([new, old, other]) == [new, other]
    assert "2.5 ms" in tables.markdown([old, new]) and "1.5 ms" not in tables.markdown([old, new])


def test_cells():
    full = row(ms=1234.5, of_limit=0.614, extra_mib=0.5, mib=99.0, scaled_by=10.0, tokens_per_second=56.78)
    assert tables.cell(full) == "1,234 ms*, 56.8 tokens/s, 61%, 0.5 MiB"
    assert tables.cell(None) == ""


def test_a_summary_has_ours_and_the_fastest_peer():
    rows = [row(), row(impl="cream, slow", ms=9.0), row(impl="a", ms=4.0, extra_mib=7.0), row(impl="b", ms=5.0)]
    rows += [row(impl="b", ms=3.0, mode="both"), row(threads=2, pairs_per_second=8.25, extra_mib=0.5)]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.summary(rows).splitlines()]
    assert cells[0] == ["A B, 1 thread", "3"] and cells[5] == ["A B, 2 threads", "3"]
    assert cells[2:4] == [["float32", "1.5 ms; a: 4 ms, 7 MiB"], ["float32, both", ""]]
    assert cells[7] == ["float32", "8.25 pairs/s, 0.5 MiB"]
    assert "\\* timed" in tables.summary([row(scaled_by=2.0)]) and "\\*" not in tables.summary(rows)


def test_what_was_measured_in_another_run_is_marked():
    late = "2026-01-02T00:00:00+00:00"
    rows = [row(date=late), row(impl="a", ms=2.0), row(impl="b", date="2026-01-02T00:00:09+00:00", ms=4.0)]
    lines = tables.markdown(rows).splitlines()
    assert "| 2 ms† " in lines[3] and "| 4 ms " in lines[4] and lines[-1].startswith("† in another run")
    assert "1.5 ms; a: 2 ms†" in tables.summary(rows) and "†" not in tables.summary([rows[0], rows[2]])


def test_how_many_times_as_fast():
    rows = [row(), row(impl="a", ms=3.0), row(impl="b", ms=2.0), row(shape=[4]), row(shape=[4], impl="a", ms=1.2)]
    score = [row(sequences_per_second=30.0, model="M"), row(impl="p", sequences_per_second=8.0, model="M", ms=1.0)]
    cases = tables.verdicts({"other": rows, "score": score, "linear_logp": [*rows, row(shape=[5])]})
    assert [(c.name, c.column, c.fastest, c.times) for c in cases] == [
        ("linear_logp", "3", "b", pytest.approx(4 / 3)),
        ("linear_logp", "4", "a", pytest.approx(0.8)),
        ("score", "M 3", "p", 3.75),
    ]
    lines = tables.glance(cases).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["linear_logp, float32", "0.80 to 1.33"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["score, float32", "3.75"]


def test_plots_are_the_same_bytes_each_time(tmp_path):
    rows = [row(), row(impl="peer", ms=3.0), row(impl="peer", shape=[4])]
    cases = tables.verdicts({"top_p": rows})
    for name in ("a.svg", "b.svg"):
        tables.plot(tmp_path / name, "x", rows)
        tables.plot_overview(tmp_path / f"all-{name}", cases)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "all-a.svg").read_bytes() == (tmp_path / "all-b.svg").read_bytes()
    assert tables.overview_digest(cases) != tables.overview_digest(tables.verdicts({"top_p": [row(ms=1.6), *rows[1:]]}))
    assert tables.digest(rows) != tables.digest([row(ms=1.6), *rows[1:]])


def test_report_writes_and_checks(tmp_path):
    readme, results, plots = tmp_path / "README.md", tmp_path / "results", tmp_path / "plots"
    readme.write_text("Before\n<!-- bench:x -->\n<!-- /bench -->\n<!-- bench:none -->\nold\n<!-- /bench -->\nAfter\n")
    harness.record("x", [row(), row(impl="peer", ms=3.0), row(impl="far", ms=4.0)], results)
    report.write(readme, results, plots)
    text = readme.read_text()
    assert "| float32" in text and "1.5 ms; peer: 3 ms" in text and "(bench/plots/x-a-b.svg)" in text
    assert "old" not in text
    assert "| far" in (results / "README.md").read_text() and "| far" not in text
    assert text.startswith("Before\n") and text.endswith("<!-- bench:none -->\n<!-- /bench -->\nAfter\n")
    assert report.differences(readme, results, plots) == []
    (plots / "y.svg").write_text("<svg/>")
    harness.record("x", [row(ms=2.0)], results)
    wrong = report.differences(readme, results, plots)
    assert wrong[:2] == ["x-a-b.svg differs from the rows", "y.svg has no rows"]
    assert wrong[2:] == ["results/README.md differs from the rows", "README.md differs from the rows"]
    harness.record("x", [row(device="C", date="2026-01-02T00:00:00+00:00", impl="rung")], results)
    report.write(readme, results, plots)
    assert "x-c.svg" in readme.read_text() and "x-a-b.svg" not in readme.read_text()
    assert "(../plots/x-a-b.svg)\n![x on C](../plots/x-c.svg)" in (results / "README.md").read_text()


def test_the_report_of_all(tmp_path):
    readme, results, plots = tmp_path / "README.md", tmp_path / "results", tmp_path / "plots"
    results.mkdir()
    readme.write_text("<!-- bench:all -->\n<!-- /bench -->\n")
    report.write(readme, results, plots)
    assert readme.read_text() == "<!-- bench:all -->\n<!-- /bench -->\n"
    harness.record("top_p", [row(), row(impl="peer", ms=3.0)], results)
    late = {"date": "2026-01-02T00:00:00+00:00", "device": "C"}
    harness.record("score", [row(**late), row(impl="peer", ms=0.75, **late)], results)
    report.write(readme, results, plots)
    assert "| 2.00" in readme.read_text() and "| 0.50" in readme.read_text()
    assert "(bench/plots/all-c.svg)" in readme.read_text() and "all-a-b.svg" not in readme.read_text()
    assert "(../plots/all-a-b.svg)" in (results / "README.md").read_text()
    assert report.differences(readme, results, plots) == []
    harness.record("top_p", [row(impl="peer", ms=3.5)], results)
    assert "all-a-b.svg differs from the rows" in report.differences(readme, results, plots)


# Tuning

SOURCE = """\
class Tile: ...

# rows
MEASURED: dict[tuple[str, torch.dtype, int], Tile] = {%s}

AFTER = 1
"""


def test_tuned_rows_are_merged_into_the_table():
    once = tune.merged(SOURCE % "", {("sm90", "bfloat16", 4096): {"block_n": 128, "num_warps": 8}})
    assert '{\n    ("sm90", torch.bfloat16, 4096): Tile(block_n=128, num_warps=8),\n}\n\nAFTER = 1\n' in once
    twice = tune.merged(once, {("sm90", "bfloat16", 4096): {"block_n": 64}, ("sm80", "float16", 576): {"tma": False}})
    body = (
        '\n    ("sm80", torch.float16, 576): Tile(tma=False),\n    ("sm90", torch.bfloat16, 4096): Tile(block_n=64),\n'
    )
    assert twice == SOURCE % body


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tuning_without_a_card_shows_the_candidates(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main([])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err == "bench.tune: needs a CUDA device\n"
    assert len(out.splitlines()) == len(tune.candidates("sm90")) > 10


def test_a_depth_that_is_done_is_written(tmp_path, monkeypatch):
    def fastest(arch, dtype, model, tokens, repeats, until):
        if model == "SmolLM2-135M":
            raise KeyboardInterrupt
        return {"block_n": 64}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm90")
    monkeypatch.setattr(tune, "fastest", fastest)
    monkeypatch.setattr(tune, "TILES", tmp_path / "tiles.py")
    tune.TILES.write_text(SOURCE % "")
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--write", "--minutes", "5", "--models", "SmolLM2-135M", "LLaMA-2-7B"])
    assert '("sm90", torch.bfloat16, 4096): Tile(block_n=64),' in tune.TILES.read_text()


def test_the_likely_candidates_come_first():
    for arch, first in (("sm90", "warp_specialize"), ("sm100", "warp_specialize"), ("sm80", "block_n")):
        vendor, likely, *_, last = tune.candidates(arch)
        assert vendor["vendor_gemm"] and likely[first] and not last.get("tma")
