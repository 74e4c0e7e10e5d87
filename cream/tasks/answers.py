"""Reads the final answer out of generated text, and says whether it is right.

The released CREAM code takes the first 'Answer:', reads the article in "This is a fact" as option A, and lets a
'### heading' or the 5 of 'Answer: 5 + 3 = 8' be the answer. Here the last statement of an answer counts; what it says
is read as a number (extract_number) or an option (extract_option); text that states none falls back to its last
number, or its last letter that stands as an option does.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from cream.tasks import LETTERS, Example, arc, openbookqa, siqa

# --- where a text states its answer ------------------------------------------------------------------------------

MAX_STATEMENTS = 20
MAX_STATEMENT = 400  # characters
BOXED = re.compile(r"\\f?boxed\s*\{")
STATED = re.compile(
    r"""
    \#\#\#\#(?!\#)(?=[^\w\n]*(?:\d|[A-Za-z]\b))        # GSM8K's '#### 18', but no heading: '#### Step 2',
      (?![^\w\n]*\d+[.)]\s+[A-Za-z])                   # '#### 2. Compute the rest'
    | ^[ \t>*_]*A[*_]*[ \t]*:(?![^\n]*\n\s*B[*_]*[ \t]*:)  # 'A: 18' at the start of a line, but no list of options
    | \b(?:answer|solution)s?\b[*_"'`]*[ \t]*[:=]      # 'Answer:', '**Final answer**:'
    | \b(?:answer|solution|choice|option)s?\b          # 'the answer to the question is', 'the best choice would be'
      (?:\s+(?:to|for|of)\b[^.\n:]{0,60}?)?\s+(?:is|are|was|would\ be|will\ be|should\ be|must\ be)\b(?!\s+not\b)
      [ \t]*[:=]?
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)


def statements(text: str) -> list[str]:
    """What the text states as its answer, last statement first: each from its marker to the end of that line.

    Where nothing follows on the line ('Answer:' and then a new line), the next line that is not blank. The content of
    a \\boxed{} is a statement too, its braces balanced. Of text that repeats itself without end only the last
    MAX_STATEMENTS are read, each for MAX_STATEMENT characters.
    """
    marks = sorted([*BOXED.finditer(text), *STATED.finditer(text)], key=lambda mark: mark.start(), reverse=True)
    said = []
    for mark in marks[:MAX_STATEMENTS]:
        rest = text[mark.end() : mark.end() + MAX_STATEMENT]
        if mark.re is BOXED:
            said.append(_balanced(rest))
            continue
        lines = rest.split("\n")
        said.append(next((line for line in lines if re.search(r"\w", line)), ""))
    return said


def _balanced(text: str) -> str:
    """text up to the brace that closes the one just before it, or all of it."""
    depth = 1
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:position]
    return text


# --- numbers -----------------------------------------------------------------------------------------------------

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+"
MAX_DIGITS = 100
NUMBER = re.compile(
    rf"""
    (?<![\w.])                                     # not inside a word or another number
    (?P<sign>(?<![\w)\]%$£€¥])-)?                  # a minus, but not one that subtracts, joins or lists: '10-5', '- 5'
    [$£€¥]?(?P<minus>-)?
    (?:(?P<whole>\d+)[ ](?=\d+/\d))?               # 3 of '3 1/2'
    (?P<number>{DIGITS})
    (?:[ ]?/[ ]?(?P<under>\d+(?:\.\d+)?)(?![\d/]))?
    """,
    re.VERBOSE,
)


def _plain(text: str) -> str:
    """text without the LaTeX and typography that stands between digits: '\\$1{,}000', '\\frac{1}{2}', '−5'."""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1", text)
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "").replace("\\$", "$").replace("\\%", "%")
    return re.sub("[−–](?=[$£€¥]?[.\\d])", "-", text).replace("*", "").replace("\u00a0", " ").replace("\u202f", " ")


def _value(match: re.Match[str]) -> Fraction | None:
    """The number's value; None for a division by zero, and for digits without end (Python refuses 4,300 and more)."""
    if len(match[0]) > MAX_DIGITS:
        return None
    value = Fraction(match["number"].replace(",", ""))
    if match["under"] is not None:
        if Fraction(match["under"]) == 0:
            return None
        value /= Fraction(match["under"])
    value += int(match["whole"] or 0)
    return -value if match["sign"] or match["minus"] else value


def _canonical(value: Fraction) -> str:
    """ "18" for a whole number, "3.5" where the decimals end, else "1/3"."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _numbers(text: str) -> list[str]:
    values = (_value(match) for match in NUMBER.finditer(_plain(text)))
    return [_canonical(value) for value in values if value is not None]


def canonical_number(text: str) -> str | None:
    """The first number in text, canonical: "1,234.50" -> "1234.5", "18.0" -> "18", "1/2" -> "0.5"; None without one.

    Currency signs, thousands commas and % are dropped; a mixed number ("3 1/2") is one number.
    """
    numbers = _numbers(text)
    return numbers[0] if numbers else None


def extract_number(text: str) -> str | None:
    """The number a text gives as its answer, canonical, or None where it holds no number.

    The last statement of an answer that holds a number counts; of 'Answer: 5 + 3 = 8' what follows the last '='.
    Without such a statement the last number of the text counts.
    """
    for statement in statements(text):
        head, equals, tail = statement.rpartition("=")
        number = canonical_number(tail) or (canonical_number(head) if equals else None)
        if number is not None:
            return number
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


# --- options -----------------------------------------------------------------------------------------------------


def extract_option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that a text gives as its answer, or None where it names none.

    choices: option texts in order A, B, C, ...
    The last statement of an answer that names an option counts: by letter, by the option's text, or by its number
    ('Answer: 2' is an option whose text is "2", else the second). Without one the last letter that stands as an
    option does counts ('(B)', 'B.', '**B**', a capital alone; never the article "a"), else the one option whose text
    occurs.
    """
    letters = LETTERS[: len(choices)]
    for statement in statements(text):
        letter = _stated_option(statement, choices, letters)
        if letter is not None:
            return letter
    return _last_letter(text, letters) or _mentioned(text, choices, letters)


