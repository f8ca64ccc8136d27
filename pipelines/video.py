"""The base of all pipelines for clips: the call from inputs to frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arsd.decoding.types import OnRound
from arsd.devices import in_use
from arsd.errors import InputError
from arsd.models.volume import Volume
from arsd.pipelines.checks import Decoders
from arsd.pipelines.core import ARPipeline, DraftMaker, TargetMaker
from arsd.pipelines.outputs import ARVideoOutput, Conditions, Generators
from arsd.pipelines.prefix import to_pixels

__all__ = ["ARVideoPipeline", "DraftMaker", "TargetMaker"]


class ARVideoPipeline(ARPipeline):
    """Base of the video pipelines; a subclass turns inputs into conditions and a target. See :class:`ARPipeline`."""

    output_class = ARVideoOutput
    _recorded_size = ("height", "width", "num_frames")

    # ------------------------------------------------------------------------------------------- what a family provides

    def make_raster(self, height: int | None = None, width: int | None = None, num_frames: int | None = None) -> Volume:
        """How a clip of this size (pixels and frames; the model's own when ``None``) lies in its tokens.

        Raises:
            InputError: for a size that the model cannot make.
        """
        raise NotImplementedError

    def check_inputs(self, num_videos_per_prompt: int, frames: Tensor | None = None, **inputs: Any) -> None:
        """Raise InputError for anything that the model cannot work with; ``frames`` are codes [n, t, h, w] by now."""
        raise NotImplementedError

    def encode_inputs(
        self,
        *,
        num_videos_per_prompt: int = 1,
        guided: bool = True,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        given: Tensor | None = None,
        **inputs: Any,
    ) -> Conditions:
        """Inputs, as :meth:`__call__` takes them, to the conditions of every clip; ``given`` [M, F] go along."""
        raise NotImplementedError

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Frames [n, T, 3, H, W] in [-1, 1] to codes [n, t, h, w]: those of the tokenizer, clip by clip.

        Raises:
            InputError: for a number of frames that the tokenizer does not take.
        """
        if not hasattr(self.vq, "encode_video"):
            return torch.stack([torch.cat([self.vq.encode(frame[None]) for frame in clip]) for clip in frames])
        found: list[Tensor] = [self.vq.encode_video(clip[None].transpose(1, 2)) for clip in frames]
        return torch.cat(found)

    def decode_frames(self, codes: Tensor) -> Tensor:
        """Codes [n, t, h, w] to frames [n, T, 3, H, W] in [-1, 1], clip by clip."""
        if not hasattr(self.vq, "decode_video"):
            return torch.stack([torch.cat([self.vq.decode(frame[None]) for frame in clip]) for clip in codes])
        found: list[Tensor] = [self.vq.decode_video(clip[None]).transpose(1, 2) for clip in codes]
        return torch.cat(found)

    def guidance_of(self, guidance_scale: float | None, inputs: dict[str, Any]) -> float | None:
        """The guidance scale of a call with these inputs, ``None`` for the model's own.

        Raises:
            InputError: for one where there is nothing to guide with.
        """
        return guidance_scale

    @property
    def frame_rate(self) -> float:
        """Frames per second that clips are meant to be shown at."""
        return float(self.transformer.config["frame_rate"])

    # ------------------------------------------------------------------------------------------------ the same everywhere

    @torch.no_grad()
    def decode_pixels(self, tokens: Tensor, raster: Volume | None = None) -> Tensor:
        """Tokens [B, N] to clips [B, T, 3, H, W] in [-1, 1]; one by one, so that a clip never depends on the others."""
        with in_use(self.vq):
            found = (raster or self.make_raster()).to_codes(tokens).to(self.vq.device)
            return self.decode_frames(found)

    @torch.no_grad()
    def encode_clips(self, frames: Any, raster: Volume) -> Tensor:
        """Clips to the codes [n, t, h, w] that a clip of this layout can begin with.

        Args:
            frames: one clip or several, see :meth:`__call__`.
            raster: of the clips that are made.

        Raises:
            InputError: for what is no clip, or is as long as what is to be made.
        """
        if is_codes(frames):
            return _codes(frames, raster)
        factor = self.vq.downsample_factor
        size = raster.rows * factor, raster.columns * factor, factor
        pixels = [to_pixels(clip, *size) for clip in clips_of(frames)]
        if len({len(clip) for clip in pixels}) > 1:
            raise InputError("the clips in frames have different lengths: give as many frames of each")
        with in_use(self.vq):
            found = self.encode_frames(torch.stack(pixels).to(self.vq.device, self.vq.dtype))
        if found.shape[1] >= raster.frames:
            made = f"{found.shape[1]} of {raster.frames} latent frames"
            raise InputError(f"frames fill {made}: give fewer, so that something is left to be made")
        return found

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        frames: Any = None,
        actions: Any = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        decoder: Decoders = None,
        batch_size: int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        log_probs: bool = False,
        trace: bool = False,
        progress: bool = True,
        on_picture: Callable[[int, ARVideoOutput], None] | None = None,
        on_round: OnRound | None = None,
    ) -> Any:
        """Make clips. The arguments are the same for all families; what a model cannot work with is refused.

        Args:
            prompt: one prompt or several (text models).
            class_labels: one class id or several (class models).
            frames: what a clip begins with: a PIL picture, a list of them, an array [T, H, W, 3] or a tensor [T, 3, H, W]
                with values in [0, 1] or bytes. One for all prompts, or one for each: a list of such clips, or one dimension
                more. Whole numbers [n, t, h, w] are codes. What is given is kept, token for token.
            actions: what happens in each frame (models of a world that can be acted on).
            num_frames: frames of a clip, those that are given included; the model's own number or ``None``.
            height: pixels; the model's own size or ``None``.
            width: likewise.
            guidance_scale: s of ``u + s (c - u)``; ``None`` takes the model's published value, 1 turns guidance off.
            guidance_interval: guide the first tokens only, see :class:`arsd.decoding.LawConfig`.
            temperature: divides the logits; 0 is greedy.
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: keep the smallest set of tokens with this mass.
            num_videos_per_prompt: clips per prompt; they come prompt by prompt.
            generator: source of the noise seed: one, or one per clip; see :func:`arsd.pipelines.outputs.noise_keys`.
            decoder: strategy of this call, an object or text such as ``"sjd:window=32,init=previous-frame"``; ``None``: the
                pipeline's own. A list gives each clip its own; they share every pass.
            batch_size: rows decoded at a time; a clip that waits takes the row of one that is finished. ``None``: all.
            prompt_embeds: caption features [B, T, caption_dim], left-padded, instead of a prompt.
            prompt_attention_mask: [B, T], their mask.
            output_type: ``pil``, ``np``, ``pt`` or ``latent`` (the codes [B, t, h, w]).
            return_dict: return :class:`ARVideoOutput` rather than a tuple ``(frames,)``.
            callback_on_step_end: called after each pass with (pipe, pass, tokens so far, {"tokens": [B, N]}).
            callback_on_step_end_tensor_inputs: tensors that the callback gets.
            log_probs: also return log-probabilities and entropies.
            trace: also return every pass.
            progress: show a progress bar.
            on_picture: called with the number of each clip as it is finished, and with an output of this clip alone.
            on_round: called (untimed) with the :class:`arsd.decoding.Round` of each pass; ``True`` stops this call.

        Returns:
            :class:`ARVideoOutput`: clips, tokens and figures.

        Raises:
            InputError: for inputs that the model cannot work with.
            StrategyError: for a decoder that is none.
            NonFiniteLogitsError: when the model breaks.
        """
        # 1. Check
        self.check_output(output_type, callback_on_step_end_tensor_inputs)
        strategies, raster = self.check_decoder(decoder), self.make_raster(height, width, num_frames)
        named = {"prompt": prompt, "class_labels": class_labels, "actions": actions}
        named |= {"prompt_embeds": prompt_embeds, "prompt_attention_mask": prompt_attention_mask}
        inputs = {name: value for name, value in named.items() if value is not None}
        given = {} if frames is None else {"frames": self.encode_clips(frames, raster)}
        self.check_inputs(num_videos_per_prompt, **given, **inputs)
        guidance_scale = self.guidance_of(guidance_scale, inputs)
        options = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "temperature": temperature}
        options |= {"top_k": top_k, "top_p": top_p}
        config = self.law_config(options)
        self._guidance_scale = config.guidance_scale

        # 2. Condition
        with in_use(self.vq):
            codebook = self.codebook
        inputs |= {"num_videos_per_prompt": num_videos_per_prompt, "guided": config.guidance_scale != 1}
        tokens = raster.from_codes(given["frames"]) if given else None
        size: dict[str, Any] = {"height": height, "width": width, "num_frames": num_frames}
        encode = partial(self.encode_inputs, **inputs, **size, given=tokens)
        how: dict[str, Any] = {"progress": progress, "log_probs": log_probs, "trace": trace, "on_round": on_round}
        how |= {"callback": callback_on_step_end, "callback_inputs": callback_on_step_end_tensor_inputs}

        # 3. Decode and turn into clips
        where = (generator, batch_size, output_type, codebook, on_picture)
        made = self.produce(encode, strategies, config, *where, **how)
        return made if return_dict else (made.frames,)


