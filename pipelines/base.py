"""What every image pipeline shares: seeds, laws, the call into the decoding loop, progress, callbacks, output."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from arsd.decoding import (
    Autoregressive,
    CounterNoise,
    DecodeRequest,
    DecodeStats,
    DecodingStrategy,
    Grammar,
    LawConfig,
    Laws,
    Setting,
    build_parts,
    decode,
)
from arsd.devices import device_kind, dtype_name
from arsd.errors import InputError, StrategyError
from arsd.profile import find_profile

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | Sequence[torch.Generator] | None
Decoders = DecodingStrategy | str | Sequence[DecodingStrategy | str] | None
TargetMaker = Callable[[int, int], Any]  # (pass_tokens, batch) -> target


@dataclass
class ARPipelineOutput(BaseOutput):
    """What a pipeline returns.

    Args:
        images: pictures in the order asked for, in the asked ``output_type``.
        tokens: [B, N] image codes.
        stats: figures of the call, :class:`arsd.decoding.DecodeStats`.
        seeds: [B] noise seed of each picture; with ``image_indices`` it fixes the picture of a seed-exact decoder.
        image_indices: [B] index under which each picture's noise was drawn.
        law_config: the sampling options that were in force.
        decoders: [B] strategy of each picture.
        inputs: [B] what each picture was made of: ``{"prompt": ...}``, ``{"class_label": ...}`` or ``{}``.
        log_probs: [B, N] log-probabilities of the tokens, when asked for.
        entropies: [B, N] entropies (nats) of the tokens' laws, when asked for.
        trace: every pass, when asked for.
    """

    images: Any
    tokens: Tensor
    stats: DecodeStats
    seeds: list[int]
    image_indices: list[int]
    law_config: LawConfig
    decoders: list[DecodingStrategy]
    inputs: list[dict[str, Any]]
    log_probs: Tensor | None = None
    entropies: Tensor | None = None
    trace: Any = None


def noise_keys(generator: Generators, batch: int) -> tuple[list[int], list[int]]:
    """(seeds, image indices) of ``batch`` pictures.

    One generator gives one seed to all pictures, told apart by their index; a list gives each picture its own seed and index
    0, so that it comes out as in a call of its own. Without a generator the seed is fresh entropy. Drawing the seed advances
    the generator, as diffusers users expect of a second call.

    Raises:
        InputError: when a list has the wrong length.
    """

    def draw(source: torch.Generator) -> int:
        return int(torch.randint(2**63 - 1, (), generator=source, device=source.device))

    if generator is None:
        return [secrets.randbits(63)] * batch, list(range(batch))
    if isinstance(generator, torch.Generator):
        return [draw(generator)] * batch, list(range(batch))
    if not isinstance(generator, Sequence) or not all(isinstance(g, torch.Generator) for g in generator):
        raise InputError(f"generator must be a torch.Generator or a list of them, not {generator!r}")
    if len(generator) != batch:
        raise InputError(f"got {len(generator)} generators for {batch} pictures: give one, or one for each")
    return [draw(source) for source in generator], [0] * batch


class ARImagePipeline(DiffusionPipeline):
    """Base of the image pipelines. A subclass turns inputs into a target; nothing here knows a model.

    Components: ``decoder``, a :class:`arsd.DecodingStrategy`, which can be swapped like a scheduler.
    """

    _callback_tensor_inputs = ["tokens"]
    decoder: DecodingStrategy

    def decode_pixels(self, tokens: Tensor) -> Tensor:
        """Codes [B, N] to pictures [B, 3, H, W] in [-1, 1]; a picture never depends on the others."""
        raise NotImplementedError

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the present pass.

        As in diffusers, the flag belongs to the pipeline: calls that run in parallel threads share it.
        """
        return getattr(self, "_interrupt", False)

    @property
    def num_timesteps(self) -> int:
        """Forward passes of the last call."""
        return getattr(self, "_num_timesteps", 0)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the last call."""
        return getattr(self, "_guidance_scale", 1.0)

    def check_decoder(self, decoder: Decoders) -> list[DecodingStrategy]:
        """The strategies of a call: the argument (one, or one per picture), else the component.

        Raises:
            StrategyError: when it is no strategy.
        """
        if isinstance(decoder, Sequence) and not isinstance(decoder, str):
            return [self._strategy(one) for one in decoder]
        return [self._strategy(decoder)]

    def _strategy(self, decoder: DecodingStrategy | str | None) -> DecodingStrategy:
        from arsd.decoding import parse_strategy

        if isinstance(decoder, str):
            return parse_strategy(decoder)
        chosen = decoder if decoder is not None else self.decoder
        if chosen is None:
            return Autoregressive()
        if not isinstance(chosen, DecodingStrategy):
            raise StrategyError(f"decoder must be a decoding strategy such as arsd.SJD(), not {type(chosen).__name__}")
        return chosen

    def check_rows(self, decoders: list[DecodingStrategy], count: int, batch_size: int | None) -> int:
        """The rows of a pass for ``count`` pictures.

        Raises:
            InputError: when ``batch_size`` is no positive number, or there are neither one nor ``count`` decoders.
        """
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"batch_size must be at least 1, not {batch_size!r}")
        if len(decoders) not in (1, count):
            raise InputError(f"got {len(decoders)} decoders for {count} pictures: give one, or one for each")
        return min(batch_size or count, count)

    @property
    def model_hash(self) -> str | None:
        """Hash of the folder that the pipeline was loaded from (:func:`arsd.provenance.model_hash`), else ``None``."""
        from arsd.provenance import model_hash

        known: tuple[str, str | None] | None = getattr(self, "_known_hash", None)
        folder = str(self.config.get("_name_or_path") or "")
        if known is None or known[0] != folder:
            known = (folder, model_hash(folder) if folder and Path(folder).is_dir() else None)
            self._known_hash = known
        return known[1]

    def check_output(self, output_type: str, callback_inputs: Sequence[str]) -> None:
        """Raise InputError for an unknown output type or callback tensor."""
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise InputError(f"callback_on_step_end_tensor_inputs can hold {self._callback_tensor_inputs}, not {unknown}")

    def law_config(self, defaults: dict[str, Any] | None, given: dict[str, Any]) -> LawConfig:
        """The sampling options of a call: what was given, else what the model was published with."""
        known = {field.name for field in fields(LawConfig)}
        values = {k: v for k, v in (defaults or {}).items() if k in known}
        values.update({k: v for k, v in given.items() if v is not None})
        return LawConfig(**values)

    def arithmetic_probe(self, batch: int, pass_tokens: int, guided: bool) -> str:
        """How this machine computes passes of a shape, as 16 hex digits (:func:`arsd.shapes.probe`); remembered."""
        from arsd.shapes import probe

        key = (batch, pass_tokens, guided, str(self._execution_device), str(self.dtype))
        known: dict[Any, str] = self.__dict__.setdefault("_known_probes", {})
        if key not in known:
            target = self.target_maker(*self.null_condition(batch, guided))(pass_tokens, batch)
            known[key] = probe(target, self.make_grammar().num_tokens, pass_tokens)
        return known[key]

    def to_pil(self, tokens: Tensor) -> list[Image.Image]:
        """The pictures of token rows [B, N]."""
        with torch.inference_mode():
            pictures: list[Image.Image] = to_output(self.decode_pixels(tokens), "pil")
        return pictures

    def record(self, output: ARPipelineOutput, index: int) -> dict[str, Any]:
        """Everything that picture ``index`` of an output depends on, for :func:`arsd.provenance.save_png`."""
        from arsd.provenance import make_record

        return make_record(self, output, index)

    def verify(self, images: Any) -> Any:
        """Whether pictures are the plain AR samples of their seeds: see :mod:`arsd.verification`.

        Args:
            images: a path or a PIL image opened from a PNG that arsd wrote, or a list of them.

        Returns:
            A :class:`arsd.verification.Verification`, or a list of them.
        """
        from arsd.verification import verify_pictures

        if isinstance(images, Sequence) and not isinstance(images, str):
            return verify_pictures(self, images)
        return verify_pictures(self, [images])[0]

    def run_decoder(
        self,
        make_target: TargetMaker,
        decoders: list[DecodingStrategy],
        config: LawConfig,
        grammar: Grammar,
        keys: tuple[list[int], list[int]],
        row_length: int,
        batch: int,
        callback: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        progress: bool = True,
        callback_inputs: Sequence[str] = ("tokens",),
        draft: dict[str, Any] | None = None,
        on_picture: Callable[[int, Any], None] | None = None,
        **record: bool,
    ) -> Any:
        """Decode all pictures: build the parts, run the loop, advance the progress bar by committed tokens.

        Args:
            make_target: (pass_tokens, batch) -> target.
            decoders: one strategy, or one per picture.
            config: sampling options.
            grammar: what each position may hold.
            keys: seeds and image indices of the pictures.
            row_length: tokens per line of the picture.
            batch: rows of a pass.
            callback: diffusers' ``callback_on_step_end``; the step is the pass, the timestep the tokens done so far.
            progress: show the bar.
            callback_inputs: tensors that the callback gets (copies).
            draft: what drafters and rules may need of the model: ``codebook`` and ``draft_model`` of
                :class:`arsd.decoding.Setting`.
            on_picture: called with each picture that is finished, and its own result.
            record: ``log_probs`` and ``trace``.
        """
        count, device = len(keys[0]), self._execution_device
        noise = CounterNoise(*keys, device, batch)
        profile = find_profile(self.model_hash, device_kind(device), dtype_name(self))
        laws = Laws(config, grammar)
        call = (batch, grammar.num_tokens, row_length, grammar, noise, device, profile, laws)
        parts = build_parts(decoders, Setting(*call, **(draft or {})))
        target = make_target(parts.pass_tokens, batch)
        self._interrupt, self._num_timesteps, step, done = False, 0, 0, 0
        with self.progress_bar(total=grammar.num_tokens * count) if progress else _Silent() as bar:

            def on_commit(count: int, tokens: Tensor) -> bool:
                nonlocal step, done
                done += count
                bar.update(count)
                if callback is not None:
                    callback(self, step, done, {name: tokens.clone() for name in callback_inputs})
                step += 1
                self._num_timesteps = step
                return self.interrupt

            request = DecodeRequest(
                grammar.num_tokens, row_length, **record, on_commit=on_commit, pictures=count, on_picture=on_picture
            )
            result = decode(target, parts, laws, noise, request, batch)
            result.tokens = result.tokens.clone()  # out of inference mode: autograd may use it
            return result


class _Silent:
    """Stands in for a progress bar."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Nothing to show."""


def to_output(pixels: Tensor, output_type: str) -> Any:
    """Pictures [B, 3, H, W] in [-1, 1] as ``pil``, ``np`` ([B, H, W, 3] in [0, 1]) or ``pt`` ([B, 3, H, W] in [0, 1])."""
    unit = (pixels.float().clamp(-1, 1) + 1) / 2
    if output_type == "pt":
        return unit
    array = unit.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(picture) for picture in np.round(array * 255).astype(np.uint8)]
