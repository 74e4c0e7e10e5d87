"""Messages to token ids by the tokenizer's own chat template, and which of them are the assistant's.

The ids are those of tokenizer.apply_chat_template, to the token, but for one thing: text of the data that spells a
control token ("<|im_end|>") stays text. To know where the data stands in the rendered text, each content is rendered
once more as a mark that nobody can guess; the result with contents for marks must be the first rendering, else the
template rewrites its messages and is refused. BOS is what the template writes: the tokenizer adds none of its own.
"""

import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer

from cream.log import UserError
from cream_kernels import IGNORE

Messages = Sequence[dict[str, str]]


CUT = -1  # the message of a piece without text at which tokens may not join


@dataclass(frozen=True)
class _Piece:
    text: str
    message: int | None  # index of the message whose content this is; None for what the template wrote; CUT


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    closes: dict[int, int]  # message -> index in ids of the first control token after its content
    cuts: list[int]  # index in ids of the first token after each cut


def check_tokenizer(tokenizer: Any) -> None:
    """Raise UserError, with what to do, for a tokenizer that a chat model cannot be trained with.

    It needs a chat template that closes the assistant's turn with a control token, and a fast tokenizer. No pad token:
    nothing here pads or masks by id, and LLaMA 2 and 3 have none.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{name}: no fast tokenizer (tokenizer.json); convert it with transformers first")
    if not tokenizer.chat_template:
        raise UserError(f"{name}: no chat template; use an instruction-tuned model or add chat_template.jinja")
    encode_conversation(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])


def encode_prompt(tokenizer: Any, messages: Messages, suffix: str = "") -> list[int]:
    """Token ids of a prompt, up to where the assistant's answer begins (the template's generation prompt included).

    suffix is appended to the content of the last message, which must be the user's. Raises UserError where the chat
    template refuses or rewrites the messages.
    """
    messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + suffix}]
    return _encode(tokenizer, _render(tokenizer, messages, generation=True)).ids


def encode_conversation(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and labels: the id in the assistant's answers, IGNORE elsewhere.

    An answer is labelled from its first token after the generation prompt through the control token that closes its
    turn; what the template writes after that (the newline of ChatML) is not. Each answer follows the very ids that
    encode_prompt gives for what stands before it. Where the first token of some answer would join the prompt's last
    one (an answer that begins with newlines), the text is cut where each answer begins, as sampling does; a later
    prompt then holds the earlier answers as they were cut. Needs no {% generation %} in the template. Raises UserError
    where the template refuses or rewrites the messages, does not continue its own generation prompt, or does not
    close the last turn.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] != len(messages) - 1:
        raise UserError("a conversation to train on must end with a message from the assistant")
    pieces = _render(tokenizer, messages, generation=False)
    encoded = _encode(tokenizer, pieces)
    text = "".join(piece.text for piece in pieces)
    starts, begins = [], []  # of each answer: index in ids, index in text
    for index in answers:
        prompt_pieces = _render(tokenizer, messages[:index], generation=True)
        prompt_text = "".join(piece.text for piece in prompt_pieces)
        if not text.startswith(prompt_text):
            raise UserError(
                f"the chat template renders message {index + 1} (assistant) otherwise than its own generation prompt "
                "begins it, so where the answer begins is unknown; use a template that continues the generation prompt"
            )
        prompt = _encode(tokenizer, prompt_pieces).ids
        begins.append(len(prompt_text))
        if encoded.ids[: len(prompt)] == prompt:
            starts.append(len(prompt))
    if len(starts) < len(answers):
        encoded = _encode(tokenizer, _cut(pieces, begins))
        starts = encoded.cuts
    labels = [IGNORE] * len(encoded.ids)
    for index, start in zip(answers, starts, strict=True):
        if index not in encoded.closes:
            raise UserError(
                "the chat template does not close the assistant's turn with a special token, so that a model would "
                "never learn to stop; add the end token to the template"
            )
        end = encoded.closes[index] + 1
        labels[start:end] = encoded.ids[start:end]
    return encoded.ids, labels


# --- from messages to pieces of text -----------------------------------------------------------------------------


def _apply(tokenizer: Any, messages: Messages, generation: bool) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except TemplateError as error:
        raise UserError(f"the chat template refuses the messages: {_first_line(error)}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:  # its own code
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"the chat template fails on the messages ({reason}); mend chat_template.jinja") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]


def _render(tokenizer: Any, messages: Messages, generation: bool) -> list[_Piece]:
    """The rendered conversation in order: what the template wrote, and the contents without outer white space.

    White space around a content stays with the template's text, since many templates trim it.
    """
    plain = _apply(tokenizer, messages, generation)
    key = secrets.token_hex(8)  # never seen in the output, so that this costs no determinism
    cores = [message["content"].strip() for message in messages]
    marked = []
    for index, (message, core) in enumerate(zip(messages, cores, strict=True)):
        before, _, after = message["content"].partition(core) if core else (message["content"], "", "")
        mark = f"\ue000{key}.{index}\ue001" if core else ""
        marked.append({**message, "content": before + mark + after})
    parts = re.split(rf"\ue000{key}\.(\d+)\ue001", _apply(tokenizer, marked, generation))
    pieces = [_Piece(parts[0], None)]
    for index, after in zip(parts[1::2], parts[2::2], strict=True):
        pieces += [_Piece(cores[int(index)], int(index)), _Piece(after, None)]
    if "".join(piece.text for piece in pieces) != plain:
        raise UserError(
            "the chat template rewrites the text of the messages beyond trimming it; use a plainer template"
        )
    return pieces


def _cut(pieces: Sequence[_Piece], positions: Sequence[int]) -> list[_Piece]:
    """pieces with a cut at each of some positions of their text, given in rising order."""
    out, start, rest = [], 0, list(positions)
    for piece in pieces:
        text = piece.text
        while rest and rest[0] <= start + len(text):
            head, text = text[: rest[0] - start], text[rest[0] - start :]
            out += [_Piece(head, piece.message), _Piece("", CUT)]
            start = rest.pop(0)
        out.append(_Piece(text, piece.message))
        start += len(text)
    return out


# --- from pieces of text to ids ----------------------------------------------------------------------------------


def _encode(tokenizer: Any, pieces: Sequence[_Piece]) -> _Encoded:
    """The ids of pieces joined. Control tokens are those of the template alone."""
    added = tokenizer.added_tokens_decoder
    special = {token for token, entry in added.items() if entry.special}
    if not any(piece.message == CUT for piece in pieces):
        text, spans = _join(pieces)
        encoding = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False, verbose=False
        )
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        # A token that the tokenizer does not call special but that the template writes is control all the same.
        control = special | {
            token for token, place in zip(ids, offsets, strict=True) if token in added and not _inside(place, spans)
        }
        if not _forged(ids, offsets, spans, control):
            return _Encoded(ids, _closes(ids, offsets, spans, control), [])
    else:
        template = "".join(piece.text for piece in pieces if piece.message is None)
        control = special | {token for token, entry in added.items() if entry.content in template}
    twin = _twin(tokenizer, frozenset(control))
    text, spans = _join(
        _Piece(twin.mark(piece), piece.message) if piece.message in (None, CUT) else piece for piece in pieces
    )
    encoding = twin.tokenizer.encode(text, add_special_tokens=False)
    ids, offsets, cuts = [], [], []
    for token, place in zip(encoding.ids, encoding.offsets, strict=True):
        if token == twin.cut:
            cuts.append(len(ids))
            continue
        ids.append(twin.original.get(token, token))
        offsets.append(place)
    if _forged(ids, offsets, spans, control):
        raise UserError("the tokenizer reads a special token out of plain text of the data; use another tokenizer")
    return _Encoded(ids, _closes(ids, offsets, spans, control), cuts)


def _join(pieces: Iterable[_Piece]) -> tuple[str, list[tuple[int, int, int]]]:
    """The text of pieces, and (start, end, message) of each content in it."""
    text, spans = "", []
    for piece in pieces:
        if piece.message is not None and piece.message != CUT:
            spans.append((len(text), len(text) + len(piece.text), piece.message))
        text += piece.text
    return text, spans


def _inside(place: tuple[int, int], spans: Sequence[tuple[int, int, int]]) -> bool:
    return any(place[0] < end and start < place[1] for start, end, _ in spans)


def _forged(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int, int]],
    control: Set[int],
) -> bool:
    """Did the data's text become a control token?"""
    return any(token in control and _inside(place, spans) for token, place in zip(ids, offsets, strict=True))


