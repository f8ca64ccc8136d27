"""The base of all image pipelines: the call from inputs to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arsd.decoding.types import OnRound
from arsd.devices import in_use
from arsd.models.raster import Raster
from arsd.pipelines.checks import Decoders
from arsd.pipelines.core import ARPipeline, DraftMaker, TargetMaker
from arsd.pipelines.outputs import ARPipelineOutput, Conditions, Generators
from arsd.pipelines.prefix import encode_beginnings, encode_pictures

__all__ = ["ARImagePipeline", "DraftMaker", "TargetMaker"]


class ARImagePipeline(ARPipeline):
    """Base of the image pipelines; a subclass turns inputs into conditions and a target. See :class:`ARPipeline`."""

    output_class = ARPipelineOutput

    # ------------------------------------------------------------------------------------------- what a family provides

    def make_raster(self, height: int | None = None, width: int | None = None) -> Raster:
        """How a picture of this size (pixels; the model's own when ``None``) lies in its tokens.

        Raises:
            InputError: for a size that the model cannot make.
        """
        raise NotImplementedError

    def check_inputs(self, height: int | None, width: int | None, num_images_per_prompt: int, **inputs: Any) -> None:
        """Raise InputError for anything that the model cannot work with."""
        raise NotImplementedError

    def encode_inputs(
        self,
        *,
        num_images_per_prompt: int = 1,
        guided: bool = True,
        height: int | None = None,
        width: int | None = None,
        given: Tensor | None = None,
        **inputs: Any,
    ) -> Conditions:
        """Inputs, as :meth:`__call__` takes them, to the conditions of every picture; ``given`` [M, F] go along."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ the same everywhere

    @torch.no_grad()
    def decode_pixels(self, tokens: Tensor, raster: Raster | None = None) -> Tensor:
        """Tokens [B, N] to pictures [B, 3, H, W] in [-1, 1]; one by one, so that a picture never depends on the others."""
        with in_use(self.vq):
            found = (raster or self.make_raster()).to_codes(tokens).to(self.vq.device)
            return torch.cat([self.vq.decode(codes[None]) for codes in found])

    @torch.no_grad()
    def encode_image(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Pictures to tokens [n, N], marks included: what :meth:`decode_pixels` undoes as well as the tokenizer can.

        Args:
            image: one or several, as PIL pictures, arrays or tensors in [0, 1].
            height: pixels that they are scaled and cropped to; the model's own size or ``None``.
            width: likewise.

        Raises:
            InputError: for what is no picture, or a size that the model does not have.
        """
        with in_use(self.vq):
            return encode_pictures(self.vq, image, self.make_raster(height, width))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
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
        on_picture: Callable[[int, ARPipelineOutput], None] | None = None,
        image: Any = None,
        strength: float = 0.5,
        prompt_images: Any = None,
        image_guidance_scale: float | None = None,
        on_round: OnRound | None = None,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> Any:
        """Make pictures. The arguments are the same for all families; what a model cannot work with is refused.

        Args:
            prompt: one prompt or several (text models).
            class_labels: one class id or several (class models).
            height: pixels; the model's own size or ``None``, or one of several sizes where a model has them.
            width: likewise.
            guidance_scale: s of ``u + s (c - u)``; ``None`` takes the model's published value, 1 turns guidance off.
            guidance_interval: guide the first tokens only (LlamaGen's ``cfg_interval``, see :class:`LawConfig`).
            temperature: divides the logits; 0 is greedy.
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: keep the smallest set of tokens with this mass.
            num_images_per_prompt: pictures per prompt; they come prompt by prompt.
            generator: source of the noise seed: one, or one per picture; see :func:`arsd.pipelines.outputs.noise_keys`.
            decoder: strategy of this call, an object or text such as ``"sjd:window=32"``; ``None``: the pipeline's own. A
                list gives each picture its own; they share every pass.
            batch_size: rows decoded at a time; a picture that waits takes the row of one that is finished. ``None``: all.
            prompt_embeds: caption features [B, T, caption_dim], left-padded, instead of a prompt (LlamaGen).
            prompt_attention_mask: [B, T], their mask.
            output_type: ``pil``, ``np``, ``pt`` or ``latent`` (the codes [B, h, w]).
            return_dict: return :class:`ARPipelineOutput` rather than a tuple ``(images,)``.
            callback_on_step_end: called after each pass with (pipe, pass, tokens so far, {"tokens": [B, N]}).
            callback_on_step_end_tensor_inputs: tensors that the callback gets.
            log_probs: also return log-probabilities and entropies.
            trace: also return every pass.
            progress: show a progress bar.
            on_picture: called with the number of each picture as it is finished, and with an output of this picture alone,
                while others of a queue are still being decoded. Its stats have passes, but no seconds.
            image: a picture that is continued, or one for each prompt: its upper part is kept, token for token. Codes
                [n, r, w] (whole numbers) are r rows that are kept.
            strength: which share of ``image`` is made anew, from the bottom up: 0.5 keeps the upper half.
            prompt_images: pictures that every prompt speaks of (Anole).
            image_guidance_scale: r of ``u + r (i - u) + s (c - i)``, where there are ``prompt_images``.
            on_round: called (untimed) with the :class:`arsd.decoding.Round` of each pass; ``True`` stops this call
                (``interrupt`` all those of the pipeline). What was decoded so far is returned, with 0 for the tokens that
                are missing; ``stats.tokens`` says how many each picture has.
            negative_prompt: words of the unconditional stream instead of the published ones (Emu3, SimpleAR), for all or
                for each prompt.

        Returns:
            :class:`ARPipelineOutput`: pictures, tokens and figures.

        Raises:
            InputError: for inputs that the model cannot work with.
            StrategyError: for a decoder that is none.
            NonFiniteLogitsError: when the model breaks.
        """
        # 1. Check
        named = {"prompt": prompt, "class_labels": class_labels, "prompt_images": prompt_images}
        named |= {"negative_prompt": negative_prompt}
        named |= {"prompt_embeds": prompt_embeds, "prompt_attention_mask": prompt_attention_mask}
        inputs = {name: value for name, value in named.items() if value is not None}
        self.check_inputs(height, width, num_images_per_prompt, **inputs)
        self.check_output(output_type, callback_on_step_end_tensor_inputs)
        strategies, raster = self.check_decoder(decoder), self.make_raster(height, width)
        options = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "temperature": temperature}
        options |= {"top_k": top_k, "top_p": top_p, "image_guidance_scale": image_guidance_scale}
        config = self.law_config(options)
        self._guidance_scale = config.guidance_scale

        # 2. Condition
        given = None
        with in_use(self.vq):
            codebook = self.codebook
            if image is not None:
                count = _count(prompt if prompt is not None else class_labels if class_labels is not None else prompt_embeds)
                given = encode_beginnings(self.vq, image, strength, raster, count, num_images_per_prompt)
        guided = config.guidance_scale != 1 or (prompt_images is not None and config.image_guidance_scale != 1)
        inputs |= {"num_images_per_prompt": num_images_per_prompt, "guided": guided}
        encode = partial(self.encode_inputs, **inputs, height=height, width=width, given=given)
        how: dict[str, Any] = {"progress": progress, "log_probs": log_probs, "trace": trace, "on_round": on_round}
        how |= {"callback": callback_on_step_end, "callback_inputs": callback_on_step_end_tensor_inputs}

        # 3. Decode and turn into pictures
        where = (generator, batch_size, output_type, codebook, on_picture)
        made = self.produce(encode, strategies, config, *where, **how)
        return made if return_dict else (made.images,)


def _count(given: Any) -> int:
    """How many inputs there are."""
    return 1 if isinstance(given, (str, int)) or (isinstance(given, Tensor) and given.ndim == 0) else len(given)
