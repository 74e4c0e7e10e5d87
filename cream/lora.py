"""LoRA through peft: M0 stays as it is, and a checkpoint is an adapter of low rank over it.

One module holds M0 and one adapter. To take a checkpoint's place it gets that adapter's weights; to be M0 it has the
adapter switched off. Base weights keep the model's dtype and never move; adapters are float32. Only the layers that
peft replaces know of it: what the rest of the program gets is transformers' own module.

An adapter directory is peft's: adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cream.config import NEEDS_PEFT, LoRAConfig, ModelConfig
from cream.log import UserError, progress
from cream.model import (
    ADAPTER,
    ADAPTER_CONFIG,
    Resident,
    fetch,
    load,
    load_tokenizer,
    model_card,
    open_files,
    recompute,
    save,
)

# peft's settings with which an adapter is not alpha / r times B A over M0's weights, in all the layers that it targets.
OTHER = (
    *("rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "modules_to_save", "exclude_modules"),
    *("layers_to_transform", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva", "mica")  # the others (pissa, olora, loftq, ...) change M0


def check_peft() -> None:
    """Raise UserError where peft cannot be imported."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "peft":
            raise UserError(NEEDS_PEFT) from None
        raise UserError(f"lora.r is above 0, but peft cannot be imported: {error}") from None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"lora.r is above 0, but peft cannot be imported: {reason}") from None


class Adapted(Resident):
    """The one module in memory: M0 and which checkpoint's adapter is over it, if any."""

    def __init__(
        self,
        m0: Path,
        config: ModelConfig,
        lora: LoRAConfig,
        *,
        base: str,  # what an adapter's configuration shall call M0: a path or hub name
        seed: int,  # of an adapter that begins
    ):
        super().__init__(m0, config)
        self.lora, self.base, self.seed = lora, base, seed
        self._peft = None

    @property
    def model(self) -> nn.Module:
        """The module, loaded when first asked for, whatever adapter it has."""
        if self._peft is None:
            self._model = load(self.m0, self.config)
            self._peft = attach(self._model, self.lora)
            self._peft.base_model.disable_adapter_layers()
        return self._model

    def at(self, checkpoint: Path, *, gradients: bool = False) -> nn.Module:
        """The module as that checkpoint; with `gradients`, its adapter ready to be trained, a new one over M0 itself.

        Raises UserError where the checkpoint is no adapter of this run's rank, scale and layers.
        """
        model, begins = self.model, checkpoint == self.m0
        if begins and gradients:
            self._holds = None
            _begin(model, self.seed)
        elif not begins and self._holds != checkpoint:
            self._holds = None
            self._swap(checkpoint)
            self._holds = checkpoint
        if begins and not gradients:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
        model.requires_grad_(False).eval()
        if gradients:
            self._holds = None
            ready(model, self.lora, self.config.gradient_checkpointing)
        return model

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's weights themselves, by the names that they have in a file of peft's."""
        return _tensors(self._peft)

    def _swap(self, checkpoint: Path) -> None:
        check_adapter(checkpoint, self.lora)
        found, own = read_adapter(checkpoint), self.tensors()
        _check_names(checkpoint, found, own)
        for name, tensor in found.items():
            if tensor.shape != own[name].shape:
                shapes = f"{tuple(tensor.shape)} where the model has {tuple(own[name].shape)}"
                raise UserError(f"{checkpoint / ADAPTER}: {name} is {shapes}: an adapter of another model")
            own[name].copy_(tensor)

    def save(self, directory: Path, tokenizer, name: str, parent: str, facts: Mapping[str, object]) -> None:
        """Write the adapter as peft reads it. No tokenizer: peft's loader would cut M0's embeddings to its length."""
        self._peft.peft_config["default"].base_model_name_or_path = self.base
        self._peft.peft_config["default"].revision = self.config.revision
        self._peft.save_pretrained(directory, save_embedding_layers=False)
        settings = read_settings(directory)
        settings["target_modules"] = sorted(settings["target_modules"])  # a set, whose order changes from run to run
        (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (directory / "README.md").write_text(model_card(name, parent, facts, library="peft"), encoding="utf-8")
        open_files(directory)


def attach(model: nn.Module, lora: LoRAConfig):  # peft.PeftModel
    """Replace the layers that get an adapter, in place. Raises UserError where the model has none of that name."""
    check_peft()
    import peft

    wanted = peft.LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    try:
        with _quiet():
            adapted = peft.get_peft_model(model, wanted)
    except ValueError as error:
        raise UserError(f"lora.targets: {str(error).splitlines()[0]}") from None
    model.requires_grad_(False).eval()
    return adapted


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings: that transformers renames things, and of what `_check_names` refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tensors(adapted) -> dict[str, Tensor]:  # of a peft.PeftModel
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def _check_names(directory: Path, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if differing := found.keys() ^ own.keys():
        raise UserError(f"{directory / ADAPTER}: {min(differing)} is in one of adapter and model only")


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def ready(model: nn.Module, lora: LoRAConfig, checkpointing: str) -> None:
    """Make the adapter what training moves, with its dropout, and nothing else."""
    recompute(model, checkpointing, rank=lora.r, random=lora.dropout > 0)
    for layer in _layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part.requires_grad_(True)
        layer.lora_dropout.train(True)


def _begin(model: nn.Module, seed: int) -> None:
    """Give the adapter the weights that it starts from: A random, B zero, so that the model is M0 to the last bit."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in _layers(model):
            layer.reset_lora_parameters("default", True)


