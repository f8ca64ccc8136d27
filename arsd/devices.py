"""What the machine multiplies fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from arsd.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 products are native: any GPU, or a CPU with AVX-512 BF16 or AMX (emulated they are ~100x slower)."""
    if torch.device(device).type != "cpu":
        return True
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def resolve_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """``auto`` (bfloat16 where it is fast, else float32) or the name of a dtype.

    Raises:
        InputError: for an unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}: choose from auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """``auto`` (a GPU when there is one) or a torch device.

    Raises:
        InputError: when there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def device_kind(device: torch.device | str) -> str:
    """What a measured cost belongs to: the GPU's name, or the CPU's instruction set and the number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    extra = "+bf16" if has_fast_bfloat16(device) else ""
    return f"cpu {torch.backends.cpu.get_cpu_capability()}{extra} {torch.get_num_threads()} threads"


def dtype_name(pipe: Any) -> str:
    """The dtype of a pipeline or model as in :data:`DTYPES`: ``float32``, ``bfloat16``, ..."""
    return str(pipe.dtype).removeprefix("torch.")


@contextmanager
def in_use(*modules: Any) -> Iterator[None]:
    """Have the offloading hooks of whole modules (accelerate's, diffusers') bring their weights for as long as this lasts.

    Such hooks act when a module's ``forward`` is called. What a pipeline calls are parts of it: its decoder without the
    head, its embedding, the ``encode`` and ``decode`` of a tokenizer.
    """
    with ExitStack() as stack:
        for module in modules:
            for hook in _hooks_of(module) if isinstance(module, torch.nn.Module) else []:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def bring_back(module: Any) -> None:
    """Have a whole model that is in use brought again: another one may have pushed it out (accelerate's chain of hooks)."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)


def _hooks_of(module: torch.nn.Module) -> list[Any]:
    accelerates, registry = getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)
    found = [] if accelerates is None else [accelerates]
    return found + ([] if registry is None else list(registry.hooks.values()))
