"""Prompts and conversations from files, hub data sets and what ships with the package.

A source is one of
    path/to/file.jsonl, .json, .jsonl.gz, .parquet    rows of one schema, told by the keys of the first row
    owner/name[:config][@split]                       a hub data set; without @split the one its use asks for
    builtin:arithmetic[:COUNT][@train|@test]          generated word problems (400 for training, 100 for testing)
    builtin:quiz[@train|@test]                        hand-written multiple-choice questions (104 and 40)
and any number of them may be mixed. Schemas: those of openai/gsm8k, allenai/ai2_arc, allenai/openbookqa,
allenai/social_i_qa, OpenAssistant/oasst1; {"prompt": text or messages}, {"prompt", "completion"}, {"messages"}.

ARC-Easy and ARC-Challenge rows look alike: a file is ARC-Challenge where its own or its folder's name contains
"challenge", else ARC-Easy. Every mistake in a source is a UserError that names it, and the line or row.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from cream.chat import IGNORE, check_tokenizer, encode_conversation, encode_prompt
from cream.log import UserError
from cream.rows import Row, is_file_name, read_file, read_hub
from cream.tasks import BadRow, Example, arc, builtin, checked_text, example_id, gsm8k, json_type, openbookqa, siqa

__all__ = [
    "IGNORE", "Conversation", "Example", "check_tokenizer", "encode_conversation", "encode_prompt",
    "load_conversations", "load_prompts", "read_examples", "save_examples", "split_rounds",
]  # fmt: skip

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Conversation:
    """A conversation to imitate; its last message is the assistant's."""

    id: str  # stable and unique in a run
    messages: tuple[dict[str, str], ...]  # {"role", "content"}


# --- sources -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hub:
    configs: tuple[str | None, ...]  # what a bare name means
    test: str  # the split that evaluations use


HUB = {
    "openai/gsm8k": _Hub(("main",), "test"),
    "allenai/ai2_arc": _Hub(("ARC-Easy", "ARC-Challenge"), "test"),
    "allenai/openbookqa": _Hub(("main",), "test"),
    "allenai/social_i_qa": _Hub((None,), "validation"),  # its test split has no labels on the hub
    "OpenAssistant/oasst1": _Hub((None,), "validation"),
}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.+-]+))?(?:@(?P<split>[\w.-]+))?")
BUILTIN = re.compile(r"builtin:(?P<name>[a-z]+)(?::(?P<count>\d+))?(?:@(?P<split>\w+))?")


@dataclass(frozen=True)
class _Source:
    rows: Iterable[tuple[str, Row]]  # (place for messages, row)
    kind: str  # "arithmetic" "quiz", or "" where the rows' keys tell
    names: tuple[str, ...]  # what ARC-Easy and ARC-Challenge are told apart by


def _open(source: str, split: str) -> list[_Source]:
    """What a source's text means; split is "train" or "test", for sources that name none."""
    if source.startswith("builtin:"):
        return [_builtin(source, split)]
    if is_file_name(source):
        path = Path(source)
        return [_Source(read_file(path), "", (path.name, path.parent.name))]
    match = HUB_NAME.fullmatch(source)
    if not match or Path(source).exists():
        raise UserError(
            f"{source}: not a data source; use a file (.jsonl, .json, .jsonl.gz, .parquet), a hub name such as "
            "openai/gsm8k or allenai/ai2_arc:ARC-Easy@train, builtin:arithmetic[:COUNT] or builtin:quiz"
        )
    hub = HUB.get(match["name"], _Hub((None,), "test"))
    split = match["split"] or ("train" if split == "train" else hub.test)
    configs = (match["config"],) if match["config"] else hub.configs
    opened = []
    for config in configs:
        place = match["name"] + (f":{config}" if config else "") + f"@{split}"
        opened.append(_Source(read_hub(match["name"], config, split, place), "", (match["name"], config or "")))
    return opened


def _builtin(source: str, split: str) -> _Source:
    match = BUILTIN.fullmatch(source)
    usage = "use builtin:arithmetic[:COUNT][@train|@test] or builtin:quiz[@train|@test]"
    if not match or match["name"] not in ("arithmetic", "quiz"):
        raise UserError(f"{source}: no such built-in data; {usage}")
    split = match["split"] or split
    if split not in builtin.SPLITS:
        raise UserError(f"{source}: the splits are train and test; {usage}")
    if match["name"] == "quiz":
        if match["count"]:
            raise UserError(f"{source}: the quiz takes no count; {usage}")
        rows: Iterable[Row] = builtin.quiz(split)
    else:
        count = int(match["count"][:9]) if match["count"] else builtin.DEFAULT_COUNT[split]
        if not 1 <= count <= builtin.MAX_COUNT:
            raise UserError(f"{source}: COUNT must be from 1 to {builtin.MAX_COUNT}")
        rows = builtin.arithmetic(count, split)
    return _Source(((f"{source}:{number}", row) for number, row in enumerate(rows, 1)), match["name"], ())


# --- schemas -----------------------------------------------------------------------------------------------------

