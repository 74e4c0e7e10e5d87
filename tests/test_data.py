"""Sources, files and rounds, each against what a user may get wrong."""

import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cream import rows
from cream.data import (
    Example,
    load_conversations,
    load_prompts,
    read_examples,
    save_examples,
    split_rounds,
)
from cream.log import UserError

GSM8K = {"question": "2 and 3?", "answer": "<<2+3=5>>5\n#### 5"}
ARC = {"question": "Wet?", "choices": {"text": ["sand", "sea"], "label": ["A", "B"]}, "answerKey": "B"}
OASST = {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "a", "lang": "en", "rank": 0}


def chat(*contents):
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]


def write(path, *values, end="\n"):
    path.write_text("\n".join(json.dumps(value) for value in values) + end, encoding="utf-8")
    return str(path)


# --- files and their mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"", 1, "holds no row"),
        (b"\n \n", 1, "holds no row"),
        (b'{"prompt": "a"}\n{"prompt": "b', 2, "cut short"),
        (b'{"prompt": "a"}\n{"prompt" "b"}\n', 2, "not JSON"),
        (b'{"prompt": "a"}\n[1]\n', 2, "not a JSON object"),
        (b'{"prompt": "caf\xe9"}\n', 1, "not UTF-8 (byte 16 of the line)"),
        (b'{"prompt": "a\x00"}\n', 1, "NUL byte"),
        (b'{"prompt": "a\\u0000"}\n', 1, "NUL character"),
        (b'{"prompt": "a\\ud800"}\n', 1, "surrogate"),
        (b'{"prompt": "a", "prompt": "b"}\n', 1, "key 'prompt' stands twice"),
        (b'{"prompt": "a", "x": {"y": 1, "y": 2}}\n', 1, "key 'y' stands twice"),
        (b'{"prompt": "a", "x": NaN}\n', 1, "NaN is no JSON number"),
        (b'{"prompt": "a", "x": -Infinity}\n', 1, "Infinity is no JSON number"),
        (b'{"prompt": "a", "x": 1e999}\n', 1, "too large"),
        (b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}\n", 1, "Exceeds the limit"),
        (b'{"prompt": "a", "x": ' + b"[" * 200_000 + b"\n", 1, "nested too deeply"),
        (b'{"prompt": "a"}\n\n{"text": "b"}\n', 3, "field 'prompt' is missing"),
        (b'{"prompt": ""}\n', 1, "field 'prompt' is empty"),
        (b'{"prompt": 3}\n', 1, "field 'prompt' must be a list of messages, not a number"),
        (b'{"prompt": []}\n', 1, "an empty list"),
        (b'{"prompt": [{"role": "user", "content": null}]}\n', 1, "message 1 of field 'prompt' must be text, not null"),
        (b'{"prompt": [{"role": "robot", "content": "a"}]}\n', 1, "role 'robot'"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}]}\n', 1, "must end with a message from the user"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', 1, "must be a list of messages"),
        (b'{"text": "a", "label": 1}\n', 1, "no known schema has the keys label, text"),
        (b'{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}\n', 1, "'answerKey' is missing"),
        (b'{"message_id": "1", "parent_id": null, "role": "prompter", "text": "a", "lang": "en"}\n', 1, "'rank'"),
        (json.dumps(OASST | {"message_id": ["1"]}).encode(), 1, "field 'message_id' must be text or null, not a list"),
        (json.dumps(OASST | {"parent_id": {}}).encode(), 1, "field 'parent_id' must be text or null, not an object"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_a_bad_file_is_named_with_its_line_and_the_reason(tmp_path, content, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts([str(path)])
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    path = write(tmp_path / "long.jsonl", {"prompt": "short"}, {"prompt": "x" * 200})
    with pytest.raises(UserError, match=r"long.jsonl:2: the line is longer than 100 bytes"):
        load_prompts([path])


def test_byte_order_mark_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "\xc3\xa9"}')
    assert [example.question for example in load_prompts([str(path)])] == ["a", "é"]


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: no such file"):
        load_prompts([str(tmp_path / name)])


def test_gzip_and_a_gzip_file_that_is_cut_short(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % number for number in range(500)))
    path.write_bytes(whole)
    assert len(load_prompts([str(path)])) == 500
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="not a whole gzip file"):
        load_prompts([str(path)])
    path.write_bytes(b"plain")
    with pytest.raises(UserError, match="rows.jsonl.gz:1: not a whole gzip file"):
        load_prompts([str(path)])


