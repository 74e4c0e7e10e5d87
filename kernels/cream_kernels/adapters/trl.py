"""TRL 1.15 and newer: DPOTrainer with our log-probs, and DPOTrainer with one consistency a pair. Two things, apart:

    with cream_head():                                     log-probs by linear_logp, in whatever trainer is made inside
        trainer = DPOTrainer(...)
    trainer = ConsistencyDPOTrainer(...)                   the loss by weighted_dpo; inside cream_head() as well, or not

B sequences (chosen, then rejected), S positions, N = B S, P pairs, D hidden size, V vocabulary.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from ..linear_logp import linear_logp_statistics
from ..reference import IGNORE
from ..weighted_dpo import weighted_dpo

try:
    from trl.trainer import dpo_trainer
    from trl.trainer.dpo_trainer import add_fused_lm_head  # noqa: F401  # what cream_head takes the place of
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    if not (error.name or "").startswith("trl."):
        raise
    installed = metadata.version("trl")
    raise ImportError(f"{__name__} needs trl 1.15 or newer, with its fused head; {installed} is installed") from error

COLUMN = "consistency"
# inputs that DPOTrainer's collators make for the loss and not for the model
NOT_FOR_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", COLUMN)


@contextlib.contextmanager
def cream_head() -> Iterator[None]:
    """A DPOTrainer made inside takes its log-probs, and its reference model's, from linear_logp.

    For the models that such a trainer was made for, for good; TRL's own head is back at the end of the `with`.
    """
    theirs = dpo_trainer.add_fused_lm_head
    dpo_trainer.add_fused_lm_head = add_cream_head
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = theirs


def add_cream_head(
    model: torch.nn.Module,  # a causal LM of transformers, before PEFT or FSDP wraps it
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """trl.trainer.utils.add_fused_lm_head by linear_logp: model(..., labels=, fused_lm_head=True) has log_probs.

    Fields asked for besides log_probs are for logs: they carry no gradient and come out of the same pass; only the mean
    of capped logits (Gemma) costs the logits of the labelled positions once more (2NDV floating-point operations), a
    block of rows at a time. The head is looked up at each call, since FSDP and PEFT replace it after this; one that
    FSDP2 has sharded is gathered. The model's own forward is as before without fused_lm_head.

    A model's scale and cap of logits are kept. Raises ValueError for mixture-of-experts' auxiliary loss, DeepSpeed
    ZeRO-3, log_sum_sq_probs and cast_lm_head_to_fp32.
    """
    config = model.config.get_text_config()
    if cast_lm_head_to_fp32:
        raise ValueError("cast_lm_head_to_fp32 is not for cream_head: linear_logp accumulates in float32 as it is")
    if "log_sum_sq_probs" in outputs:
        raise ValueError("use_weighting needs log_sum_sq_probs, which cream_head does not compute")
    scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None) or 0.0
    if not scale > 0:
        raise ValueError(f"{config.model_type} multiplies its logits by {scale}: cream_head takes scales above 0")
    plain_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return plain_forward(*args, **kwargs, **{key: value for key, value in given.items() if value is not None})
        if kwargs.get("output_router_logits") or getattr(config, "output_router_logits", False):
            raise ValueError(
                "cream_head has no router's auxiliary loss: set the trainer's router_aux_loss_coef to 0 and the model's"
                " output_router_logits to False"
            )
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state  # (B, S, D)
        head = self.get_output_embeddings()
        weight, bias = _whole(head.weight), _whole(head.bias)
        # Labels move rather than hidden states, which are larger: no copy of (B, S - 1, D) is made.
        width = hidden.shape[1] if shift_labels is not None else hidden.shape[1] - 1
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE) if shift_labels is None else shift_labels
        hidden, targets = hidden.to(weight.device), targets.to(weight.device)
        rows = hidden.flatten(0, 1), weight, targets.flatten()
        settings = {"bias": bias, "temperature": temperature, "scale": scale, "softcap": softcap}

        def per_token(values: Tensor) -> Tensor:  # (N,) -> (B, S - 1), or (B, S) for labels that came shifted
            return values.view(targets.shape)[:, :width]

        logp, others, entropy = linear_logp_statistics(*rows, **settings, want_entropy="entropy" in outputs)
        log_probs, mask = per_token(logp), targets[:, :width] != IGNORE
        extras = dict.fromkeys(("entropy", "mean_logits", "is_top1"))
        with torch.no_grad():
            if "entropy" in outputs:
                extras["entropy"] = per_token(entropy)
            if "is_top1" in outputs:
                extras["is_top1"] = per_token(logp >= -others.log1p()) & mask
            if "mean_logits" in outputs:
                extras["mean_logits"] = per_token(_mean_logits(*rows, **settings))
        tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(loss=-log_probs.sum() / tokens, log_probs=log_probs, label_mask=mask, **extras)

    model.forward = types.MethodType(forward, model)


def logit_scale(config) -> float:
    """What a model multiplies its logits by; each family of transformers has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / divisor  # HyperCLOVA X multiplies by it