def _stated_option(statement: str, choices: Sequence[str], letters: str) -> str | None:
    """The option that one statement names."""
    said = _plain(statement).strip()
    whole = _words(said)
    for letter, choice in zip(letters, choices, strict=True):
        if whole and whole == _words(choice):  # before letters: an option may be "A" or "2" itself
            return letter
    lead = re.match(
        rf"(?:\b(?:is|the|option|choice|answer|letter)\b|[\W_])*(?P<letter>[{letters}{letters.lower()}])"
        r"(?P<end>[\])\"'`_]*(?:[.:,;)]|\s*$|\s+[-–—(]|(?P<word>\s+(?=\S))))",
        said,
        re.IGNORECASE,
    )
    if lead and not (lead["word"] and _article(lead["letter"], said[lead.end() :])):
        return lead["letter"].upper()
    number = re.match(r"[^\w\s]*(?:(?:option|choice|number)\s+)?[(#]?(\d+)\b(?![.,]\d)", said, re.IGNORECASE)
    if number and 1 <= int(number[1]) <= len(choices) and _begins(said, choices, letters) is None:
        return letters[int(number[1]) - 1]
    return _begins(said, choices, letters) or _mentioned(said, choices, letters) or _last_letter(said, letters)


def _article(letter: str, rest: str) -> bool:
    """Is a lone letter before more words the article "a", or a small letter that names nothing?"""
    if letter == "A":
        return re.match(r"[a-z]", rest) is not None
    return letter.islower()


def _words(text: str) -> str:
    """text as lower-case words with single blanks, without punctuation and a leading article."""
    return re.sub(r"^(?:an?|the) (?=.)", "", " ".join(re.findall(r"[^\W_]+(?:['’.][^\W_]+)*", text.lower())))


def _begins(said: str, choices: Sequence[str], letters: str) -> str | None:
    """The option with the longest text that said begins with."""
    words = _words(said) + " "
    fits = [(len(_words(choice)), letter) for letter, choice in zip(letters, choices, strict=True)
            if _words(choice) and words.startswith(_words(choice) + " ")]  # fmt: skip
    return max(fits)[1] if fits else None


def _mentioned(said: str, choices: Sequence[str], letters: str) -> str | None:
    """The one option whose text occurs in said; None for none, or for several unless one text holds the others."""
    words = f" {_words(said)} "
    found = {letter: _words(choice) for letter, choice in zip(letters, choices, strict=True)
             if _words(choice) and f" {_words(choice)} " in words}  # fmt: skip
    if not found:
        return None
    letter = max(found, key=lambda key: len(found[key]))
    covered = all(key == letter or f" {text} " in f" {found[letter]} " for key, text in found.items())
    return letter if covered else None


def _last_letter(text: str, letters: str) -> str | None:
    """The last letter that stands as an option does."""
    either = f"[{letters}{letters.lower()}]"
    pattern = rf"[(\[]({either})[)\]]|\*\*({either})\*\*|(?<![\w'’.-])([{letters}])(?![\w'’-])(?!\.\w)"
    for match in reversed(list(re.finditer(pattern, text))):
        letter = match[1] or match[2] or match[3]
        if match[3] == "A" and re.match(r"\s+[a-z]", text[match.end() :]):
            continue  # the article that begins a sentence
        return letter.upper()
    return None


# --- scores ------------------------------------------------------------------------------------------------------


def is_correct(example: Example, text: str) -> tuple[str | None, bool]:
    """What text gives as its answer to example (None where it gives none), and whether that is the gold answer.

    An example without a gold answer is never answered right.
    """
    extracted = extract_option(text, example.choices) if example.choices else None
    if not example.choices and example.answer is not None:
        extracted = extract_number(text)
    return extracted, extracted is not None and extracted == example.answer


def continuations(example: Example) -> tuple[str, list[str]] | None:
    """Context and option continuations (each with its leading blank) of lm-eval's acc and acc_norm, or None.

    As in lm-evaluation-harness: tasks arc_easy, arc_challenge, openbookqa, social_iqa, target_delimiter " "; quiz is
    laid out as ARC. No chat template, no letters. None for tasks that are not scored by options.
    """
    context = {
        "arc_easy": arc.likelihood_context,
        "arc_challenge": arc.likelihood_context,
        "quiz": arc.likelihood_context,
        "openbookqa": openbookqa.likelihood_context,
        "siqa": siqa.likelihood_context,
    }.get(example.task)
    if context is None or example.choices is None:
        return None
    return context(example), [f" {choice}" for choice in example.choices]