def read_settings(directory: Path) -> dict:
    """adapter_config.json. Raises UserError where it cannot be read or is not LoRA's."""
    path = directory / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the configuration of an adapter ({error})") from None
    if kind != "LORA":
        raise UserError(f"{path}: an adapter of kind {kind}; cream reads LoRA adapters")
    return settings


def read_adapter(directory: Path) -> dict[str, Tensor]:
    try:
        return load_file(directory / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / ADAPTER}: cannot be read ({error})") from None


def check_adapter(directory: Path, lora: LoRAConfig) -> None:
    """Raise UserError where the adapter is not of the rank, scale and layers that `lora` says, or not a plain one."""
    settings = read_settings(directory)
    odd = [name for name in OTHER if settings.get(name)]
    odd += ["bias"] * (settings.get("bias", "none") != "none")
    odd += ["init_lora_weights"] * (settings.get("init_lora_weights", True) not in BEGINNINGS)
    if odd:
        raise UserError(
            f"{directory}: adapter with {odd[0]} {settings[odd[0]]}, which cream does not train on; merge it into its "
            "base, and give both models whole"
        )
    root = settings.get("use_rslora")
    given = {
        "r": settings.get("r"),
        "alpha": settings.get("lora_alpha", 0) * (math.sqrt(settings["r"]) if root else 1),
        "targets": sorted(settings.get("target_modules") or []),
    }
    for name, value in given.items():
        wanted = sorted(lora.targets) if name == "targets" else getattr(lora, name)
        if value != wanted:
            raise UserError(f"{directory}: adapter with {name} {value}, but lora.{name} is {wanted}; make them equal")


def given(path: str, config: ModelConfig, lora: LoRAConfig) -> Path:
    """Where the user's own M1 is. Raises UserError unless it is an adapter as `lora` says, or none with lora.r 0."""
    try:
        place, unmade = fetch(replace(config, revision=None), path)  # model.revision is of M0's repository
    except UserError as error:
        raise UserError(f"sft.path: {str(error).removeprefix('model.path: ')}") from None
    adapted = unmade == ADAPTER
    if adapted != bool(lora.r):
        kind = "an adapter, but lora.r is 0" if adapted else "a whole model, but lora.r asks for adapters over M0"
        raise UserError(f"sft.path: {path} is {kind}; give an M1 of the other kind, or another lora.r")
    if adapted:
        check_adapter(Path(place), lora)
    return Path(place)


def base_of(adapter: Path, config: ModelConfig) -> Path:
    """Where the model is that an adapter's configuration names as its base. Raises UserError where it is not here."""
    settings, where = read_settings(adapter), adapter / ADAPTER_CONFIG
    name = settings.get("base_model_name_or_path") or "nothing"
    try:
        place, unmade = fetch(replace(config, revision=settings.get("revision")), name)
    except UserError as error:
        reason = str(error).removeprefix("model.path: ")
        raise UserError(f"{where}: base_model_name_or_path: {reason}; write there where the base model is") from None
    if unmade is not None:
        raise UserError(f"{where}: base_model_name_or_path: {name} is no Hugging Face model directory; give one")
    return Path(place)


def import_adapter(config: ModelConfig, directory: Path) -> None:
    """Write the adapter at config.path, added to its base, as a Hugging Face directory."""
    adapter = Path(fetch(config)[0])
    write_merged(directory, base_of(adapter, config), adapter, config, "M0")


def write_merged(directory: Path, base: Path, adapter: Path, config: ModelConfig, name: str) -> None:
    """Write base plus adapter as a Hugging Face directory, the model `name`."""
    with progress(3, f"{name} merged", "steps") as bar:
        model = merged(base, adapter, config)
        bar.update(1)
        tokenizer = load_tokenizer(base)
        bar.update(1)
        facts = {"adapter": adapter.name, "dtype": str(model.dtype).removeprefix("torch.")}
        save(directory, model, tokenizer, model_card(name, f"{base.name} and a LoRA adapter", facts))
        bar.update(1)


def merged(base: Path, adapter: Path, config: ModelConfig) -> nn.Module:
    """The base, loaded anew on the CPU, with the adapter's products in its weights.

    Each layer is added up in float32 and rounded to the model's dtype, one at a time, so that a float32 copy of the
    whole model is never held.
    """
    check_peft()
    import peft

    read_settings(adapter)
    model = load(base, config, place=torch.device("cpu"))
    found = read_adapter(adapter)
    try:
        with _quiet():
            adapted = peft.PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{adapter}: does not fit {base}: {str(error).splitlines()[0]}") from None
    _check_names(adapter, found, _tensors(adapted))
    for layer in _layers(model):
        inner = layer.get_base_layer()
        dtype = inner.weight.dtype
        inner.float()
        layer.merge(safe_merge=True)
        inner.to(dtype)
    return adapted.unload()