OASST = frozenset({"message_id", "parent_id", "text", "role"})
SCHEMAS = {  # in the order in which they are tried: a row may have more keys than its schema needs
    "oasst": OASST,
    "messages": frozenset({"messages"}),
    "completion": frozenset({"prompt", "completion"}),
    "prompt": frozenset({"prompt"}),
    "siqa": siqa.FIELDS,
    "openbookqa": openbookqa.FIELDS,
    "arc": arc.FIELDS,
    "gsm8k": gsm8k.FIELDS,
}


def _schema(row: Row, place: str) -> str:
    for name, fields in SCHEMAS.items():
        if fields <= row.keys():
            return name
    keys = ", ".join(sorted(row)[:12]) or "none"
    raise UserError(
        f"{place}: no known schema has the keys {keys}; a row needs question + answer (GSM8K), question + choices + "
        "answerKey (ARC), question_stem + choices + answerKey (OpenBookQA), context + question + answerA-C + label "
        "(SIQA), prompt, prompt + completion, or messages"
    )


def _each(source: _Source, read: Callable[[str, Row], Any]) -> Iterator[Any]:
    """read(schema, row) of each row, its BadRow given a place; the schema is that of the first row."""
    schema, rows = source.kind, iter(source.rows)
    if not schema:
        place, row = next(rows)  # a source without rows has raised already
        schema, rows = _schema(row, place), chain([(place, row)], rows)
    if schema == "oasst":
        schema, rows = "messages", _oasst_pairs(list(rows))
    needed = SCHEMAS.get(schema, frozenset())
    for place, row in rows:
        try:
            if not needed <= row.keys():
                raise BadRow(f"field '{min(needed - row.keys())}' is missing; the first row of the file has it")
            yield read(schema, row)
        except BadRow as error:
            raise UserError(f"{place}: {error}") from None


