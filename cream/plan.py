"""How much memory and disk a recipe takes: arithmetic on the model's shape, no model loaded and nothing measured.

D hidden size, F width of the feed-forward layer, H query heads, K kv heads, E head size, V vocabulary. All sizes in
bytes; GB means 1e9 bytes. The figures are a stage's tensors at its peak, every sequence at its greatest length; a test
holds training's to within 10% of what a process takes. They leave out kernels, fragmentation and the CUDA context
(0.6 GB), which is why a card of N GiB counts here as N GB, 7% less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from cream.config import Config, LoRAConfig, OptimConfig

CARDS_GB = (24, 40, 80)
# linear_logp's: rows and vocabulary held at once, in float32, by the bytes of a weight
HEAD_TILE = {"cpu": {2: (2048, 2016), 4: (2048, 1008)}, "cuda": dict.fromkeys((2, 4), (4096, 16384))}
HEAD_CHUNK = {"cpu": 1024, "cuda": 2048}  # rows of logits that linear_weighted_dpo holds, or one pair's if more
HEAD_BLOCK = 4032  # vocabulary that it multiplies out at once on a CPU
BLOCK = 256  # cream.adamw's, which needs torch: parameters whose 8-bit moments share a scale
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

    @property
    def vectors(self) -> int:
        """Parameters in norm weights."""
        return (2 * self.layers + 1) * self.hidden

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.vocabulary, self.intermediate) * self.hidden

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) of a layer's linear map of that name."""
        D, F, query, key = self.hidden, self.intermediate, self.heads * self.head_size, self.kv_heads * self.head_size
        wide = {"q": query, "k": key, "v": key, "gate": F, "up": F}
        short = name.removesuffix("_proj")
        return ({"o": query, "down": F}[short], D) if short in ("o", "down") else (D, wide[short])


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


def adapter_parameters(shape: Shape, lora: LoRAConfig) -> int:
    """Elements of an adapter; 0 where all weights are trained."""
    return shape.layers * lora.r * sum(sum(shape.linear(name)) for name in set(lora.targets))


def activation_bytes(
    shape: Shape,
    size: int,
    checkpointing: str,
    lora: LoRAConfig | None = None,
    device: str = "cuda",
    fused: bool = False,  # whether norms and SwiGLU are compiled (cream/fuse.py)
) -> tuple[int, int]:
    """What autograd keeps of one token, (bytes a token over all layers, bytes a token of the layer being recomputed).

    `size` is the bytes of the compute dtype. Per layer, as transformers' LLaMA saves them with fused attention: two
    RMSNorms (the input in float32, the normalised input, the output), q, k, v and the attention's output with its
    float32 log-sum-exp, four tensors of width F around the SwiGLU product; `fused`, a norm keeps its input as it is and
    its output, SwiGLU a tensor less. tests/test_doctor.py counts them. With `checkpointing` "selective" what the
    products made and the layer's input, with "full" the input alone; "auto" counts as "full", which it comes to where
    memory is short. Under adapters the frozen weights want no inputs: a norm keeps its own input alone, SwiGLU a tensor
    less, and each adapter what `adapter_bytes` says.
    """
    D, H, K, E, F = shape.hidden, shape.heads, shape.kv_heads, shape.head_size, shape.intermediate
    adapted = lora is not None and lora.r > 0
    norm = (D * size if fused else D * 4) + (0 if adapted else D * (size if fused else 2 * size)) + 4
    layer = 2 * norm + size * (2 * H * E + 2 * K * E + (4 - adapted - fused) * F) + 4 * H
    products = 0
    if adapted:
        layer += adapter_bytes(shape, size, lora, device)
        products = 4 * lora.r * len(set(lora.targets))
    if checkpointing == "none":
        return shape.layers * layer + norm, 0
    if checkpointing == "selective":
        kept = size * (D + 2 * H * E + 2 * K * E + 2 * D + 2 * F) + 4 * H + products
        return shape.layers * kept + norm, layer
    return shape.layers * D * size + norm, layer


def adapter_bytes(shape: Shape, size: int, lora: LoRAConfig, device: str) -> int:
    """What a layer's adapters keep of one token. Each computes in float32: what its first product read, with dropout
    also what fell (a byte on a GPU, a float32 on a CPU), and what its second product read.

    Without dropout and in float32 it reads what is there: norms and the SwiGLU product are kept once for all who read.
    """
    names = set(lora.targets)
    read = sum(shape.linear(name)[0] for name in names)
    if lora.dropout:
        read *= 5 if device == "cuda" else 8
    elif size == 4:
        readers = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
        read = 4 * sum(max((shape.linear(name)[0] for name in names & group), default=0) for group in readers)
    else:
        read *= 4
    return read + 4 * lora.r * len(names)


