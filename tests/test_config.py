"""cream.config: from a command line and a YAML file to a Config, and every mistake in one line."""

import dataclasses
import re
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cream.config import Config, keys, load_recipe, nearest, parse, to_yaml, validate
from cream.log import UserError

MINIMAL = "data: {prompts: [p.jsonl], sft: [s.jsonl], evaluate: [e.jsonl]}\n"


def ask(*argv: str) -> Config:
    return parse(list(argv), prog="cream.train", description="Trains.")


@pytest.fixture
def refused(capsys):
    """The one line that a command line is refused with."""

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            ask(*argv)
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, "")
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        return err[len("error: ") : -1]

    return run


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes my.yaml in a directory of its own, which becomes the current one."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> str:
        (tmp_path / "my.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return "my.yaml"

    return write


# Where values come from


def test_without_config_the_recipe_smoke_is_read():
    assert ask() == load_recipe("smoke")
    assert ask("--config", "smollm2-135m") == load_recipe("smollm2-135m")


def test_argv_none_reads_sys_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--run.seed", "5"])
    assert parse(None, prog="cream.train", description="Trains.").run.seed == 5


def test_command_line_wins_over_yaml_and_yaml_over_defaults_in_any_order(recipe):
    path = recipe(MINIMAL + "train: {lr: 3e-6, epochs: 2}\n")
    for argv in (["--config", path, "--train.lr", "1e-4"], ["--train.lr=1e-4", "--config", path]):
        config = ask(*argv)
        assert (config.train.lr, config.train.epochs, config.train.beta) == (1e-4, 2, Config().train.beta)


def test_a_file_builds_on_the_defaults_not_on_the_embedded_recipe(recipe):
    config = ask("--config", recipe(MINIMAL))
    assert config.train == Config().train and config.run.dir == "runs/default"
    assert config.data.prompts == ["p.jsonl"]


def test_several_values_after_a_flag_replace_the_recipes_list():
    assert ask("--data.prompts", "A", "B", "C", "--run.seed", "1").data.prompts == ["A", "B", "C"]
    assert ask("--data.prompts", "A", "--data.prompts", "B", "C").data.prompts == ["A", "B", "C"]
    assert ask("--data.prompts", "1", "null").data.prompts == ["1", "null"]


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--model.revision", "12"], "model.revision", "12"),
        (["--model.path", "[a]: b"], "model.path", "[a]: b"),
        (["--data.sft_limit", "null"], "data.sft_limit", None),
        (["--data.sft_limit", "7"], "data.sft_limit", 7),
        (["--train.lr", "1"], "train.lr", 1.0),
        (["--evaluate.enabled", "false"], "evaluate.enabled", False),
        (["--score.length_normalize"], "score.length_normalize", True),
        (["--consistency.level", "dyn"], "consistency.level", "dyn"),
        (["--evaluate.suffix="], "evaluate.suffix", ""),
        (["--run.only", "iter1/score"], "run.only", "iter1/score"),
    ],
)
def test_values_of_each_type(argv, key, value):
    section, name = key.split(".")
    found = getattr(getattr(ask(*argv), section), name)
    assert found == value and type(found) is type(value)


def test_resume_and_only_are_of_the_start_not_of_the_run():
    config = ask("--resume", "--run.only", "sft")
    assert config.resume and not ask().resume
    assert config == ask()
    assert "resume" not in to_yaml(config) and "only" not in to_yaml(config)


def test_numbers_with_exponent_and_dotted_keys_and_empty_sections_in_yaml(recipe):
    path = recipe("\ufeff" + MINIMAL + "train.lr: 5e-6\nsft: {lr: .5E-4, weight_decay: 1e0}\nrun:\n  # seed: 3\n")
    config = load_recipe(path)
    assert (config.train.lr, config.sft.lr, config.sft.weight_decay, config.run) == (5e-6, 5e-5, 1.0, Config().run)


# Unknown keys


