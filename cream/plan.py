"""How much memory and disk a recipe takes: arithmetic on the model's shape, no model loaded and nothing measured.

D hidden size, F width of the feed-forward layer, H query heads, K kv heads, E head size, V vocabulary. All sizes in
bytes; GB means 1e9 bytes. The figures are upper bounds of a stage's large tensors, every sequence at its greatest
length; what they leave out (kernels, allocator, CUDA context) is why a card of N GiB counts here as N GB, 7% less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cream.config import Config

CARDS_GB = (24, 40, 80)
HEAD_TILE = (4096, 16384)  # rows and vocabulary that the torch path of linear_logp holds at once on a GPU, in float32
HEAD_CHUNK = 1024  # rows of logits that linear_weighted_dpo holds, in float32, or those of one pair where it has more
STEP_CHECKPOINTS = 3  # the newest two are kept, and a third exists while it is written


@dataclass(frozen=True)
class Shape:
    """A dense LLaMA-class model. `parameters` counts a tied head once."""

    vocabulary: int  # V
    hidden: int  # D
    layers: int
    heads: int  # H
    kv_heads: int  # K
    head_size: int  # E
    intermediate: int  # F
    tied: bool
    positions: int  # tokens of context

    @property
    def parameters(self) -> int:
        D, H, K, E = self.hidden, self.heads, self.kv_heads, self.head_size
        layer = 2 * D * H * E + 2 * D * K * E + 3 * D * self.intermediate + 2 * D
        return self.vocabulary * D * (1 if self.tied else 2) + self.layers * layer + D


LLAMA3_8B = Shape(128256, 4096, 32, 32, 8, 128, 14336, False, 8192)
# The models of the shipped recipes, by the start of the last part of their names: these need no look-up.
SHAPES: Mapping[str, Shape] = {
    "llama-2-7b": Shape(32000, 4096, 32, 32, 32, 128, 11008, False, 4096),
    "llama-3-8b": LLAMA3_8B,
    "meta-llama-3-8b": LLAMA3_8B,
    "smollm2-135m": Shape(49152, 576, 30, 9, 3, 64, 1536, True, 8192),
}


def known_shape(name: str) -> Shape | None:
    """The shape of a shipped recipe's model, by hub name or alias; None for any other."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((shape for start, shape in SHAPES.items() if last.startswith(start)), None)


