"""Which weights of a network are tuned: all, low-rank adapters, or norms and biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmd_export.errors import NotAvailableError, UsageError
from mmd_finetune.settings import FinetuneSettings

DEFAULT_RANK = 8
_ADAPTER = "default"  # peft's own name
_LAYERS = (nn.Linear, nn.Conv2d)


def choose_weights(network: nn.Module, settings: FinetuneSettings) -> nn.Module:
    """``network`` with ``requires_grad`` where it is tuned; with adapters in place for ``lora``.

    Raises UsageError where nothing would be left to tune.
    """
    network.requires_grad_(settings.tune == "all")
    if settings.tune == "lora":
        _add_lora(network, settings)
    if settings.tune == "norm-bias":
        for parameter in _norms_and_biases(network):
            parameter.requires_grad_(True)
    if settings.tune != "none" and not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError(f"--tune {settings.tune}: the network has no such weights; use --tune all")
    return network


def _norms_and_biases(network: nn.Module) -> list[nn.Parameter]:
    """Every bias, and every weight of a module whose class says norm (BitFit, Ben Zaken et al. 2022, and norms)."""
    found = []
    for module in network.modules():
        norm = "norm" in type(module).__name__.lower()
        found += [p for name, p in module.named_parameters(recurse=False) if norm or name == "bias"]
    return found


def _add_lora(network: nn.Module, settings: FinetuneSettings) -> None:
    """W + (alpha / rank) B A on the target layers; Hu et al. 2022 (arXiv 2106.09685). A comes from the run's seed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise NotAvailableError(f"--tune lora needs peft ({error}); pip install 'mmd-export[finetune]'") from error
    layers = [name for name, module in network.named_modules() if isinstance(module, _LAYERS)]
    wanted = settings.lora_targets
    targets = [name for name in layers if not wanted or _matches(name, wanted)]
    for each in wanted:
        if not any(_matches(name, (each,)) for name in layers):
            ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise UsageError(f"--lora-targets {each}: no layer's name ends so; layers end in {', '.join(ends)}")
    if grouped := [name for name in targets if getattr(network.get_submodule(name), "groups", 1) != 1]:
        raise UsageError(f"--tune lora: layer {grouped[0]} is a grouped convolution; name others by --lora-targets")
    rank = settings.lora_rank or DEFAULT_RANK
    config = LoraConfig(r=rank, lora_alpha=settings.lora_alpha or rank, target_modules=targets, bias="none")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, network, adapter_name=_ADAPTER)


def _matches(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def plain_weights(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by the name it has without adapters, what they add included; with gradient."""
    found: dict[str, Tensor] = dict(network.named_parameters()) | dict(network.named_buffers())
    adapted = {name: module for name, module in network.named_modules() if hasattr(module, "get_delta_weight")}
    for name, module in adapted.items():
        inside = f"{name}."
        for key in [key for key in found if key.startswith(inside)]:
            tensor = found.pop(key)
            if key.startswith(base := f"{inside}base_layer."):
                found[inside + key.removeprefix(base)] = tensor
        found[f"{inside}weight"] = found[f"{inside}weight"] + module.get_delta_weight(_ADAPTER)
    return found
