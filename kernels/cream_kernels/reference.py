"""What every op of this package means: slow, obvious, in float64 if fed it.

The fast bodies are held to these functions by the tests, and who embeds the package can do the same. Nothing here is
tuned, tiled or in place; gradients are those of autograd. Half-precision products are torch's own, so a bfloat16 call
is what plain torch makes of it; everything after the product is float32, or float64 for float64 inputs.

N tokens, P pairs, R responses a prompt, D hidden size, V vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

# The target of a row that counts for nothing, as in torch.nn.functional.cross_entropy and transformers.
IGNORE = -100


def gather_logp(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,) int64, IGNORE where a row counts for nothing
    *,
    temperature: float = 1.0,
) -> Tensor:  # (N,) float32, nats
    """log softmax(logits / temperature)[n, targets[n]]; 0 where targets[n] is IGNORE."""
    return _logp_and_entropy(_widen(logits) / temperature, targets)[0]


def linear_logp(
    hidden: Tensor,  # (N, D) last hidden states
    weight: Tensor,  # (V, D) LM head
    targets: Tensor,  # (N,) int64, IGNORE where a row counts for nothing
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (N,) float32, nats; with return_entropy two of them
    """log softmax(z)[n, targets[n]], z = scale * (hidden @ weight.T + bias), capped, / temperature; 0 where IGNORE.

    Capped is softcap * tanh(. / softcap), or nothing where softcap is 0. The entropy is that of softmax(z).
    """
    logits = scale * _widen(functional.linear(hidden, weight, bias))
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logp, entropy = _logp_and_entropy(logits / temperature, targets)
    return (logp, entropy.detach()) if return_entropy else logp


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _logp_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (N, V), (N,) -> (N,), (N,)
    counts = targets != IGNORE
    rows = functional.log_softmax(logits[counts], dim=-1)
    picked = rows.gather(1, targets[counts, None])[:, 0]
    entropy = -(rows.exp() * rows.masked_fill(rows == -math.inf, 0.0)).sum(-1)
    zeros = logits.new_zeros(targets.shape)
    return zeros.index_put((counts,), picked), zeros.index_put((counts,), entropy)


def weighted_dpo(
    margin: Tensor,  # (P,) beta * (chosen - rejected) log-ratio of policy to reference
    agreement: Tensor | float,  # (P,) or () in [0, 1]
) -> Tensor:  # (P,) float32
    """agreement * L(chosen > rejected) + (1 - agreement) * L(rejected > chosen), L(margin) = -log sigmoid(margin)."""
    margin = margin if margin.dtype == torch.float64 else margin.float()
    as_ranked = -functional.logsigmoid(margin)
    reversed_ = -functional.logsigmoid(-margin)
    return agreement * as_ranked + (1 - agreement) * reversed_


def linear_weighted_dpo(
    hidden: Tensor,  # (N, D) last hidden states, sequences one after the other: chosen, rejected, chosen, ...
    weight: Tensor,  # (V, D) LM head
    targets: Tensor,  # (N,) int64, IGNORE where a row counts for nothing
    cu_seqlens: Tensor,  # (2P + 1,) where each sequence starts, and N
    reference_logp: Tensor,  # (2P,) nats, the reference model's log-prob of each sequence
    agreement: Tensor,  # (P,) or () in [0, 1]
    *,
    beta: float,
) -> tuple[Tensor, Tensor]:  # loss (P,), logp (2P,) nats
    """weighted_dpo of beta * ((logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)), pair by pair."""
    rows = linear_logp(hidden, weight, targets)
    bounds = cu_seqlens.tolist()
    sums = [rows[start:end].sum() for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    logp = torch.stack(sums) if sums else rows.new_zeros(0)
    ratio = logp - reference_logp
    return weighted_dpo(beta * (ratio[0::2] - ratio[1::2]), agreement), logp


def kendall_tau(
    x,  # (P, R) anything that can be indexed twice
    y,  # (P, R)
    *,
    variant: str = "b",
) -> list[float]:  # P numbers in [-1, 1], or nan
    """Kendall's tau of each row of x with the same row of y, by looking at every pair of columns.

    S = number of pairs ranked alike less number ranked oppositely. Variant "a" is S / (R (R - 1) / 2); variant "b" is
    S / sqrt(pairs untied in x * pairs untied in y). nan for R < 2, for a row that holds a nan, and in variant "b"
    where all of x or all of y is tied.
    """
    result = []
    for a, b in zip(x, y, strict=True):
        a, b = [float(value) for value in a], [float(value) for value in b]
        pairs = [(i, j) for i in range(len(a)) for j in range(i)]
        sign_a = [(a[i] > a[j]) - (a[i] < a[j]) for i, j in pairs]
        sign_b = [(b[i] > b[j]) - (b[i] < b[j]) for i, j in pairs]
        score = sum(s * t for s, t in zip(sign_a, sign_b, strict=True))
        untied = sum(map(abs, sign_a)) * sum(map(abs, sign_b))
        scale = len(pairs) if variant == "a" else math.sqrt(untied)
        defined = scale > 0 and not any(map(math.isnan, a + b))
        result.append(score / scale if defined else math.nan)
    return result