def clips_of(frames: Any) -> list[Any]:
    """What :meth:`ARVideoPipeline.__call__` takes as ``frames``, as a list of clips: lists of PIL pictures, or arrays.

    Raises:
        InputError: for anything else.
    """
    if isinstance(frames, Image.Image):
        return [[frames]]
    if isinstance(frames, (np.ndarray, Tensor)):
        if frames.ndim not in (3, 4, 5) or not all(frames.shape):
            raise InputError(f"frames must have 4 dimensions (5 for several clips), not the shape {tuple(frames.shape)}")
        if not _is_pixels(frames):
            raise InputError(f"frames must be bytes or values in [0, 1], not {frames.dtype} (codes: a tensor of int64)")
        return list(frames) if frames.ndim == 5 else [frames[None] if frames.ndim == 3 else frames]
    if not isinstance(frames, (list, tuple)) or not len(frames):
        raise InputError(f"frames must be pictures, an array or a tensor, not {type(frames).__name__}")
    first = frames[0]
    if isinstance(first, (list, tuple)) or (isinstance(first, (np.ndarray, Tensor)) and first.ndim == 4):
        return [one for clip in frames for one in clips_of(clip)]
    return [list(frames)]


def is_codes(frames: Any) -> bool:
    """Whether these are codes rather than pixels: a tensor of whole numbers that are no bytes."""
    return isinstance(frames, Tensor) and not _is_pixels(frames)


def _is_pixels(frames: np.ndarray | Tensor) -> bool:
    if isinstance(frames, Tensor):
        return frames.is_floating_point() or frames.dtype == torch.uint8
    return frames.dtype.kind == "f" or frames.dtype == np.uint8


def _codes(codes: Tensor, raster: Volume) -> Tensor:
    size = (raster.rows, raster.columns)
    if codes.ndim != 4 or not len(codes) or not 0 < codes.shape[1] < raster.frames or tuple(codes.shape[2:]) != size:
        wanted = f"[n, 1..{raster.frames - 1}, {raster.rows}, {raster.columns}]"
        raise InputError(f"frames holds codes of shape {tuple(codes.shape)}: give {wanted}, or pixels in [0, 1]")
    if int(codes.min()) < 0 or int(codes.max()) >= raster.codes:
        raise InputError(f"frames holds codes outside 0..{raster.codes - 1}")
    return codes.long()