@pytest.mark.parametrize(
    "key, near",
    [
        ("train.lrr", "train.lr"),
        ("trian.lr", "train.lr"),
        ("train.learning_rate", "train.lr"),
        ("sft.learning_rate", "sft.lr"),
        ("train.batch_token", "train.batch_tokens"),
        ("temperature", "sample.temperature"),
        ("sample.max_tokens", "sample.max_new_tokens"),
        ("run.resume", "resume"),
        ("data.prompt", "data.prompts"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(refused, recipe, key, near):
    assert nearest(key) == near
    assert refused(f"--{key}", "3") == f"unknown key '--{key}' on the command line: did you mean '--{near}'?"
    assert refused(f"--{key}=3") == f"unknown key '--{key}' on the command line: did you mean '--{near}'?"
    path = recipe(MINIMAL + f"{key}: 3\n")
    assert refused("--config", path) == f"unknown key '{key}' in my.yaml:2: did you mean '{near}'?"


def test_an_unknown_key_inside_a_section_has_its_line(refused, recipe):
    path = recipe(MINIMAL + "train:\n  beta: 0.2\n  lrr: 1e-6\n")
    assert refused("--config", path) == "unknown key 'train.lrr' in my.yaml:4: did you mean 'train.lr'?"
    assert "'nothing' in my.yaml:1" in refused("--config", recipe("nothing:\n"))


def test_flags_are_not_abbreviated_and_values_need_a_flag(refused):
    assert "'--train.bet'" in refused("--train.bet", "1")
    assert "'--train'" in refused("--train", "{lr: 1}")
    assert refused("prompts.jsonl").startswith('"prompts.jsonl" on the command line follows no flag')
    assert refused("--train.lr") == "train.lr on the command line: expected one argument (a number above 0)"
    assert "expected at least one argument" in refused("--data.prompts")
    assert "--config" in refused("--config")
    assert "given 2 times" in refused("--config", "smoke", "--config", "smollm2-135m")


# Values


@pytest.mark.parametrize(
    "key, value, shown, allowed",
    [
        ("train.lr", "abc", '"abc"', "a number above 0"),
        ("train.lr", "-0.5", "-0.5", "a number above 0"),
        ("train.epochs", "1.5", "1.5", "a whole number, at least 1"),
        ("sample.responses", "1", "1", "a whole number, at least 2, since ranking takes two"),
        ("sample.top_p", "0", "0", "a number above 0 and at most 1"),
        ("sample.top_p", "1.5", "1.5", "a number above 0 and at most 1"),
        ("sample.temperature", "0", "0", "a number above 0"),
        ("consistency.constant", "1.25", "1.25", "a number from 0 to 1"),
        ("consistency.level", "mean", '"mean"', "one of avg, dyn, constant"),
        ("train.warmup", "1", "1", "a number, at least 0 and below 1"),
        ("data.sft_limit", "0", "0", "a whole number, at least 1, or null"),
        ("run.seed", "-1", "-1", "a whole number from 0 to 4294967295"),
        ("sft.enabled", "perhaps", '"perhaps"', "true or false"),
        ("model.path", "' '", '" "', "text that is not empty"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(refused, recipe, key, value, shown, allowed):
    path = recipe(MINIMAL + f"{key}: {value}\n")
    assert refused("--config", path) == f"{key} is {shown} in my.yaml:2, but must be {allowed}"
    line = refused(f"--{key}", value.strip("'"))
    assert line.startswith(f"{key} is ") and line.endswith(f" on the command line, but must be {allowed}")


@pytest.mark.parametrize(
    "text, line",
    [
        ("train: {lr: null}", "train.lr is null in"),
        ("train: {lr: true}", "train.lr is true in"),
        ("train: {lr: .nan}", "train.lr is NaN in"),
        ("train: {lr: .inf}", "train.lr is Infinity in"),
        ("train: {epochs: 2.0}", "train.epochs is 2.0 in"),
        ("train: {lr: {a: 1}}", "train.lr is {'a': 1} in"),
        ("train: 5", "train is 5 in my.yaml:2, but must be a section"),
        ("model: {revision: 12}", "model.revision is 12 in"),
        ("data.prompts: a.jsonl", 'data.prompts is "a.jsonl" in'),
        ("data.prompts: [3]", "data.prompts is [3] in"),
        ("data.prompts: ['']", "data.prompts is [''] in"),
        ("run: {seed: 2024-01-01}", 'run.seed is "2024-01-01" in'),
        ("run: {dir: !!python/name:os.system x}", "my.yaml:2: not YAML: could not determine a constructor"),
        ("run: {seed: !!int x}", "my.yaml:2: 'run.seed' has a value that YAML cannot read"),
        ("train: {lr: &a [*a]}", "my.yaml:2: not YAML: found unconstructable recursive node"),
    ],
)
def test_wrong_types_in_yaml(refused, recipe, text, line):
    head = "" if text.startswith("data") else MINIMAL
    assert refused("--config", recipe(head + text + "\n")).startswith(line)


def test_what_is_shown_is_short_and_cannot_talk_to_the_terminal(refused):
    line = refused("--consistency.level", "\x1b[2J\n" + 500 * "x")
    assert "\x1b" not in line and len(line) < 200


# Files


@pytest.mark.parametrize(
    "content, line",
    [
        ("run:\n  seed: 1\n  dir: a\n  seed: 2\n", "my.yaml:4: key 'run.seed' is given twice, first in line 2"),
        ("train: {lr: 1e-6}\ntrain: {beta: 1}\n", "my.yaml:2: key 'train' is given twice, first in line 1"),
        (b"run:\n  dir: caf\xe9\n", "my.yaml:2: not UTF-8"),
        ("run:\n  dir: a\n dir: b\n", "my.yaml:3: not YAML: "),
        ("run: [1\n", "my.yaml:2: not YAML: "),
        ("run:\n  dir: a\x00b\n", "my.yaml:2: not YAML: "),
        ("- run\n- train\n", "my.yaml:1: not settings"),
        ("a: 1\n---\nb: 2\n", "my.yaml:2: not YAML: "),
        ("? [a, b]\n: 1\n", "my.yaml:1: a key must be a plain name"),
        ("", "data.prompts is empty"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe(refused, recipe, content, line):
    assert refused("--config", recipe(content)).startswith(line)


def test_a_file_that_cannot_be_read(refused, tmp_path):
    missing = str(tmp_path / "none.yaml")
    assert refused("--config", missing) == f"{missing}: cannot read this configuration: No such file or directory"
    assert "Is a directory" in refused("--config", f"{tmp_path}/")
    assert "did you mean 'smoke'?" in refused("--config", "smok")


KEYS = st.sampled_from(["run.seed", "train", "run.dir", "data.sft", "<<"])
TAGS = st.sampled_from(["int", "float", "bool", "null", "str", "seq", "map", "timestamp"])


@settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60),
        st.builds("{}: {}".format, KEYS, st.text(max_size=30)),
        st.builds("run.seed: !!{} {}".format, TAGS, st.text(max_size=8)),
    )
)
def test_any_file_is_a_recipe_or_a_users_mistake(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(str(path))
    except UserError as error:
        assert str(error)


# What must fit together


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--score.max_length", "319"], "score.max_length is 319, but must be at least data.max_prompt_tokens + "),
        (["--sft.enabled", "false"], "score.reward dpo needs sft.enabled"),
        (
            ["--sft.enabled", "false", "--score.reward", "likelihood", "--score.first_round", "sft_half"],
            "score.first_round sft_half needs sft.enabled",
        ),
    ],
)
def test_fields_that_do_not_fit_together(refused, argv, words):
    assert refused(*argv).startswith(words)


def test_data_is_needed_only_where_it_is_used(recipe):
    validate(
        load_recipe(recipe("data: {prompts: [p]}\nsft.enabled: no\nevaluate.enabled: no\nscore.reward: likelihood\n"))
    )
    for missing, off in [("prompts", None), ("sft", "sft.enabled"), ("evaluate", "evaluate.enabled")]:
        config = load_recipe("smoke")
        setattr(config.data, missing, [])
        with pytest.raises(UserError, match=f"data.{missing} is empty") as error:
            validate(config)
        assert off is None or off in str(error.value)


def test_validate_checks_types_of_a_config_built_in_python():
    for key, wrong in [
        ("run.seed", "0"),
        ("sample.top_p", float("nan")),
        ("train.batch_size", True),
        ("data.sft", "a"),
    ]:
        config = load_recipe("smoke")
        section, name = key.split(".")
        setattr(getattr(config, section), name, wrong)
        with pytest.raises(UserError, match=f"^{key} is .*, but must be "):
            validate(config)


# What is printed


@pytest.mark.parametrize(
    "extra", [[], ["--train.lr", "3e-5", "--data.prompts", "a b.jsonl", "5e-6", "--run.threads", "1"]]
)
def test_print_config_prints_what_would_run_and_exits_0(capsys, recipe, extra):
    with pytest.raises(SystemExit) as stopped:
        ask("--print_config", *extra)
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "")
    assert load_recipe(recipe(out)) == ask(*extra)


def test_help_has_every_field_with_its_sentence_range_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as stopped:
        ask("--help")
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "")
    assert "usage: cream.train" in out and "Trains." in out and "smollm2-135m" in out
    text = " ".join(out.split())
    for key, knob in keys().items():
        assert re.search(rf" --{key} .{{0,30}}{re.escape(knob.metadata['help'])} \[[^]]*; default ", text), key
    assert 'one of avg, dyn, constant; default "avg"' in out
    assert "JSONL, Parquet, hub data sets" in out


# Round trip

TEXT = st.text(min_size=1).filter(lambda text: text.strip())
LOOKS_LIKE_MORE = [
    *("5e-6", "null", "1_0", "on", "2024-01-01", "- a", "#", "~", "1:30", "=", "<<", " a ", "a: b"),
    *("a\udc80", "a\x85", "\u2028 b", "\u2029", "\ufeff", "\x1b[0m", "数学 é", "two\n\nlines\n"),
]


@pytest.mark.parametrize("text", LOOKS_LIKE_MORE)
def test_text_that_looks_like_more_round_trips(tmp_path, text):
    config = load_recipe("smoke")
    config.run.dir, config.data.prompts, config.evaluate.suffix = text + "x", [text + "x", "x" + text], text
    path = tmp_path / "config.yaml"
    path.write_bytes(to_yaml(config).encode("utf-8"))
    assert load_recipe(str(path)) == config


@settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    directory=TEXT,
    prompts=st.lists(TEXT, min_size=1, max_size=4),
    suffix=st.text(),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    limit=st.none() | st.integers(1, 10**20),
)
def test_to_yaml_round_trips(tmp_path, directory, prompts, suffix, lr, limit):
    config = load_recipe("smoke")
    config.run.dir, config.data.prompts, config.data.sft_limit = directory, prompts, limit
    config.evaluate.suffix, config.train.lr = suffix, lr
    path = tmp_path / "config.yaml"
    path.write_bytes(to_yaml(config).encode("utf-8"))
    assert load_recipe(str(path)) == config


def test_the_tree_is_documented_and_defaults_are_in_range():
    config = Config()
    config.data.prompts = config.data.sft = config.data.evaluate = ["a"]
    validate(config)
    assert Config().data.prompts == []  # lists are not shared between configurations
    for section in dataclasses.fields(Config):
        assert not dataclasses.is_dataclass(section.type) or section.type.__doc__.strip().endswith(".")
    assert all(knob.metadata["help"] and knob.metadata["allowed"].text for knob in keys().values())