def test_parquet_gives_the_same_prompts_as_jsonl(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [{**ARC, "id": str(number)} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "arc.parquet")
    path = write(tmp_path / "arc.jsonl", *values)
    assert load_prompts([str(tmp_path / "arc.parquet")]) == load_prompts([path])
    pq.write_table(pa.Table.from_pylist([*values, {**ARC, "answerKey": "Z"}]), tmp_path / "arc.parquet")
    with pytest.raises(UserError, match=r"arc.parquet:4: answerKey 'Z'"):
        load_prompts([str(tmp_path / "arc.parquet")])
    (tmp_path / "arc.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=r"arc.parquet:1: not a whole Parquet file"):
        load_prompts([str(tmp_path / "arc.parquet")])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(
                        "prompt completion messages role content question choices text label answerKey answer id "
                        "context answerA answerB answerC question_stem message_id parent_id lang rank".split()
                    ),
                    inner,
                    max_size=6,
                ),
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
    ),
    st.booleans(),
)
def test_no_bytes_do_anything_but_load_or_raise_one_line(tmp_path_factory, content, second):
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' * second + content)
    for load in (load_prompts, load_conversations):
        try:
            assert load([str(path)])
        except UserError as error:
            assert "\n" not in str(error)
            assert (
                str(error).startswith(f"{path}:") or "no conversations in" in str(error) or "no prompts" in str(error)
            )


# --- sources -----------------------------------------------------------------------------------------------------


def test_sources_mix_freely_and_keep_their_order(tmp_path):
    (tmp_path / "ARC-Challenge").mkdir()
    sources = [
        write(tmp_path / "a.jsonl", GSM8K),
        "builtin:arithmetic:3",
        write(tmp_path / "ARC-Challenge" / "b.jsonl", ARC),
        write(tmp_path / "arc_challenge_2.jsonl", ARC),
        write(tmp_path / "c.jsonl", ARC),
        "builtin:quiz@test",
        write(tmp_path / "d.jsonl", {"prompt": "Say hi", "chosen": "hi", "rejected": "no"}),
        write(tmp_path / "e.jsonl", {"prompt": [{"role": "system", "content": "S"}, *chat("U")]}),
        write(tmp_path / "f.jsonl", {"messages": chat("M", "x")}),
    ]  # fmt: skip
    examples = load_prompts(sources)
    tasks = [example.task for example in examples]
    assert tasks == (
        ["gsm8k"] + ["arithmetic"] * 3 + ["arc_challenge"] * 2 + ["arc_easy"] + ["quiz"] * 40 + ["chat"] * 3
    )
    assert [example.question for example in examples[-3:]] == ["Say hi", "U", "M"]
    assert examples[-2].messages[0] == {"role": "system", "content": "S"}
    assert examples[-1].messages == ({"role": "user", "content": "M"},) and examples[-1].answer is None
    assert len({example.id for example in examples}) == len(examples)
    assert examples[5].id == examples[4].id + "-2"  # the same row again is kept, under an id of its own


def test_the_split_asked_for_is_the_default_of_builtin_sources():
    train, test = load_prompts(["builtin:quiz"]), load_prompts(["builtin:quiz"], split="test")
    assert (len(train), len(test)) == (104, 40)
    assert load_prompts(["builtin:quiz@train"], split="test") == train
    assert len(load_prompts(["builtin:arithmetic"])) == 400


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("builtin:poems", "no such built-in data"),
        ("builtin:arithmetic:many", "no such built-in data"),
        ("builtin:arithmetic:0", "COUNT must be from 1 to 100000"),
        ("builtin:arithmetic:99999999999999999999", "COUNT must be from 1 to 100000"),
        ("builtin:arithmetic@validation", "the splits are train and test"),
        ("builtin:quiz:5", "takes no count"),
        ("prompts.txt", "not a data source"),
        ("", "not a data source"),
    ],
)
def test_a_bad_source_is_named(source, reason):
    with pytest.raises(UserError) as error:
        load_prompts([source])
    assert str(error.value).startswith(f"{source}: ") and reason in str(error.value)


def test_no_source_at_all():
    with pytest.raises(UserError, match="no prompts"):
        load_prompts([])
    with pytest.raises(UserError, match="no conversations"):
        load_conversations([])


