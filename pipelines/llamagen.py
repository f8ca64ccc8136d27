"""LlamaGen: class-conditional and text-to-image generation (arXiv 2406.06525)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import SJD, DecodingStrategy, Grammar
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.types import DraftModel
from arsd.errors import InputError
from arsd.models.captions import encode_captions, unknown_words
from arsd.models.eagle import EagleDrafter
from arsd.models.eagle_draft import EagleDraftModel
from arsd.models.llamagen import LlamaGenTransformer
from arsd.models.target import DecoderTarget
from arsd.pipelines.base import (
    ARImagePipeline,
    ARPipelineOutput,
    Decoders,
    Generators,
    TargetMaker,
    noise_keys,
    to_output,
)
from arsd.tokenizers.vq import VQTokenizer


class LlamaGenPipeline(ARImagePipeline):
    """Pictures from class labels or prompts, token by token or many tokens per pass.

    Args:
        transformer: the autoregressive model.
        vq: the image tokenizer.
        decoder: decoding strategy; :class:`arsd.SJD` with the ``gumbel`` coupling when none is given.
        tokenizer: caption tokenizer (text models only).
        text_encoder: T5 encoder (text models only).
        drafter: draft model for the strategies that want one: an :class:`arsd.EagleDrafter`, or a smaller
            :class:`LlamaGenTransformer` of the same codes and conditions.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vq"
    _optional_components = ["decoder", "tokenizer", "text_encoder", "drafter"]

    def __init__(
        self,
        transformer: LlamaGenTransformer,
        vq: VQTokenizer,
        decoder: DecodingStrategy | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        drafter: EagleDrafter | LlamaGenTransformer | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vq=vq,
            decoder=decoder if decoder is not None else SJD(),
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            drafter=drafter,
        )

    @property
    def image_size(self) -> int:
        """Pixels along one side."""
        return int(self.transformer.config["grid"]) * self.vq.downsample_factor

    def check_inputs(
        self,
        prompt: str | Sequence[str] | None,
        class_labels: int | Sequence[int] | Tensor | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        num_images_per_prompt: int,
        height: int | None,
        width: int | None,
    ) -> None:
        """Raise InputError for anything that the model cannot work with."""
        given = [x is not None for x in (prompt, class_labels, prompt_embeds)]
        if sum(given) != 1:
            raise InputError("give exactly one of prompt, class_labels and prompt_embeds")
        wants_text = self.transformer.config["condition"] == "text"
        if wants_text != (class_labels is None):
            raise InputError(
                "this model is text-conditional: give a prompt" if wants_text else "this model needs class_labels"
            )
        if prompt is not None:
            if not isinstance(prompt, (str, Sequence)):
                raise InputError(f"prompt must be text or a list of texts, not {prompt!r}")
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
                raise InputError("the prompt is empty")
            if self.tokenizer is None or self.text_encoder is None:
                raise InputError("this pipeline has no text encoder: load one, or give prompt_embeds")
        if prompt_embeds is not None and prompt_attention_mask is None:
            raise InputError("prompt_embeds need their prompt_attention_mask")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt must be at least 1, not {num_images_per_prompt}")
        if any(side not in (None, self.image_size) for side in (height, width)):
            raise InputError(f"this model makes pictures of {self.image_size} x {self.image_size} pixels only")

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Left-padded caption features [B, T, caption_dim] and mask [B, T]; warns of words the tokenizer does not know.

        Each prompt is encoded by itself: its features must not depend on the others, not even in the last bit.

        Raises:
            InputError: when the pipeline has no text encoder.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise InputError("this pipeline has no text encoder: load one, or give prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        strange = sorted({word for text in prompts for word in unknown_words(self.tokenizer, text)})
        if strange:
            warnings.warn(f"the text encoder does not know: {', '.join(strange)}", stacklevel=4)
        length = self.transformer.config["condition_tokens"]
        encoded = [encode_captions(self.tokenizer, self.text_encoder, [text], length) for text in prompts]
        return torch.cat([features for features, _ in encoded]), torch.cat([mask for _, mask in encoded])

    def encode_inputs(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        num_images_per_prompt: int = 1,
        guided: bool = True,
        model: LlamaGenTransformer | None = None,
    ) -> tuple[Tensor, Tensor | None, list[dict[str, Any]]]:
        """Inputs to condition [S, B, P, D], padding [S, B, P], and what each picture is made of.

        A prompt is encoded unless its ``prompt_embeds`` are given as well; ``model`` (the transformer) embeds them.

        Raises:
            InputError: for labels that are none.
        """
        model = model or self.transformer
        device, dtype, mask = self._execution_device, model.dtype, None
        if class_labels is not None:
            labels = _labels(class_labels, device)
            rows, inputs = model.embed_classes(labels), [{"class_label": n} for n in labels.tolist()]
        else:
            inputs = [{"prompt": text} for text in ([prompt] if isinstance(prompt, str) else prompt or [])]
            if prompt is not None and prompt_embeds is None:
                prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
            assert prompt_embeds is not None and prompt_attention_mask is not None
            embeds, mask = prompt_embeds.to(device, dtype), prompt_attention_mask.to(device)
            if embeds.shape[:1] != mask.shape[:1] or not len(embeds):
                raise InputError("prompt_embeds and prompt_attention_mask must have the same number of rows, at least one")
            pairs = zip(embeds.split(1), mask.split(1), strict=True)  # one by one, as encode_prompt does
            rows = torch.cat([model.embed_captions(*pair) for pair in pairs])
            mask = mask.repeat_interleave(num_images_per_prompt, dim=0)
            inputs = inputs or [{}] * len(rows)
        rows = rows.repeat_interleave(num_images_per_prompt, dim=0)
        condition, padding = self._condition(model, rows, mask, 2 if guided else 1)
        return condition, padding, [one for one in inputs for _ in range(num_images_per_prompt)]

    @torch.no_grad()
    def null_condition(self, batch: int, guided: bool) -> tuple[Tensor, Tensor | None]:
        """A condition that needs no input, for measurements."""
        if self.transformer.config["condition"] == "text":
            rows = self.transformer.embed_null_caption(batch)
            return self._condition(
                self.transformer, rows, torch.ones(rows.shape[:2], device=rows.device), 2 if guided else 1
            )
        labels = torch.arange(batch, device=self._execution_device) % self.transformer.config["num_classes"]
        return self._condition(self.transformer, self.transformer.embed_classes(labels), None, 2 if guided else 1)

    def target_maker(
        self, condition: Tensor, padding: Tensor | None, model: LlamaGenTransformer | None = None
    ) -> TargetMaker:
        """(pass_tokens, batch) -> target of these conditions; ``model`` is the transformer unless given."""
        lm, total = (model or self.transformer).lm, self.transformer.num_tokens

        def make_target(pass_tokens: int, batch: int) -> DecoderTarget:
            embed = lm.model.embed_tokens
            return DecoderTarget(lm.model, lm.lm_head, embed, condition, total, pass_tokens, padding, batch)

        return make_target

    def make_grammar(self) -> Grammar:
        """Every code is allowed everywhere."""
        return Grammar(
            self.transformer.num_tokens, int(self.transformer.config["vocab_size"]), device=self._execution_device
        )

    def decode_pixels(self, tokens: Tensor) -> Tensor:
        """Codes [B, N] to pictures [B, 3, H, W] in [-1, 1]; one by one, so that a picture never depends on the others."""
        grid = int(self.transformer.config["grid"])
        return torch.cat([self.vq.decode(codes) for codes in tokens.view(-1, 1, grid, grid)])

    def _condition(
        self, model: LlamaGenTransformer, rows: Tensor, mask: Tensor | None, streams: int
    ) -> tuple[Tensor, Tensor | None]:
        """Condition [S, B, P, D] and padding [S, B, P]; the null stream reuses the conditional padding, as upstream does."""
        if streams == 1:
            return rows[None], None if mask is None else mask[None] == 0
        if mask is not None:
            null = model.embed_null_caption(len(rows))
            return torch.stack([rows, null]), (mask == 0).expand(2, -1, -1)
        labels = torch.full((len(rows),), model.config["num_classes"], device=rows.device)
        return torch.stack([rows, model.embed_classes(labels)]), None

    def _draft_maker(
        self, condition: Tensor, padding: Tensor | None, batch: int, inputs: Callable[..., tuple[Tensor, Tensor | None, Any]]
    ) -> Callable[[int], DraftModel] | None:
        """What makes the draft model of a call for a window; ``inputs(model=...)`` gives the conditions of another model."""
        drafter, lm, total = self.drafter, self.transformer.lm, self.transformer.num_tokens

        def make_eagle(window: int) -> DraftModel:
            parts = (lm.model.rotary_emb, lm.lm_head, lm.model.embed_tokens)
            return EagleDraftModel(drafter, *parts, condition, total, window, padding, batch)

        def make_small(window: int) -> DraftModel:
            if drafter.num_tokens != total:
                raise InputError(f"the drafter draws {drafter.num_tokens} tokens, the model {total}: they must be the same")
            maker = self.target_maker(*inputs(model=drafter)[:2], model=drafter)
            return SmallARDrafter(maker(max(window, 2), batch), window)

        if drafter is None:
            return None
        return make_eagle if isinstance(drafter, EagleDrafter) else make_small

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
    ) -> ARPipelineOutput | tuple[Any, ...]:
        """Make pictures.

        Args:
            prompt: one prompt or several (text models).
            class_labels: one class id or several (class models).
            height: pixels; the model's own size or ``None``.
            width: likewise.
            guidance_scale: s of ``u + s (c - u)``; ``None`` takes the model's published value, 1 turns guidance off.
            guidance_interval: guide positions 0..k only (LlamaGen's ``cfg_interval``).
            temperature: divides the logits; 0 is greedy.
            top_k: keep the k most likely tokens; 0 keeps all.
            top_p: keep the smallest set of tokens with this mass.
            num_images_per_prompt: pictures per prompt; they come prompt by prompt.
            generator: source of the noise seed: one, or one per picture; see :func:`arsd.pipelines.base.noise_keys`.
            decoder: strategy of this call, an object or text such as ``"sjd:window=32"``; ``None``: the pipeline's own. A
                list gives each picture its own; they share every pass.
            batch_size: rows decoded at a time; a picture that waits takes the row of one that is finished. ``None``: all.
            prompt_embeds: caption features [B, T, caption_dim], left-padded, instead of a prompt.
            prompt_attention_mask: [B, T], their mask.
            output_type: ``pil``, ``np``, ``pt`` or ``latent`` (the token grid [B, h, w]).
            return_dict: return :class:`ARPipelineOutput` rather than a tuple ``(images,)``.
            callback_on_step_end: called after each pass with (pipe, pass, tokens so far, {"tokens": [B, N]}).
            callback_on_step_end_tensor_inputs: tensors that the callback gets.
            log_probs: also return log-probabilities and entropies.
            trace: also return every pass.
            progress: show a progress bar.
            on_picture: called with the number of each picture as it is finished, and with an output of this picture alone,
                while others of a queue are still being decoded. Its stats have passes, but no seconds.

        Returns:
            Pictures, tokens and figures.

        Raises:
            InputError: for inputs that the model cannot work with.
            StrategyError: for a decoder that is none.
            NonFiniteLogitsError: when the model breaks.
        """
        # 1. Check
        self.check_inputs(prompt, class_labels, prompt_embeds, prompt_attention_mask, num_images_per_prompt, height, width)
        self.check_output(output_type, callback_on_step_end_tensor_inputs)
        strategies = self.check_decoder(decoder)
        options = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval, "temperature": temperature}
        config = self.law_config(self.transformer.config["sampling"], {**options, "top_k": top_k, "top_p": top_p})
        self._guidance_scale = config.guidance_scale

        # 2. Condition
        if prompt is not None:
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
        given = (prompt, class_labels, prompt_embeds, prompt_attention_mask, num_images_per_prompt)
        encode = partial(self.encode_inputs, *given, config.guidance_scale != 1)
        condition, padding, inputs = encode()
        batch = self.check_rows(strategies, len(inputs), batch_size)
        draft_model = self._draft_maker(condition, padding, batch, encode)
        keys = noise_keys(generator, len(inputs))

        # 3. Decode and turn into pictures
        grid = int(self.transformer.config["grid"])
        decoders = strategies if len(strategies) > 1 else strategies * len(inputs)
        described = list(zip(*keys, decoders, inputs, strict=True))

        def output(result: Any, chosen: Sequence[int]) -> ARPipelineOutput:
            codes = result.tokens.view(-1, grid, grid)
            images = codes if output_type == "latent" else to_output(self.decode_pixels(result.tokens), output_type)
            seeds, indices, made_by, made_of = (list(column) for column in zip(*(described[i] for i in chosen), strict=True))
            recorded = (result.log_probs, result.entropies, result.trace)
            return ARPipelineOutput(images, result.tokens, result.stats, seeds, indices, config, made_by, made_of, *recorded)

        def finished(picture: int, result: Any) -> None:
            assert on_picture is not None
            on_picture(picture, output(result, [picture]))

        result = self.run_decoder(
            self.target_maker(condition, padding),
            strategies,
            config,
            self.make_grammar(),
            keys,
            grid,
            batch,
            callback_on_step_end,
            progress,
            callback_on_step_end_tensor_inputs,
            {"codebook": self.vq.codebook, "draft_model": draft_model},
            on_picture=None if on_picture is None else finished,
            log_probs=log_probs,
            trace=trace,
        )
        result_output = output(result, range(len(inputs)))
        self.maybe_free_model_hooks()
        return result_output if return_dict else (result_output.images,)


def _labels(given: Any, device: torch.device) -> Tensor:
    try:
        labels = torch.as_tensor(given, device=device).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"class_labels must be one class id or several, not {given!r}") from None
    if not len(labels) or labels.is_floating_point():
        raise InputError(f"class_labels must be one class id or several, not {given!r}")
    return labels