def forward_bytes(shape: Shape, size: int, lora: LoRAConfig | None = None) -> int:
    """Bytes a token alive at once in one layer without autograd: the residual, a norm in float32, SwiGLU's three; and
    an adapter's product, and that scaled, in float32."""
    adapter = 8 * shape.intermediate if lora is not None and lora.r else 0
    return size * (3 * shape.intermediate + 3 * shape.hidden) + 8 * shape.hidden + adapter


def backward_bytes(shape: Shape, size: int, lora: LoRAConfig | None = None) -> int:
    """Bytes a token that backward through a layer holds besides what autograd kept: gradients of two of SwiGLU's, and
    of the residual and a norm; and of what an adapter read, before and after dropout, in float32."""
    adapter = 8 * shape.intermediate if lora is not None and lora.r else 0
    return size * (2 * shape.intermediate + 2 * shape.hidden) + adapter


def state_bytes(shape: Shape, size: int, optim: OptimConfig, lora: LoRAConfig | None = None) -> tuple[int, int]:
    """(low bits, moments) of the optimizer, of the whole model or of a float32 adapter (cream/optim.py)."""
    if lora is not None and lora.r:
        count = adapter_parameters(shape, lora)
        return 0, 2 * count + 8 * count // BLOCK if optim.moments == "int8" else 8 * count
    matrices = shape.parameters - shape.vectors
    low = 2 * shape.parameters if size == 2 else 0
    if optim.moments == "int8":
        return low, 2 * matrices + 8 * matrices // BLOCK + 8 * shape.vectors
    return low, 8 * shape.parameters


def sums_bytes(
    shape: Shape, size: int, optim: OptimConfig, clip: float, single: bool, lora: LoRAConfig | None = None
) -> tuple[int, int]:
    """(bytes that a step's gradients take from its first micro-batch on, bytes that they take when the last is over).

    `single`: a step is one micro-batch, whose gradients come as its activations go.
    """
    adapted = lora is not None and lora.r > 0
    count, size = (adapter_parameters(shape, lora), 4) if adapted else (shape.parameters, size)
    if not single:
        each = 2 if size == 2 and optim.sums == "bfloat16" else 4
        return each * count, 0
    if clip == 0 or optim.clip_by == "tensor":
        return 0, 0
    return 0, size * count


@dataclass(frozen=True)
class Part:
    what: str  # one of COLUMNS
    bytes: int


COLUMNS = ("weights", "low bits", "moments", "gradients", "activations", "head", "KV cache")


@dataclass(frozen=True)
class Stage:
    name: str
    field: str  # the configuration field that a batch's memory depends on
    count: int  # its value in the recipe
    parts_at: Callable[[int], tuple[Part, ...]]  # what is held at the peak with that value

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.parts_at(self.count)

    @property
    def peak(self) -> int:
        return self.peak_at(self.count)

    def peak_at(self, count: int) -> int:
        return sum(part.bytes for part in self.parts_at(count))

    def bytes_of(self, what: str) -> int:
        return sum(part.bytes for part in self.parts if part.what == what)

    def largest(self, limit: float) -> int:
        """The greatest value of `field` whose peak stays within `limit` bytes; 0 where even 1 does not."""
        fits, bursts = 0, 1
        while self.peak_at(bursts) <= limit:
            fits, bursts = bursts, 2 * bursts
        while bursts - fits > 1:
            middle = (fits + bursts) // 2
            fits, bursts = (middle, bursts) if self.peak_at(middle) <= limit else (fits, middle)
        return fits


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