def shape_of(config: object) -> Shape:
    """The shape that a transformers configuration states. Raises ValueError where it is no dense LLaMA-class model."""
    kind = getattr(config, "model_type", type(config).__name__)
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(config, field, None):
            raise ValueError(f"{kind} is a mixture of experts, the plan is for dense LLaMA-class models")
    try:
        heads = int(config.num_attention_heads)
        return Shape(
            vocabulary=int(config.vocab_size),
            hidden=int(config.hidden_size),
            layers=int(config.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            intermediate=int(config.intermediate_size),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            positions=int(getattr(config, "max_position_embeddings", 0) or 2**31),
        )
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{kind} does not describe itself as LLaMA-class models do ({error})") from None


def activation_bytes(shape: Shape, size: int, checkpointing: str) -> tuple[int, int]:
    """What autograd keeps of one token, (bytes a token over all layers, bytes a token of the layer being recomputed).

    `size` is the bytes of the compute dtype. Per layer, as transformers' LLaMA saves them with fused attention: two
    RMSNorms (the input in float32, the normalised input, the output), q, k, v and the attention's output with its
    float32 log-sum-exp, four tensors of width F around the SwiGLU product. tests/test_doctor.py counts them. With
    `checkpointing` "selective" what the products made and the layer's input, with "full" the input alone; "auto" counts
    as "full", which it comes to where memory is short.
    """
    D, H, K, E, F = shape.hidden, shape.heads, shape.kv_heads, shape.head_size, shape.intermediate
    norm = D * (4 + 2 * size) + 4
    layer = 2 * norm + size * (2 * H * E + 2 * K * E + 4 * F) + 4 * H
    if checkpointing == "none":
        return shape.layers * layer + norm, 0
    if checkpointing == "selective":
        kept = size * (D + 2 * H * E + 2 * K * E + 2 * D + 2 * F) + 4 * H
        return shape.layers * kept + norm, layer
    return shape.layers * D * size + norm, layer


def forward_bytes(shape: Shape, size: int) -> int:
    """Bytes a token alive at once in one layer without autograd: the residual, a norm in float32, SwiGLU's three."""
    return size * (3 * shape.intermediate + 3 * shape.hidden) + 8 * shape.hidden


@dataclass(frozen=True)
class Part:
    what: str  # one of COLUMNS
    bytes: int
    scales: bool = False  # grows with the stage's batch field


COLUMNS = ("weights", "gradients", "master", "moments", "activations", "head", "KV cache")


@dataclass(frozen=True)
class Stage:
    name: str
    field: str  # the configuration field that the scaling parts are proportional to
    count: int  # its value in the recipe
    parts: tuple[Part, ...]
    least: int = 1  # below this the field saves nothing

    @property
    def peak(self) -> int:
        return sum(part.bytes for part in self.parts)

    def bytes_of(self, what: str) -> int:
        return sum(part.bytes for part in self.parts if part.what == what)

    def largest(self, limit: float) -> int:
        """The greatest value of `field` whose peak stays within `limit` bytes; 0 where even the least does not."""
        fixed = sum(part.bytes for part in self.parts if not part.scales)
        unit = (self.peak - fixed) / self.count
        largest = int((limit - fixed) // unit)
        return largest if largest >= self.least else 0


@dataclass(frozen=True)
class Plan:
    dtype: str
    shape: Shape
    stages: tuple[Stage, ...]
    disk: tuple[tuple[str, int], ...]  # (what, bytes)

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return sum(size for _, size in self.disk)


def plan(config: Config, shape: Shape, dtype: str = "bfloat16") -> Plan:
    """Memory of each stage on one device and disk of the whole run, for a compute dtype "float32" or "bfloat16".

    Training keeps weights in the compute dtype, float32 sums of gradients and two float32 AdamW moments: 16 bytes a
    parameter in float32. bfloat16 has its own gradients and a float32 master copy of the weights besides: 20 bytes.
    One model is in memory at a time; scoring swaps weights.
    """
    size = {"float32": 4, "bfloat16": 2}[dtype]
    count, weights = shape.parameters, shape.parameters * size
    sample, score, train, sft = config.sample, config.score, config.train, config.sft
    saved, recomputed = activation_bytes(shape, size, config.model.gradient_checkpointing)
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * size  # bytes a token
    # a pair reads its prompt's keys and values twice, so that at most as many again are kept
    twice = cache // shape.layers if config.model.gradient_checkpointing in ("auto", "full") else cache
    rows, columns = HEAD_TILE[0], min(HEAD_TILE[1], shape.vocabulary)
    tile = 4 * columns * (2 * rows + 2 * shape.hidden)  # logits and a slice of the head, and both gradients
    longest_pair = max(HEAD_CHUNK, 2 * min(sample.max_new_tokens, train.max_length))
    # the logits, the same as input of a product, a float32 sum of the head's gradient
    chunk = shape.vocabulary * (longest_pair * (4 + size) + shape.hidden * 4)
    state = [Part("weights", weights), Part("gradients", 4 * count), Part("moments", 8 * count)]
    if dtype == "bfloat16":  # a micro-batch's own gradients stand beside the float32 sums that they are added to
        state += [Part("gradients", weights), Part("master", 4 * count)]

    def training(name: str, batch_tokens: int, longest: int, copied: int, head: int) -> Stage:
        tokens = max(batch_tokens, longest)  # what is longer than a batch is a batch by itself
        wide = tokens * shape.hidden * 8  # hidden states and their gradient in float32
        activations = Part("activations", tokens * (saved + recomputed + copied), True)
        parts = (*state, activations, Part("head", wide, True), Part("head", head))
        return Stage(name, f"{name}.batch_tokens", tokens, parts, longest)

    def generation(name: str, prompts: int, responses: int, new_tokens: int) -> Stage:
        sequences, prompt = prompts * responses, config.data.max_prompt_tokens
        held = (
            Part("weights", weights),
            Part("activations", prompts * prompt * forward_bytes(shape, size), True),
            Part("head", sequences * shape.vocabulary * 4 * 3, True),  # logits, their order, running sums
            Part("KV cache", sequences * (prompt + new_tokens) * cache, True),
        )
        return Stage(name, f"{name}.batch_size", prompts, held)

    stages = []
    if sft.enabled:
        stages.append(training("sft", sft.batch_tokens, sft.max_length, 0, tile))
    stages.append(generation("sample", sample.batch_size, sample.responses, sample.max_new_tokens))
    scoring = (
        Part("weights", weights),
        Part("activations", score.batch_tokens * forward_bytes(shape, size), True),
        Part("head", score.batch_tokens * shape.hidden * 4, True),
        Part("head", tile),
    )
    stages.append(Stage("score", "score.batch_tokens", score.batch_tokens, scoring))
    stages.append(training("train", train.batch_tokens, 2 * train.max_length, twice, chunk))
    if config.evaluate.enabled:
        stages.append(generation("evaluate", config.evaluate.batch_size, 1, config.evaluate.max_new_tokens))
    return Plan(dtype, shape, tuple(stages), _disk(config, count, size))


def gradient_checkpointing(config: Config, shape: Shape, dtype: str, memory: float) -> str:
    """What "auto" comes to: the first of none, selective and full with which training fits `memory` bytes, or full."""
    for mode in ("none", "selective"):
        made = plan(replace(config, model=replace(config.model, gradient_checkpointing=mode)), shape, dtype)
        if max(stage.peak for stage in made.stages if stage.name in ("sft", "train")) <= memory:
            return mode
    return "full"


def _disk(config: Config, count: int, size: int) -> tuple[tuple[str, int], ...]:
    """(what, bytes): the models that stay, the step checkpoints at their height, the text where it is bounded."""
    T = config.run.iterations
    converted = config.model.path.endswith(".gguf") or config.model.path == "smollm2-135m"
    halfway = config.score.first_round == "sft_half"
    fine_tuned = ["M1"] + ["M1 halfway"] * halfway if config.sft.enabled else []
    names = [*(["M0"] if converted else []), *fine_tuned, *(f"M{t + 2}" for t in range(T))]
    rows = [(f"models {', '.join(names)}", len(names) * count * size)]
    if config.sft.checkpoint_every or config.train.checkpoint_every:
        # weights in float32 (the master copy, where there is one) and two float32 moments
        rows.append((f"{STEP_CHECKPOINTS} step checkpoints while training", STEP_CHECKPOINTS * 12 * count))
    prompts, sample = config.data.prompts_per_iteration, config.sample
    if prompts:
        # JSONL: an id takes about 7 characters with its comma and space, and a token is about 4 of text
        tokens = prompts * (sample.responses + 2) * (config.data.max_prompt_tokens + sample.max_new_tokens)
        rows.append((f"responses and pairs of {T} iterations, at most", T * tokens * 11))
    return tuple(rows)