def _messages(value: Any, name: str, last: str) -> Messages:
    """A list of {"role", "content"}, checked; its last message must be from `last`. Raises BadRow."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} must be a list of messages, not {json_type(value) if value != [] else 'an empty list'}")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise BadRow(f"message {number} of {name} must be an object, not {json_type(message)}")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"message {number} of {name} has role {str(role)[:40]!r}; use system, user or assistant")
        content = checked_text(message.get("content"), f"the content of message {number} of {name}")
        # A template that trims and one that does not would else condition the answer on different prompts.
        messages.append({"role": role, "content": content.strip() if role == "assistant" else content})
    if messages[-1]["role"] != last:
        raise BadRow(f"{name} must end with a message from the {last}, not from the {messages[-1]['role']}")
    if not any(message["role"] == "user" for message in messages):
        raise BadRow(f"{name} has no message from the user")
    return messages


def _prompt_of(row: Row) -> Messages:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return [{"role": "user", "content": checked_text(prompt, "field 'prompt'")}]
    return _messages(prompt, "field 'prompt'", "user")


def _row_id(row: Row) -> Any:
    return next((row[key] for key in ("id", "uuid", "prompt_id", "message_id") if row.get(key) is not None), None)


def _oasst_pairs(rows: Sequence[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    """A row {"id", "messages"} for each OASST1 tree with an English root prompt by a human and a rank-0 human reply.

    Deleted messages count for nothing; later turns are left out. Raises UserError.
    """
    replies: dict[Any, Row] = {}
    for place, row in rows:
        for field in sorted(OASST | {"lang", "rank"}):
            if field not in row:
                raise UserError(f"{place}: field '{field}' is missing")
        for field in ("message_id", "parent_id"):
            if not isinstance(row[field], str | int | None):
                raise UserError(f"{place}: field '{field}' must be text or null, not {json_type(row[field])}")
        if row["role"] == "assistant" and row["rank"] == 0 and _human(row):
            replies.setdefault(row["parent_id"], row)
    for place, row in rows:
        if row["parent_id"] is None and row["role"] == "prompter" and _human(row) and row["message_id"] in replies:
            turns = [("user", row), ("assistant", replies[row["message_id"]])]
            messages = [{"role": role, "content": turn["text"]} for role, turn in turns]
            yield place, {"id": row["message_id"], "messages": messages}


def _human(row: Row) -> bool:
    return row["lang"] == "en" and not row.get("deleted") and not row.get("synthetic")


# --- prompts -----------------------------------------------------------------------------------------------------


def load_prompts(sources: Sequence[str], *, split: str = "train", graded: bool = False) -> list[Example]:
    """The prompts of all sources, in order, with gold answers where their rows have them; `graded`, all must.

    split: "train" or "test", what a hub or built-in source without @split means.
    Rows of a conversation (messages, prompt + completion, OASST1) give its prompt: all before the last answer. Ids are
    made unique by "-2", "-3", ... where one comes again, so that a benchmark keeps every row. Raises UserError.
    """
    examples = []
    for source in sources:
        for opened in _open(source, split):
            arc_task = arc.task_of(*opened.names)
            examples += _each(opened, partial(_question if graded else _example, arc_task))
    if not examples:
        raise UserError(f"no prompts in {', '.join(sources) or 'an empty list of sources'}")
    return _unique_ids(examples)


def _example(arc_task: str, schema: str, row: Row) -> Example:
    """The prompt of one row. Raises BadRow."""
    if schema == "messages":
        messages = row["messages"]
        if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
            messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        return _chat(row, _messages(messages, "field 'messages'", "user"))
    if schema in ("prompt", "completion"):
        return _chat(row, _prompt_of(row))
    return {
        "siqa": siqa.example,
        "openbookqa": openbookqa.example,
        "arc": lambda row: arc.example(row, arc_task),
        "quiz": lambda row: arc.example(row, "quiz"),
        "gsm8k": gsm8k.example,
        "arithmetic": lambda row: gsm8k.example(row, "arithmetic"),
    }[schema](row)


def _question(arc_task: str, schema: str, row: Row) -> Example:
    """The prompt of one row, with its gold answer. Raises BadRow."""
    example = _example(arc_task, schema, row)
    if example.answer is None:
        raise BadRow(
            "a question without a gold answer cannot be marked; use rows of GSM8K, ARC, OpenBookQA or Social IQa"
        )
    return example


def _chat(row: Row, messages: Messages) -> Example:
    """A prompt without gold answer."""
    return Example(
        example_id("chat", _row_id(row), messages), "chat", tuple(messages), None, None, messages[-1]["content"]
    )


def _unique_ids(items: list) -> list:
    """items, the ids that come again made unique by "-2", "-3", ..."""
    taken = {item.id for item in items}
    seen: dict[str, int] = {}
    out = []
    for item in items:
        name, count = item.id, seen.get(item.id, 0)
        if count:
            while f"{name}-{count + 1}" in taken:
                count += 1
            item = replace(item, id=f"{name}-{count + 1}")
            taken.add(item.id)
        seen[name] = count + 1
        out.append(item)
    return out


# --- conversations -----------------------------------------------------------------------------------------------


def load_conversations(sources: Sequence[str]) -> list[Conversation]:
    """The conversations of all sources, in order, each ending with an answer of the assistant.

    Takes messages, prompt + completion (text or messages), OASST1 trees, GSM8K rows and the built-in data; the last two
    become a worked answer that ends in 'Answer: X'. The assistant's texts lose their outer white space.
    Raises UserError, also for rows that hold no answer to imitate.
    """
    conversations = []
    for source in sources:
        for opened in _open(source, "train"):
            conversations += _each(opened, _conversation)
    if not conversations:
        raise UserError(f"no conversations in {', '.join(sources) or 'an empty list of sources'}")
    return _unique_ids(conversations)


def _conversation(schema: str, row: Row) -> Conversation:
    """The conversation of one row. Raises BadRow."""
    if schema == "messages":
        messages = _messages(row["messages"], "field 'messages'", "assistant")
    elif schema == "completion":
        completion = row["completion"]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not isinstance(completion, list):
            raise BadRow(f"field 'completion' must be text or a list of messages, not {json_type(completion)}")
        messages = _messages([*_prompt_of(row), *completion], "prompt + completion", "assistant")
    elif schema in ("gsm8k", "arithmetic"):
        messages = gsm8k.conversation(row)
    elif schema == "quiz":
        messages = builtin.quiz_conversation(row)
    else:
        raise BadRow("no answer to imitate; use rows with messages, prompt + completion, or question + answer (GSM8K)")
    return Conversation(example_id("sft", _row_id(row), messages), tuple(messages))


# --- rounds ------------------------------------------------------------------------------------------------------


def split_rounds(examples: Sequence[Example], rounds: int, per_round: int | None, seed: int) -> list[list[Example]]:
    """examples shuffled and cut into disjoint rounds, as CREAM splits its unlabelled prompts.

    per_round: prompts of each round, or None for all, the first rounds one larger where it does not come out even.
    The order is that of sha256(seed, id): it depends on no Python version and not on the order of the examples, and a
    prompt more or less moves no other past its neighbours. Raises UserError where there are too few prompts.
    """
    needed = rounds * (per_round or 1)
    if len(examples) < needed:
        raise UserError(
            f"{len(examples)} prompts are too few for {rounds} iterations of {per_round or 'at least 1'}; "
            "give more data.prompts or lower data.prompts_per_iteration"
        )
    order = sorted(examples, key=lambda example: hashlib.sha256(f"{seed}\0{example.id}".encode()).digest())
    if per_round is not None:
        return [order[start : start + per_round] for start in range(0, needed, per_round)]
    bounds = [len(order) // rounds * i + min(i, len(order) % rounds) for i in range(rounds + 1)]
    return [order[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def save_examples(path: Path | str, examples: Iterable[Example]) -> None:
    """Write examples as JSONL, one a line, as read_examples reads them."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")


def read_examples(path: Path | str) -> list[Example]:
    """The examples of a file that save_examples wrote. Raises UserError where it was damaged since."""
    examples = []
    for place, row in read_file(Path(path)):
        try:
            row["messages"] = tuple(row["messages"])
            row["choices"] = None if row["choices"] is None else tuple(row["choices"])
            examples.append(Example(**row))
        except (KeyError, TypeError):
            raise UserError(f"{place}: not a prompt that this program wrote") from None
    return examples