def _whole(parameter: Tensor | None) -> Tensor | None:
    """The parameter unsharded; its gradient goes back to the shards."""
    if hasattr(parameter, "ds_id"):
        raise ValueError("cream_head does not gather what DeepSpeed ZeRO-3 has partitioned: use ZeRO-2 or FSDP2")
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _mean_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    bias: Tensor | None,  # (V,)
    temperature: float,
    scale: float,
    softcap: float,
) -> Tensor:  # (N,) float32, 0 where the target is IGNORE
    """The mean over the vocabulary; without a cap that is one product with the mean of the head."""
    counts = targets != IGNORE
    if not softcap:
        middle = hidden.float() @ weight.mean(0, dtype=torch.float32)
        middle = middle if bias is None else middle + bias.mean(dtype=torch.float32)
        return (scale / temperature * middle).masked_fill(~counts, 0.0)
    mean = hidden.new_zeros(len(targets), dtype=torch.float32)
    for rows in counts.nonzero()[:, 0].split(max(1, 2**24 // weight.shape[0])):  # 64 MB of float32 logits
        logits = scale * functional.linear(hidden[rows], weight, bias).float()
        mean[rows] = (softcap * (logits / softcap).tanh() / temperature).mean(1)
    return mean


class ConsistencyDPOTrainer(dpo_trainer.DPOTrainer):
    """DPOTrainer for a dataset with a column `consistency`, a number in [0, 1] for each pair.

    A pair at 1 counts as in DPO, at 0 as in DPO with the pair swapped: CREAM's loss, weighted_dpo. Arguments, metrics
    and what happens at each step are DPOTrainer's; `consistency` is logged beside them. Serves the loss type sigmoid.

    Raises ValueError for other losses, for settings that change the margin or the loss besides, and, naming the row,
    for a consistency that is missing or outside [0, 1]: in a Dataset at once, in a stream as the row comes.
    """

    def __init__(self, *args, **kwargs):
        given = inspect.signature(dpo_trainer.DPOTrainer).bind(*args, **kwargs).arguments
        if given.get("compute_metrics") is not None:
            raise ValueError("compute_metrics is not served: it wants logits, which are never made here")
        if given.get("args") is not None:
            _check_settings(given["args"])
        _check_column("train_dataset", given.get("train_dataset"))
        evaluated = given.get("eval_dataset")
        for name, dataset in evaluated.items() if isinstance(evaluated, dict) else [("eval_dataset", evaluated)]:
            _check_column(name, dataset)
        super().__init__(*args, **kwargs)
        self.data_collator = _Collator(self.data_collator)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {key: value for key, value in inputs.items() if key != COLUMN})

    def _compute_loss(self, model, inputs, return_outputs):
        if return_outputs:
            raise ValueError("ConsistencyDPOTrainer returns no outputs: logits are never made here")
        given = {key: value for key, value in inputs.items() if key not in NOT_FOR_MODEL}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        outputs = model(**given, use_cache=False, labels=labels, fused_lm_head=True)
        mask = inputs["completion_mask"][:, 1:]
        # PEFT's virtual tokens come before those that are ours
        of_tokens = {name: value[:, -mask.shape[1] :] for name, value in outputs.items() if value.dim() == 2}
        chosen, rejected = of_tokens["log_probs"].sum(1).chunk(2)
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        chosen_reward, rejected_reward = self.beta * (chosen - reference[0]), self.beta * (rejected - reference[1])
        losses = weighted_dpo(chosen_reward - rejected_reward, inputs[COLUMN])
        loss = losses.mean() * self.loss_weights[0]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        with torch.no_grad():
            chosen_mask, rejected_mask = mask.chunk(2)
            chosen_logits, rejected_logits = of_tokens["mean_logits"].chunk(2)
            totals = {
                COLUMN: _total(inputs[COLUMN]),
                "entropy": _total(of_tokens["entropy"], mask),
                "logits/chosen": _total(chosen_logits, chosen_mask),
                "logits/rejected": _total(rejected_logits, rejected_mask),
                "mean_token_accuracy": _total(of_tokens["is_top1"].chunk(2)[0], chosen_mask),
                "rewards/chosen": _total(chosen_reward),
                "rewards/rejected": _total(rejected_reward),
                "rewards/accuracies": _total(chosen_reward > rejected_reward),
                "rewards/margins": _total(chosen_reward - rejected_reward),
                "logps/chosen": _total(chosen),
                "logps/rejected": _total(rejected),
                "num_tokens": _total(inputs["attention_mask"]),
            }
            if self.aux_loss_enabled:
                totals["aux_loss"] = _total(outputs.aux_loss)
            self._log(totals)
        return loss

    def _log(self, totals: dict[str, Tensor]) -> None:
        """Means over all ranks into the trainer's metrics, by one gather and one look where TRL takes a dozen."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        sums = self.accelerator.gather(torch.stack(list(totals.values()))[None]).sum(0).tolist()
        for name, (total, count) in zip(totals, sums, strict=True):
            if name != "num_tokens":
                metrics[name].append(total / count if count else 0.0)
            elif self.model.training:
                self._total_train_tokens += int(total) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]


def _total(values: Tensor, mask: Tensor | None = None) -> Tensor:  # (2,) float32: the sum, and of how many
    values = values.float()
    mask = torch.ones_like(values) if mask is None else mask.float()
    return torch.stack(((values * mask).sum(), mask.sum()))


def _check_settings(args) -> None:
    """ValueError that names the first setting of a DPOConfig that weighted_dpo does not have."""
    if args.loss_type != ["sigmoid"]:
        raise ValueError(f"loss_type must be 'sigmoid', which consistency weights, not {args.loss_type}")
    only = {"f_divergence_type": "reverse_kl", "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False}
    for name, value in only.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name} must be {value!r} beside a consistency, not {getattr(args, name)!r}")


def _check_column(name: str, dataset) -> None:
    """ValueError that names the first row whose consistency does not do; streams are looked at as they come."""
    if not hasattr(dataset, "__len__"):
        return
    if COLUMN not in dataset.column_names:
        raise ValueError(f"{name} has no column {COLUMN!r}: add one, a number in [0, 1] for each pair")
    for row, value in enumerate(dataset[COLUMN]):
        _check_value(value, f"{name} row {row}")


def _check_value(value, where: str) -> None:
    if value is None:
        raise ValueError(f"{where} has no {COLUMN}")
    if not 0 <= value <= 1:
        raise ValueError(f"{where} has {COLUMN} {value}: must be in [0, 1]")


class _Collator:
    """The trainer's own collator, and beside what it makes the rows' consistencies."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, rows: list[dict]) -> dict:
        for number, row in enumerate(rows):
            _check_value(row.get(COLUMN), f"row {number} of a batch")
        values = [float(row[COLUMN]) for row in rows]  # first, since collators may change the rows
        return self.collate(rows) | {COLUMN: torch.tensor(values)}
