"""The report of a small run directory made by hand: its numbers, its page, and text that wants to be code."""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from cream import plots, report, summary
from cream.log import UserError

STEPS, PROMPTS, RESPONSES = 12, 8, 5

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "</svg><script>alert(1)</script>",
    "--><script>alert(1)</script><!--",
    "]]><script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    '" onfocus="alert(1)" autofocus="',
    '<a href="javascript:alert(1)">x</a>',
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<style>@import 'http://example.org/x.css';</style>",
    "</style><script>alert(1)</script>",
    "</pre><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<meta http-equiv=refresh content='0;url=http://example.org'>",
    "<base href=http://example.org/><form action=http://example.org><button>",
    "{{ 7 * 7 }}{% raw %}<object data=http://example.org>",
]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(
    directory, *, text="an answer", prompt="What is 2 + 2?", name="p", tasks=("arithmetic", "quiz"), chosen=1.0
):
    """A finished run of two iterations with that text; `chosen` is the last step's rewards/chosen."""
    draw = random.Random(0)
    (directory / "eval").mkdir(parents=True)
    (directory / "config.yaml").write_text(
        "run:\n  iterations: 2\nmodel:\n  path: smollm2-135m\n  revision: null\ntrain:\n  beta: 0.1\n", encoding="utf-8"
    )
    for model in range(4):
        rows = [
            {
                "prompt_id": f"{name}-{task}-{i}",
                "task": task,
                "text": text,
                "extracted": "4",
                "answer": "4",
                "correct": i < 4 + 2 * model,
            }
            for task in tasks
            for i in range(20)
        ]
        jsonl(directory / "eval" / f"m{model}.jsonl", rows)
        scores = {
            task: {
                "n": 20,
                "accuracy": (4 + 2 * model) / 20,
                "answered": 0.95,
                "acc": 0.5 if t else None,
                "acc_norm": 0.55 if t else None,
            }
            for t, task in enumerate(tasks)
        }
        evaluation = {"model": f"M{model}", "tasks": scores, "mean_accuracy": (4 + 2 * model) / 20}
        (directory / "eval" / f"m{model}.json").write_text(json.dumps(evaluation), encoding="utf-8")
    metrics = [
        {"time": "2026-01-01T00:00:00", "stage": "sft", "step": s, "loss": 2 / s, "lr": 1e-6}
        for s in range(1, STEPS + 1)
    ]
    for t in (1, 2):
        names = [f"{name}-{t}-{p}" for p in range(PROMPTS)]
        jsonl(
            directory / "prompts" / f"iter{t}.jsonl",
            [
                {"id": n, "task": tasks[0], "messages": [{"role": "user", "content": prompt}], "question": prompt}
                for n in names
            ],
        )
        responses, rankings = [], []
        for p, n in enumerate(names):
            rewards = [round(draw.gauss(0, 5), 3) for _ in range(RESPONSES)]
            best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
            for r in range(RESPONSES):
                ids = list(range(10 + 4 * r + p))
                finish = "stop" if r else "length"
                responses.append(
                    {
                        "prompt_id": n,
                        "task": tasks[0],
                        "index": r,
                        "prompt_ids": [1],
                        "ids": ids,
                        "text": f"{text} {r}",
                        "finish": finish,
                    }
                )
            tied = p == 0
            rankings.append(
                {
                    "prompt_id": n,
                    "task": tasks[0],
                    "rewards": rewards,
                    "previous_rewards": [None] * RESPONSES if tied else [r / 2 for r in rewards],
                    "tau": None if tied else (-1, -0.4, 0.0, 0.2, 0.6, 0.8, 1.0)[p - 1],
                    "consistency": None if tied else 0.6,
                    "agreement": None if tied else 0.6,
                    "chosen": None if tied else best,
                    "rejected": None if tied else worst,
                    "dropped": "tied" if tied else None,
                }
            )
        jsonl(directory / f"iter{t}" / "responses.jsonl", responses)
        jsonl(directory / f"iter{t}" / "ranking.jsonl", rankings)
        facts = {
            "prompts": PROMPTS,
            "tau_mean": 0.171,
            "tau_std": 0.63,
            "agreement_mean": 0.6,
            "kept": 7,
            "tied_rankings": 1,
        }
        facts |= {
            "dropped": {"tied": 1, "identical": 0, "nan": 0},
            "reward_margin": 11.25,
            "level": "avg",
            "method": "kendall",
        }
        facts |= {"map": "linear", "mean_response_tokens": 21.5, "stopped": 0.8}
        (directory / f"iter{t}" / "ranking.json").write_text(json.dumps(facts), encoding="utf-8")
        for s in range(1, STEPS + 1):
            values = {
                "loss": math.log(2) - s / 50,
                "rewards/chosen": chosen * s / STEPS,
                "rewards/rejected": -s / STEPS,
                "rewards/margins": 2 * s / STEPS,
            }
            metrics.append({"time": "2026-01-01T00:00:00", "stage": f"iter{t}/train", "step": s, **values})
    jsonl(directory / "metrics.jsonl", metrics)
    names = ["sft", "iter1/sample", "iter1/train", "iter2/sample", "iter2/train"]
    jsonl(
        directory / "ledger.jsonl",
        [
            {
                "stage": stage,
                "time": f"2026-01-01T00:0{i}:00.000+00:00",
                "inputs": {"model": "ab" * 32},
                "settings_sha256": "cd" * 32,
                "outputs": {
                    f"{stage.split('/')[0]}/{'model' if 'sample' not in stage else 'responses.jsonl'}": "ef" * 32
                },
                "facts": {"seconds": 30.5 + i, "tokens": 123456, "tokens_per_second": 4047.7, "too_long": 3}
                | ({"mfu": 0.4567, "memory_gb": 71.5, "sequence_forwards_per_prompt": 2.0} if "train" in stage else {}),
            }
            for i, stage in enumerate(names)
        ],
    )
    return directory


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def bare(monkeypatch):
    """Pages without plots, for tests of something else: drawing is what takes time."""
    monkeypatch.setattr(report, "figures", lambda summary: [])


