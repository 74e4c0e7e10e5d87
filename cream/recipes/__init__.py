"""The shipped recipes, and how a YAML file of settings is read: every value with the line that gave it.

PyYAML's safe loader and dumper, but: a key given twice is refused (YAML says so, PyYAML takes the last), and 5e-6 is
the number it looks like (YAML 1.1 wants 5.0e-6). What the keys mean is cream.config's business.
"""

import difflib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cream.log import UserError


class Given(NamedTuple):
    """A value that somebody gave for a key, and where: "in my.yaml:7", "on the command line"."""

    value: Any
    where: str


def names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(item.name.removesuffix(".yaml") for item in _shipped().iterdir() if item.name.endswith(".yaml"))


def read(
    name_or_path: str,  # a shipped name, or a path: anything with a separator, or ending in .yaml or .yml
) -> dict[str, Given]:
    """What a recipe sets, by dotted key ("train.lr"); a section with nothing in it comes as its name with None.

    UserError, with the line where there is one: no such recipe (the shipped ones are listed, the nearest named), a
    file that cannot be read, is not UTF-8, is not YAML, or gives a key twice.
    """
    is_path = "/" in name_or_path or "\\" in name_or_path or name_or_path.endswith((".yaml", ".yml"))
    if not is_path and name_or_path not in names():
        nearest = difflib.get_close_matches(name_or_path, names(), n=1, cutoff=0)[0]
        raise UserError(
            f"no recipe '{name_or_path}': the shipped ones are {', '.join(names())}; did you mean '{nearest}'? "
            "(the name of a file must have a / or end in .yaml)"
        )
    try:
        content = (Path(name_or_path) if is_path else _shipped() / f"{name_or_path}.yaml").read_bytes()
    except OSError as error:
        raise UserError(f"{name_or_path}: cannot read this configuration: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name_or_path}:{_line(content[: error.start])}: not UTF-8; save it as UTF-8") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return {} if root is None else dict(_leaves(loader, root, name_or_path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{name_or_path}:{mark.line + 1}: not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position].encode()
        raise UserError(f"{name_or_path}:{_line(before)}: not YAML: {error.reason}") from None


def dump(tree: dict[str, dict[str, Any]]) -> str:
    """YAML that `read` reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


_NUMBER_WITH_EXPONENT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)  # no setting is a date
_Loader.add_implicit_resolver(*_NUMBER_WITH_EXPONENT)
_Dumper.add_implicit_resolver(*_NUMBER_WITH_EXPONENT)  # so that it quotes a text such as "5e-6"


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text with a Unicode line break in quotes that escape it; PyYAML reads a bare one back as a space or newline."""
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _shipped():
    return resources.files("cream.recipes")


def _line(before: bytes) -> int:
    """The line, from 1, of what follows `before`."""
    return before.count(b"\n") + 1


def _line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _leaves(loader: _Loader, root: yaml.Node, path: str) -> Iterator[tuple[str, Given]]:
    """(dotted key, Given) of each value in a YAML document, sections being mappings at its top."""
    if not isinstance(root, yaml.MappingNode):
        raise UserError(
            f"{path}:{_line_of(root)}: not settings: write a section such as 'train:' and under it '  lr: 1e-6'"
        )
    first_line: dict[str, int] = {}

    def walk(mapping: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, Given]]:
        for name, node in mapping.value:
            line = _line_of(name)
            if not isinstance(name, yaml.ScalarNode):
                raise UserError(f"{path}:{line}: a key must be a plain name")
            key = prefix + name.value
            if key in first_line:
                raise UserError(f"{path}:{line}: key '{key}' is given twice, first in line {first_line[key]}")
            first_line[key] = line
            if isinstance(node, yaml.MappingNode) and not prefix and node.value:
                yield from walk(node, key + ".")
                continue
            try:
                value = loader.construct_object(node, deep=True)
            except (ValueError, KeyError, IndexError) as error:  # !!int x, !!bool 7, !!int ""
                raise UserError(f"{path}:{line}: '{key}' has a value that YAML cannot read ({error})") from None
            yield key, Given(value or None if isinstance(node, yaml.MappingNode) else value, f"in {path}:{line}")

    yield from walk(root, "")