def plan(config: Config, shape: Shape, dtype: str = "bfloat16", device: str = "cuda") -> Plan:
    """Memory of each stage on one device and disk of the whole run, for a compute dtype "float32" or "bfloat16".

    One model is in memory at a time; scoring swaps weights. Sampling, scoring and evaluation are upper bounds.
    """
    size = {"float32": 4, "bfloat16": 2}[dtype]
    lora = config.lora
    weights = Part("weights", shape.parameters * size + 4 * adapter_parameters(shape, lora))
    sample, score, train, sft = config.sample, config.score, config.train, config.sft
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * size  # bytes a token
    # a pair reads its prompt's keys and values twice, so that at most as many again are kept
    twice = cache // shape.layers if config.model.gradient_checkpointing in ("auto", "full") else cache

    def training(name: str, longest: int, copied: int, head: Callable[[int], int]) -> Stage:
        settings = getattr(config, name)

        def parts_at(tokens: int) -> tuple[Part, ...]:
            tokens = max(tokens, longest)  # what is longer than a batch is a batch by itself
            single = tokens >= settings.batch_size * longest
            gradients = sums_bytes(shape, size, config.optim, settings.clip, single, lora)
            return (weights, *_training_parts(config, shape, size, device, tokens, copied, gradients, head(tokens)))

        return Stage(name, f"{name}.batch_tokens", max(settings.batch_tokens, longest), parts_at)

    def generation(name: str, prompts: int, responses: int, new_tokens: int) -> Stage:
        prompt = config.data.max_prompt_tokens

        def parts_at(prompts: int) -> tuple[Part, ...]:
            sequences = prompts * responses
            return (
                weights,
                Part("activations", prompts * prompt * forward_bytes(shape, size, lora)),
                Part("head", sequences * shape.vocabulary * 4 * 3),  # logits, their order, running sums
                Part("KV cache", sequences * (prompt + new_tokens) * cache),
            )

        return Stage(name, f"{name}.batch_size", prompts, parts_at)

    def scoring(tokens: int) -> tuple[Part, ...]:
        return (
            weights,
            Part("activations", tokens * forward_bytes(shape, size, lora)),
            Part("head", tokens * shape.hidden * 4 + tile_bytes(shape, size, device, tokens)),
        )

    stages = []
    logp = functools.partial(logp_bytes, shape, size, device, frozen=lora.r > 0)
    if sft.enabled:
        stages.append(training("sft", sft.max_length, 0, logp))
    stages.append(generation("sample", sample.batch_size, sample.responses, sample.max_new_tokens))
    stages.append(Stage("score", "score.batch_tokens", score.batch_tokens, scoring))
    pair = 2 * min(sample.max_new_tokens, train.max_length)
    dpo = logp if lora.r else functools.partial(dpo_bytes, shape, size, device, pair)
    stages.append(training("train", 2 * train.max_length, twice, dpo))
    if config.evaluate.enabled:
        stages.append(generation("evaluate", config.evaluate.batch_size, 1, config.evaluate.max_new_tokens))
    return Plan(dtype, shape, tuple(stages), _disk(config, shape, size))


def tile_bytes(shape: Shape, size: int, device: str, rows: int) -> int:
    """A tile of logits of `rows` and of the head in float32, and both gradients."""
    most_rows, columns = HEAD_TILE[device][size]
    return 4 * min(columns, shape.vocabulary) * (2 * min(rows, most_rows) + 2 * shape.hidden)


def logp_bytes(shape: Shape, size: int, device: str, rows: int, frozen: bool = False) -> int:
    """linear_logp over `rows` hidden states: they, their gradient in float32, the head's gradient and a tile.

    With a frozen head the head has no gradient, and linear_weighted_dpo is linear_logp.
    """
    wide = rows * shape.hidden * (8 + size)
    if frozen:
        return wide + tile_bytes(shape, size, device, rows)
    return wide + shape.vocabulary * shape.hidden * size + tile_bytes(shape, size, device, rows)


def dpo_bytes(shape: Shape, size: int, device: str, pair: int, rows: int) -> int:
    """linear_weighted_dpo over `rows` hidden states, of which a pair has `pair`: they, and they and their gradient in
    float32; a chunk's logits; the head's gradient in float32 and then, if that is not its type, in its own.

    One chunk on a CPU keeps its logits, for at most D rows in the gradient's memory, and multiplies out a block of them
    at a time in backward.
    """
    V, D = shape.vocabulary, shape.hidden
    most = max(HEAD_CHUNK[device], pair, D if device == "cpu" else 0)
    if device == "cpu" and size == 2 and most < rows <= most + 2 * D:
        most = rows
    if device == "cpu" and rows <= most:
        tile_rows, columns = HEAD_TILE[device][size]
        up = 4 * (rows * D + min(columns, V) * (min(rows, tile_rows) + D)) if size == 2 else 0
        down = rows * (D * (4 + size) + min(HEAD_BLOCK, V) * size) + (V * D * size if rows > D else 0)
        return rows * D * size + V * max(rows, D) * size + max(up, down)
    logits, gradient = min(rows, most) * V * (size if device == "cpu" else 4), V * D * (4 if size == 4 else 4 + size)
    across = min(rows, most) * min(HEAD_BLOCK, V) * size if device == "cpu" and size == 2 else 0
    return rows * D * (8 + size) + logits + across + gradient + tile_bytes(shape, size, device, rows)


