"""What a call is given, checked at the boundary: strategies, batch, output, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import Autoregressive, DecodingStrategy, LawConfig, parse_strategy
from arsd.devices import DTYPES
from arsd.errors import CheckpointError, InputError, StrategyError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Decoders = DecodingStrategy | str | Sequence[DecodingStrategy | str] | None


def strategies_of(decoder: Decoders, default: DecodingStrategy | None) -> list[DecodingStrategy]:
    """The strategies of a call: what was given (one, or one per picture), else ``default``, else plain AR.

    Raises:
        StrategyError: when it is no strategy.
    """
    several = isinstance(decoder, Sequence) and not isinstance(decoder, str)
    return [_strategy(one, default) for one in (decoder if several else [decoder])]  # type: ignore[union-attr]


def _strategy(decoder: Any, default: DecodingStrategy | None) -> DecodingStrategy:
    if isinstance(decoder, str):
        return parse_strategy(decoder)
    chosen = decoder if decoder is not None else default
    if chosen is None:
        return Autoregressive()
    if not isinstance(chosen, DecodingStrategy):
        raise StrategyError(f"decoder must be a decoding strategy such as arsd.SJD(), not {type(chosen).__name__}")
    return chosen


def rows_of(decoders: list[DecodingStrategy], count: int, batch_size: int | None) -> int:
    """The rows of a pass for ``count`` pictures.

    Raises:
        InputError: when ``batch_size`` is no positive number, or there are neither one nor ``count`` decoders.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size must be at least 1, not {batch_size!r}")
    if len(decoders) not in (1, count):
        raise InputError(f"got {len(decoders)} decoders for {count} pictures: give one, or one for each")
    return min(batch_size or count, count)


def check_output(output_type: str, callback_inputs: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for an unknown output type, or a callback tensor that is not among ``known``."""
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
    unknown = [name for name in callback_inputs if name not in known]
    if unknown:
        raise InputError(f"callback_on_step_end_tensor_inputs can hold {known}, not {unknown}")


def check_prompts(prompt: Any) -> list[str]:
    """One prompt or several, as a list.

    Raises:
        InputError: for anything else, or an empty prompt.
    """
    if not isinstance(prompt, (str, Sequence)):
        raise InputError(f"prompt must be text or a list of texts, not {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(one, str) and one.strip() for one in prompts):
        raise InputError("the prompt is empty")
    if any("\ud800" <= letter <= "\udfff" for one in prompts for letter in one):
        raise InputError("the prompt holds half a character (a surrogate), which is no text")
    return prompts


def check_negative(negative_prompt: Any, prompts: int) -> list[str | None]:
    """One negative prompt for all or one for each, as a list of ``prompts``; an empty one is one without words.

    Raises:
        InputError: for anything else, or another number of them.
    """
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt] * prompts
    if not isinstance(negative_prompt, Sequence) or not all(isinstance(one, str) for one in negative_prompt):
        raise InputError(f"negative_prompt must be text or a list of texts, not {negative_prompt!r}")
    if len(negative_prompt) != prompts:
        raise InputError(f"got {len(negative_prompt)} negative prompts for {prompts} prompts: give one, or one for each")
    return list(negative_prompt)


def check_count(count: Any, name: str = "num_images_per_prompt") -> None:
    """Raise InputError unless this is a positive number of pictures or clips."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"{name} must be at least 1, not {count}")


def check_image_size(image_size: Any) -> None:
    """Raise InputError unless this is ``None`` or a number of pixels."""
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise InputError(f"image_size must be a number of pixels, not {image_size!r}")


def check_sampling(sampling: dict[str, Any] | None) -> None:
    """Raise InputError unless these are sampling options (fields of :class:`arsd.decoding.LawConfig`)."""
    try:
        LawConfig(**(sampling or {}))
    except TypeError:
        raise InputError(f"sampling has options that there are not: {', '.join(map(str, sampling or {}))}") from None


def dtype_of(dtype: Any, options: dict[str, Any]) -> torch.dtype | None:
    """The dtype that ``from_pretrained`` was given as ``dtype``, or as ``torch_dtype`` among ``options`` (taken out).

    Raises:
        InputError: for what is none, or two that differ.
    """
    old = options.pop("torch_dtype", None)
    given = {DTYPES.get(one, one) for one in (dtype, old) if one is not None and one != "auto"}
    if len(given) > 1 or not all(isinstance(one, torch.dtype) for one in given):
        raise InputError(f"dtype must be one of {', '.join(DTYPES)} or a torch.dtype, not {dtype!r} and torch_dtype {old!r}")
    return next(iter(given), None)


def saved_component(cls: Any, folder: Any, dtype: torch.dtype | None) -> Any:
    """A component that ``save_pretrained`` wrote.

    Raises:
        CheckpointError: when it is another one, or damaged.
    """
    try:
        part = cls.from_pretrained(str(folder))
        part = part.eval() if isinstance(part, torch.nn.Module) else part
        return part if dtype is None else part.to(dtype)
    except Exception as error:  # a damaged folder can raise anything
        raise CheckpointError(f"{folder} holds no {cls.__name__}: {' '.join(str(error).split())[:150]}") from error


def check_labels(given: Any, device: torch.device) -> Tensor:
    """One class id or several as a tensor [B]; InputError for anything else."""
    try:
        labels = torch.as_tensor(given, device=device).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"class_labels must be one class id or several, not {given!r}") from None
    if not len(labels) or labels.is_floating_point():
        raise InputError(f"class_labels must be one class id or several, not {given!r}")
    return labels