def test_hub_sources_ask_for_the_right_configuration_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        if name == "allenai/social_i_qa":
            if revision is None:
                raise RuntimeError("Dataset scripts are no longer supported, but found social_i_qa.py")
            return [{"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"}]
        return [GSM8K] if name == "openai/gsm8k" else [ARC]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = ["openai/gsm8k", "allenai/ai2_arc", "allenai/ai2_arc:ARC-Easy@validation", "allenai/social_i_qa"]
    tasks = [example.task for example in load_prompts(sources, split="test")]
    assert tasks == ["gsm8k", "arc_easy", "arc_challenge", "arc_easy", "siqa"]
    assert asked == [
        ("openai/gsm8k", "main", "test", None),
        ("allenai/ai2_arc", "ARC-Easy", "test", None),
        ("allenai/ai2_arc", "ARC-Challenge", "test", None),
        ("allenai/ai2_arc", "ARC-Easy", "validation", None),
        ("allenai/social_i_qa", None, "validation", None),
        ("allenai/social_i_qa", None, "validation", "refs/convert/parquet"),
    ]
    asked.clear()
    load_prompts(["someone/questions:subset"])
    assert asked == [("someone/questions", "subset", "train", None)]


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), ValueError("Unknown split"), FileNotFoundError("no such")]
)
def test_a_hub_data_set_that_cannot_be_had_is_one_line(monkeypatch, error):
    import datasets

    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"openai/gsm8k:main@train: cannot be loaded from the hub: \w+"):
        load_prompts(["openai/gsm8k"])


def test_conversations_of_every_schema(tmp_path):
    turn = [{"role": "user", "content": "U"}]
    sources = [
        write(tmp_path / "a.jsonl", {"messages": [*turn, {"role": "assistant", "content": "\n A "}]}),
        write(tmp_path / "b.jsonl", {"prompt": "U", "completion": " A"}),
        write(tmp_path / "c.jsonl", {"prompt": turn, "completion": [{"role": "assistant", "content": "A"}]}),
        write(tmp_path / "d.jsonl", GSM8K),
    ]
    found = load_conversations(sources)
    expected = (*turn, {"role": "assistant", "content": "A"})
    assert [conversation.messages for conversation in found[:3]] == [expected] * 3
    assert found[3].messages[1]["content"] == "5\nAnswer: 5"
    assert len({conversation.id for conversation in found}) == 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "U"}]}, "must end with a message from the assistant"),
        ({"messages": [{"role": "assistant", "content": "A"}]}, "no message from the user"),
        ({"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": " "}]}, "message 2"),
        ({"messages": ["U", "A"]}, "message 1 of field 'messages' must be an object, not text"),
        ({"prompt": "U", "completion": None}, "field 'completion' must be text or a list"),
        ({"prompt": "U"}, "no answer to imitate"),
        (ARC, "no answer to imitate"),
    ],
)
def test_bad_conversations_are_named(tmp_path, row, reason):
    path = write(tmp_path / "bad.jsonl", row)
    with pytest.raises(UserError) as error:
        load_conversations([path])
    assert str(error.value).startswith(f"{path}:1: ") and reason in str(error.value)


# --- rounds and files of prompts ---------------------------------------------------------------------------------


def some_examples(count):
    return [
        Example(f"chat-{n}", "chat", ({"role": "user", "content": str(n)},), None, None, str(n)) for n in range(count)
    ]


def test_rounds_are_disjoint_even_and_hold_every_prompt():
    examples = some_examples(23)
    parts = split_rounds(examples, 3, None, seed=0)
    assert [len(part) for part in parts] == [8, 8, 7]
    assert sorted(example.id for part in parts for example in part) == sorted(example.id for example in examples)
    assert [example.id for example in parts[0]] != [example.id for example in examples[:8]]
    parts = split_rounds(examples, 3, 5, seed=0)
    assert [len(part) for part in parts] == [5, 5, 5]
    assert len({example.id for part in parts for example in part}) == 15


def test_rounds_depend_on_the_seed_and_on_nothing_else():
    examples = some_examples(40)
    shuffled = random.Random(1).sample(examples, 40)
    assert split_rounds(examples, 2, None, seed=7) == split_rounds(shuffled, 2, None, seed=7)
    assert split_rounds(examples, 2, None, seed=7) != split_rounds(examples, 2, None, seed=8)
    # Pinned: the same in every Python, on every machine and under every hash seed.
    assert [example.id for example in split_rounds(examples, 2, 4, seed=7)[0]] == [
        "chat-10",
        "chat-29",
        "chat-19",
        "chat-31",
    ]


def test_too_few_prompts_for_the_rounds():
    with pytest.raises(UserError, match="7 prompts are too few for 2 iterations of 4"):
        split_rounds(some_examples(7), 2, 4, seed=0)
    with pytest.raises(UserError, match="1 prompts are too few"):
        split_rounds(some_examples(1), 2, None, seed=0)


def test_examples_survive_their_file(tmp_path):
    examples = load_prompts(["builtin:quiz@test", "builtin:arithmetic:5"]) + some_examples(2)
    save_examples(tmp_path / "p.jsonl", examples)
    assert read_examples(tmp_path / "p.jsonl") == examples
    (tmp_path / "p.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(UserError, match=r"p.jsonl:1: not a prompt"):
        read_examples(tmp_path / "p.jsonl")