class Page(HTMLParser):
    """Every element and attribute of a page as a browser's tokenizer sees it, and the text outside of style."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


def page_of(run_dir):
    return report.write(run_dir).read_text(encoding="utf-8")


# --- the numbers


@pytest.mark.parametrize("right, n", [(0, 1), (0, 20), (1, 1), (7, 20), (20, 20), (612, 1319)])
def test_wilson_is_scipys(right, n):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert summary.wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_is_everything():
    assert summary.wilson(0, 0) == (0.0, 1.0)


def test_collect(run_dir):
    s = summary.collect(run_dir)
    assert s.models == ["M0", "M1", "M2", "M3"] and s.means["M3"] == 0.5
    first, last = s.scores[0], s.scores[-1]
    assert (first.model, first.task, first.n, first.accuracy, first.acc) == ("M0", "arithmetic", 20, 0.2, None)
    assert (first.gained, first.lost) == (0, 0)
    assert (last.model, last.task, last.gained, last.lost, last.acc_norm) == ("M3", "quiz", 6, 0, 0.55)
    one = s.rounds[0]
    assert (one.iteration, one.prompts, one.responses, len(one.lengths)) == (1, PROMPTS, RESPONSES, PROMPTS * RESPONSES)
    assert one.stopped == 0.8 and len(one.taus) == 7 and len(one.chosen_lengths) == len(one.rejected_lengths) == 7
    assert sum(one.lengths) == sum(10 + 4 * r + p for r in range(RESPONSES) for p in range(PROMPTS))
    assert set(s.curves) == {"sft", "iter1/train", "iter2/train"}


def test_lost_questions_are_counted(run_dir):
    path = run_dir / "eval" / "m3.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    jsonl(path, [{**row, "correct": not row["correct"]} for row in rows])
    last = summary.collect(run_dir).scores[-1]  # M0 has the first 4 right; M3 now the last 10
    assert (last.gained, last.lost) == (10, 4)


def test_marks_and_order_of_responses(run_dir):
    s = summary.collect(run_dir)
    ranking = [json.loads(line) for line in (run_dir / "iter1" / "ranking.jsonl").read_text().splitlines()]
    for prompt, row in zip(s.rounds[0].shown, ranking, strict=True):
        rewards = [a.reward for a in prompt.answers]
        assert rewards == sorted(row["rewards"], reverse=True)
        marks = [a.mark for a in prompt.answers]
        assert marks == ([""] * RESPONSES if row["dropped"] else ["best", "", "", "", "worst"])


def test_shown_prompts_are_spread_and_the_rest_is_counted(run_dir, monkeypatch, bare):
    monkeypatch.setattr(summary, "SHOWN_PROMPTS", 3)
    shown = summary.collect(run_dir).rounds[0].shown
    assert [p.id for p in shown] == ["p-1-0", "p-1-2", "p-1-5"]
    assert "the other 5 are in iter1/responses.jsonl" in page_of(run_dir)


def test_long_text_is_cut_and_says_so(tmp_path, bare):
    run_dir = make_run(tmp_path / "run", text="x" * 9000)
    assert "x [1002 more characters]" in page_of(run_dir)


def test_table(run_dir):
    text = report.table(run_dir)
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["task", "model", "n", "correct", "95% interval", "vs M0", "answered", "acc", "acc_norm"] in lines
    low, high = (100 * x for x in summary.wilson(10, 20))
    assert ["quiz", "M3", "20", "50.0%", f"{low:.1f} - {high:.1f}", "+6 -0", "95.0%", "50.0%", "55.0%"] in lines
    for row in (
        ["mean of tasks", "M1", "30.0%"],
        ["tau, mean", "0.171", "0.171"],
        ["pairs kept", "7", "7"],
        ["dropped: best and worst tied", "1", "1"],
        ["left out: too long for training", "3", "3"],
        ["reward margin best - worst, nats", "11.25", "11.25"],
        ["response length, mean tokens", "21.5", "21.5"],
        ["responses that ended by themselves", "80.0%", "80.0%"],
        ["iter1/train", "32.5", "123,456", "4,048", "45.7%", "71.50", "2.00", "2026-01-01T00:02:00"],
        ["iter1/sample", "31.5", "123,456", "4,048", "-", "-", "-", "2026-01-01T00:01:00"],
        ["all", "162.5"],
    ):
        assert row in lines


# --- warnings


def test_healthy_run_has_no_warning(run_dir):
    assert summary.collect(run_dir).warnings == []


def test_falling_chosen_rewards_warn(tmp_path, bare):
    found = summary.collect(make_run(tmp_path / "run", chosen=-1.0)).warnings
    assert [w.split(":")[0] for w in found] == ["iter1/train", "iter2/train"]
    assert "fell to -0.92" in found[0]  # the mean of 10, 11 and 12 twelfths
    assert "fell to -0.92" in page_of(tmp_path / "run")


def rewrite(path, change):
    jsonl(path, [{**row, **change(row)} for row in map(json.loads, path.read_text().splitlines())])


def test_drifting_lengths_and_lost_stops_warn(run_dir):
    rewrite(run_dir / "iter2" / "responses.jsonl", lambda row: {"ids": row["ids"] * 2, "finish": "length"})
    found = summary.collect(run_dir).warnings
    assert len(found) == 2
    assert found[0] == "iteration 2: responses have 43 tokens on average, 2.00 times the 22 of iteration 1"
    assert "0.0% of the responses end by themselves, 80.0% in iteration 1" in found[1]


def test_length_bias_warns(run_dir):
    rewrite(run_dir / "iter1" / "ranking.jsonl", lambda row: {} if row["dropped"] else {"chosen": 4, "rejected": 0})
    (found,) = summary.collect(run_dir).warnings
    assert found == "iteration 1: chosen answers are 30 tokens long, rejected ones 14: the reward may measure length"


def test_reversed_preferences_warn(run_dir):
    path = run_dir / "iter2" / "ranking.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"agreement_mean": 0.39}))
    (found,) = summary.collect(run_dir).warnings
    assert found.startswith("iteration 2: mean agreement 0.39 is below 1/2")


def test_lost_accuracy_warns(run_dir):
    path = run_dir / "eval" / "m3.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean_accuracy": 0.3}))
    assert summary.collect(run_dir).warnings == ["M3: mean accuracy 30.0%, below M2's 40.0%"]


# --- the page


def test_page_holds_what_it_should(run_dir):
    html = page_of(run_dir)
    page = Page(html)
    text = " ".join("".join(page.text).split())
    assert page.tags.count("svg") == 6 and page.tags.count("details") == 2 * PROMPTS + 1
    for piece in (
        "smollm2-135m",
        "2 of 2 iterations trained",
        "abababababab",
        "tau 0.20",
        "no pair: tied",
        "iteration 1, mean 0.17",
        "ln 2",
    ):
        assert piece in text
    assert sum(a == ("div", "class", "answer best") for a in page.attributes) == 14
    assert html.count("currentColor") > 100 and plots.INK not in html


def test_page_may_load_and_run_nothing(run_dir):
    page = Page(page_of(run_dir))
    policies = [
        value for tag, key, value in page.attributes if tag == "meta" and key == "content" and "default-src" in value
    ]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    assert_inert(page)


def assert_inert(page):
    """No element that runs, embeds, sends or loads; no handler; every reference stays inside the page."""
    assert not {"script", "iframe", "object", "embed", "form", "base", "link", "img", "a", "audio", "video"} & set(
        page.tags
    )
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), (tag, key)
        assert key not in ("src", "srcdoc", "href", "action", "formaction", "autofocus"), (tag, key, value)
        assert key != "xlink:href" or value.startswith("#"), value
        assert "url(" not in value or "url(#" in value, value
        assert not (tag == "meta" and key == "http-equiv" and value != "Content-Security-Policy")


def skeleton(page):
    """The page's elements but for those whose number depends on what a plot or its legend says."""
    return [tag for tag in page.tags if tag not in ("path", "text", "g", "use", "defs", "style", "clippath", "rect")]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The pages of a harmless run, without plots and with."""
    run_dir = make_run(tmp_path_factory.mktemp("clean") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "figures", lambda summary: [])
        bare = Page(page_of(run_dir))
    return bare, Page(page_of(run_dir))


def hostile_run(directory, payload):
    run_dir = make_run(directory, text=payload, prompt=payload, name=payload, tasks=(payload, "quiz"))
    rewrite(run_dir / "ledger.jsonl", lambda row: {"inputs": {payload: payload}})
    rewrite(run_dir / "metrics.jsonl", lambda row: {"stage": row["stage"] + payload})
    with (run_dir / "config.yaml").open("a") as file:
        file.write(f"data: {json.dumps([payload])}\n")
    return run_dir


@pytest.mark.parametrize("payload", HOSTILE)
def test_hostile_text_stays_text(tmp_path, bare, clean, payload):
    page = Page(page_of(hostile_run(tmp_path / "run", payload)))
    assert_inert(page)
    assert skeleton(page) == skeleton(clean[0])
    assert "".join(page.text).count(payload) >= 2 * PROMPTS * (RESPONSES + 1)  # each answer and each prompt, as it was


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # such names are too long for any plot
def test_hostile_names_stay_text_in_plots(clean):
    scores = dict.fromkeys(HOSTILE, [(0.5, 0.4, 0.6)] * len(HOSTILE))
    page = Page(plots.accuracy(HOSTILE, scores) + plots.losses([(HOSTILE[0], [{"step": 1, "loss": 1.0}])]))
    assert_inert(page)
    assert all(page.text.count(payload) == 2 + (payload == HOSTILE[0]) for payload in HOSTILE)  # tick, legend, title
    assert set(page.tags) <= set(clean[1].tags)


def test_hostile_page_with_plots(tmp_path, clean):
    page = Page(page_of(hostile_run(tmp_path / "run", "".join(HOSTILE[:3]))))
    assert_inert(page)
    assert skeleton(page) == skeleton(clean[1])


CONTROLS = "a\x1b]0;owned\x07\x1b[2J\x9b31m\r\x00\u202eb\ud800"


def test_no_control_bytes_reach_page_or_terminal(tmp_path):
    run_dir = make_run(tmp_path / "run", text=CONTROLS, prompt=CONTROLS, name=CONTROLS, tasks=(CONTROLS, "quiz"))
    rewrite(run_dir / "ledger.jsonl", lambda row: {"stage": row["stage"] + CONTROLS})
    for output in (page_of(run_dir), report.table(run_dir)):
        assert "owned" in output
        assert not set(re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", output))


def test_mathematics_in_a_name_is_no_mathematics(tmp_path):
    page = Page(page_of(make_run(tmp_path / "run", tasks=("$\\frac{1$", "quiz"))))
    assert "$\\frac{1$" in page.text


def test_same_run_same_bytes(run_dir):
    assert page_of(run_dir) == page_of(run_dir)


# --- runs that are unfinished or damaged


def test_run_that_has_only_started(tmp_path):
    (tmp_path / "config.yaml").write_text("run:\n  iterations: 2\n")
    assert report.table(tmp_path) == "nothing has finished yet"
    assert "No model has been written yet" in page_of(tmp_path)


def test_run_killed_after_sampling(run_dir, bare):
    for name in ("ranking.json", "ranking.jsonl"):
        (run_dir / "iter2" / name).unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01T00:00:00", "stage": "iter2/tr')
    (run_dir / "eval" / "m3.json").unlink()
    s = summary.collect(run_dir)
    assert s.models == ["M0", "M1", "M2"] and s.rounds[1].taus == [] and len(s.rounds[1].lengths) == 40
    assert [a.mark for a in s.rounds[1].shown[1].answers] == [""] * RESPONSES
    assert ["pairs kept", "7", "-"] in [
        re.split(r"\s{2,}", line.strip()) for line in report.table(run_dir).splitlines()
    ]
    assert "reward -, previous" in " ".join(page_of(run_dir).split())


def test_values_that_are_no_numbers_leave_gaps(run_dir):
    rewrite(run_dir / "metrics.jsonl", lambda row: {"loss": None} if row["step"] % 2 else {"loss": math.nan})
    rewrite(run_dir / "iter1" / "ranking.jsonl", lambda row: {"tau": None, "previous_rewards": [math.nan] * RESPONSES})
    assert "tau -, agreement 0.60" in " ".join(page_of(run_dir).split())


@pytest.mark.parametrize(
    "file, line, complaint",
    [
        ("iter1/responses.jsonl", "not json", "responses.jsonl:2: not JSON"),
        ("iter1/ranking.jsonl", "[1]", "ranking.jsonl:2: no field 'prompt_id'"),
        ("eval/m1.jsonl", '{"prompt_id": "x", "task": "y"}', "m1.jsonl:2: no field 'correct'"),
        ("ledger.jsonl", "{}", "ledger.jsonl:2: no field 'stage'"),
    ],
)
def test_damage_names_file_and_line(run_dir, file, line, complaint):
    lines = (run_dir / file).read_text().splitlines()
    (run_dir / file).write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=re.escape(complaint)):
        summary.collect(run_dir)


@pytest.mark.parametrize("content, complaint", [("{", "m1.json: not JSON"), ("[]", "m1.json: not a JSON object")])
def test_damaged_json(run_dir, content, complaint):
    (run_dir / "eval" / "m1.json").write_text(content)
    with pytest.raises(UserError, match=complaint):
        summary.collect(run_dir)


def test_entry(run_dir, capsys, bare):
    report.main([str(run_dir)])
    out, err = capsys.readouterr()
    assert "Accuracy" in out and out.endswith("\n") and f"report: {run_dir / 'report.html'}" in err


def test_entry_refuses_what_is_no_run(tmp_path, capsys):
    for path, complaint in ((tmp_path, "no config.yaml in it"), (tmp_path / "none", "no such run directory")):
        with pytest.raises(SystemExit) as stop:
            report.main([str(path)])
        assert stop.value.code == 2
        assert capsys.readouterr().err.splitlines() == [
            f"error: {path}: {complaint}" + ("" if path != tmp_path else ", so it is not the directory of a run")
        ]
    assert list(tmp_path.iterdir()) == []