def _closes(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int, int]],
    control: Set[int],
) -> dict[int, int]:
    """For each message the index in ids of the first control token that begins at or after the end of its content."""
    controls = [(place[0], index) for index, (token, place) in enumerate(zip(ids, offsets, strict=True))
                if token in control]  # fmt: skip
    ends = {message: end for _, end, message in spans}
    closes = {message: bisect_left(controls, (end, -1)) for message, end in ends.items()}
    return {message: controls[at][1] for message, at in closes.items() if at < len(controls)}


@dataclass(frozen=True)
class _Twin:
    """A copy of a tokenizer to which the control tokens' own spelling is plain text, and marks stand for them."""

    tokenizer: Tokenizer
    marks: dict[str, str]  # spelling of a control token -> its mark
    original: dict[int, int]  # id of a mark -> id of the control token
    cut: int  # id of the mark for a cut
    cut_mark: str

    def mark(self, piece: _Piece) -> str:
        if piece.message == CUT:
            return self.cut_mark
        spellings = "|".join(re.escape(spelling) for spelling in sorted(self.marks, key=len, reverse=True))
        return re.sub(spellings, lambda match: self.marks[match[0]], piece.text) if spellings else piece.text


_TWINS: WeakKeyDictionary[Any, dict[frozenset[int], _Twin]] = WeakKeyDictionary()


def _twin(tokenizer: Any, control: frozenset[int]) -> _Twin:
    """The twin of a tokenizer, made when first needed (about a second for a vocabulary of 128,000)."""
    twins = _TWINS.setdefault(tokenizer, {})
    if control not in twins:
        added = tokenizer.added_tokens_decoder
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["truncation"] = spec["padding"] = None
        for entry in spec["added_tokens"]:
            entry["special"] = entry["id"] in control
        twin = Tokenizer.from_str(json.dumps(spec))
        twin.encode_special_tokens = True  # special tokens are not looked for; the marks below are not special
        key = secrets.token_hex(8)
        marks = {added[token].content: f"\ue000{key}.{token}\ue001" for token in sorted(control)}
        cut_mark = f"\ue000{key}.cut\ue001"
        flags = {added[token].content: (added[token].lstrip, added[token].rstrip) for token in control}
        for spelling, mark in [*marks.items(), ("", cut_mark)]:
            lstrip, rstrip = flags.get(spelling, (False, False))
            twin.add_tokens([AddedToken(mark, lstrip=lstrip, rstrip=rstrip, normalized=False, special=False)])
        original = {twin.token_to_id(marks[added[token].content]): token for token in control}
        twins[control] = _Twin(twin, marks, original, twin.token_to_id(cut_mark), cut_mark)
    return twins[control]