def _training_parts(
    config: Config,
    shape: Shape,
    size: int,
    device: str,
    tokens: int,  # a forward pass
    copied: int,  # bytes a token that attention keeps of prompts' keys and values
    gradients: tuple[int, int],  # of sums_bytes
    head: int,  # what the head and its loss hold, with every token a label
) -> tuple[Part, ...]:
    """Besides the weights, what training holds at its peak: where the head's loss is computed and all activations are
    there, in the last layer's backward, or at the end of a step's only micro-batch, when all gradients are."""
    lora = config.lora
    fused = config.model.fuses(device)
    saved, recomputed = activation_bytes(shape, size, config.model.gradient_checkpointing, lora, device, fused)
    saved += copied
    low, moments = state_bytes(shape, size, config.optim, lora)
    sums, last = gradients
    layer = recomputed + backward_bytes(shape, size, lora)
    embedding = shape.vocabulary * shape.hidden * size
    # A tied head's gradient waits for the embedding's, and then there is their sum; one that is untied waits where it
    # is kept for the end.
    waiting = embedding if shape.tied or last else 0
    arriving = 3 * embedding if shape.tied else 0 if last else shape.largest * size
    if lora.r:  # neither has a gradient, and an adapter's is small
        waiting = arriving = 0
    peaks = (
        (sums, tokens * saved, head),
        (sums + waiting, tokens * (saved + layer), 0),
        (sums + last + arriving, tokens * (layer + shape.hidden * size), 0),
    )
    held, activations, head = max(peaks, key=sum)
    return (
        Part("low bits", low),
        Part("moments", moments),
        Part("gradients", held),
        Part("activations", activations),
        Part("head", head),
    )


def gradient_checkpointing(config: Config, shape: Shape, dtype: str, memory: float, device: str = "cuda") -> str:
    """What "auto" comes to: the first of none, selective and full with which training fits `memory` bytes, or full."""
    for mode in ("none", "selective"):
        made = plan(replace(config, model=replace(config.model, gradient_checkpointing=mode)), shape, dtype, device)
        if max(stage.peak for stage in made.stages if stage.name in ("sft", "train")) <= memory:
            return mode
    return "full"


def _disk(config: Config, shape: Shape, size: int) -> tuple[tuple[str, int], ...]:
    """(what, bytes): the models that stay, the step checkpoints at their height, the text where it is bounded."""
    T, count = config.run.iterations, shape.parameters
    converted = config.model.path.endswith(".gguf") or config.model.path == "smollm2-135m"
    halfway = config.score.first_round == "sft_half"
    fine_tuned = ["M1"] + ["M1 halfway"] * halfway if config.sft.enabled else []
    made, adapter = [*fine_tuned, *(f"M{t + 2}" for t in range(T))], 4 * adapter_parameters(shape, config.lora)
    merged = {"last": made[-1:], "all": [name for name in made if name != "M1 halfway"], "none": []}
    whole = [*(["M0"] if converted else []), *(merged[config.lora.merge_on_export] if adapter else made)]
    rows = [(f"models {', '.join(whole)}", len(whole) * count * size)] if whole else []
    if adapter:
        rows.append((f"adapters {', '.join(made)}", len(made) * adapter))
    if config.sft.checkpoint_every or config.train.checkpoint_every:
        weights = adapter or count * size
        each = weights + sum(state_bytes(shape, size, config.optim, config.lora))
        rows.append((f"{STEP_CHECKPOINTS} step checkpoints while training", STEP_CHECKPOINTS * each))
    prompts, sample = config.data.prompts_per_iteration, config.sample
    if prompts:
        # JSONL: an id takes about 7 characters with its comma and space, and a token is about 4 of text
        tokens = prompts * (sample.responses + 2) * (config.data.max_prompt_tokens + sample.max_new_tokens)
        rows.append((f"responses and pairs of {T} iterations, at most", T * tokens * 11))
    return tuple(rows)
