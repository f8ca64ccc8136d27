"""What every image pipeline shares: the call from inputs to pictures, seeds, laws, decoding, progress, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from arsd.decoding import (
    CounterNoise,
    DecodeRequest,
    DecodingStrategy,
    Grammar,
    LawConfig,
    Laws,
    Setting,
    build_parts,
    decode,
)
from arsd.decoding.types import DraftModel, OnRound, Round
from arsd.devices import bring_back, device_kind, dtype_name, in_use
from arsd.models.raster import Raster
from arsd.pipelines.checks import Decoders, check_output, rows_of, strategies_of
from arsd.pipelines.outputs import ARPipelineOutput, Conditions, Generators, noise_keys, of_unit
from arsd.pipelines.prefix import encode_beginnings, encode_pictures
from arsd.pipelines.provable import Provable
from arsd.profile import find_profile

TargetMaker = Callable[[int, int], Any]  # (pass_tokens, batch) -> target
DraftMaker = Callable[[int], DraftModel]  # window -> the draft model of a call


class ARImagePipeline(Provable, DiffusionPipeline):
    """Base of the image pipelines. A subclass turns inputs into conditions and a target; nothing here knows a model.

    Components: ``transformer``, the model; ``vq``, the image tokenizer; ``decoder``, a :class:`arsd.DecodingStrategy`, which
    can be swapped like a scheduler; ``drafter``, a draft model or ``None``.
    """

    _callback_tensor_inputs = ["tokens"]
    _exclude_from_cpu_offload = ["drafter"]  # small, and used in every pass
    decoder: DecodingStrategy
    transformer: Any
    vq: Any
    drafter: Any

    # ------------------------------------------------------------------------------------------- what a family provides

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling options that the model was published with (fields of :class:`arsd.decoding.LawConfig`)."""
        raise NotImplementedError

    @property
    def takes_classes(self) -> bool:
        """Whether pictures are made from class labels rather than prompts."""
        return False

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

    def null_conditions(self, batch: int, guided: bool) -> Conditions:
        """Conditions that need no input, for measurements."""
        raise NotImplementedError

    def target_maker(self, conditions: Conditions, model: Any = None) -> TargetMaker:
        """(pass_tokens, batch) -> target of these conditions; ``model`` is the transformer unless given."""
        raise NotImplementedError

    def draft_maker(self, conditions: Conditions, batch: int, encode: Callable[..., Conditions]) -> DraftMaker | None:
        """What makes the draft model of a call; ``encode(model=...)`` gives the conditions of another model."""
        return None

    @property
    def codebook(self) -> Tensor:
        """The vectors [V, C] of all ids."""
        vectors: Tensor = self.vq.codebook
        return vectors

    # ------------------------------------------------------------------------------------------------ the same everywhere

    def make_grammar(self, raster: Raster | None = None) -> Grammar:
        """What each position may hold, for pictures of this layout (the model's own when ``None``)."""
        return (raster or self.make_raster()).grammar(self._execution_device)

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

    def check_output(self, output_type: str, callback_inputs: Sequence[str]) -> None:
        """Raise InputError for an output that this pipeline does not have."""
        check_output(output_type, callback_inputs, self._callback_tensor_inputs)

    def check_decoder(self, decoder: Decoders) -> list[DecodingStrategy]:
        """The strategies of a call: the argument (one, or one per picture), else the component.

        Raises:
            StrategyError: when it is no strategy.
        """
        return strategies_of(decoder, self.decoder)

    def law_config(self, given: dict[str, Any]) -> LawConfig:
        """The sampling options of a call: what was given, else what the model was published with."""
        known = {field.name for field in fields(LawConfig)}
        values = {k: v for k, v in self.sampling.items() if k in known}
        values.update({k: v for k, v in given.items() if v is not None})
        return LawConfig(**values)

    def run_decoder(
        self,
        conditions: Conditions,
        decoders: list[DecodingStrategy],
        config: LawConfig,
        keys: tuple[list[int], list[int]],
        batch: int,
        callback: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        progress: bool = True,
        callback_inputs: Sequence[str] = ("tokens",),
        codebook: Tensor | None = None,
        draft_model: DraftMaker | None = None,
        on_picture: Callable[[int, Any], None] | None = None,
        log_probs: bool = False,
        trace: bool = False,
        on_round: OnRound | None = None,
    ) -> Any:
        """Decode all pictures: build the parts, run the loop, advance the progress bar by committed tokens.

        Args:
            conditions: of all pictures.
            decoders: one strategy, or one per picture.
            config: sampling options.
            keys: seeds and image indices of the pictures.
            batch: rows of a pass.
            callback: diffusers' ``callback_on_step_end``; the step is the pass, the timestep the tokens done so far.
            progress: show the bar.
            callback_inputs: tensors that the callback gets (copies).
            codebook: vectors [V, C] of all ids, for the rules that compare them.
            draft_model: makes the draft model of the call for a window.
            on_picture: called with each picture that is finished, and its own result.
            log_probs: also return log-probabilities and entropies.
            trace: also return every pass.
            on_round: hears of every pass, and stops the call with ``True``.
        """
        count, device, raster, given = len(keys[0]), self._execution_device, conditions.raster, conditions.given
        grammar = self.make_grammar(raster)
        noise = CounterNoise(*keys, device, batch)
        profile = find_profile(self.model_hash, device_kind(device), dtype_name(self))
        laws = Laws(config, grammar)
        call = (batch, grammar.num_tokens, raster.row_length, grammar, noise, device, profile, laws)
        parts = build_parts(decoders, Setting(*call, codebook=codebook, draft_model=draft_model, given=given))
        bring_back(self.transformer)  # conditions of a small drafter may have pushed it out
        target = self.target_maker(conditions)(parts.pass_tokens, batch)
        self._interrupt, self._num_timesteps, step, done = False, 0, 0, 0
        total = (grammar.num_tokens - (0 if given is None else given.shape[1])) * count
        with self.progress_bar(total=total) if progress else _Silent() as bar:

            def on_commit(count: int, tokens: Tensor) -> bool:
                nonlocal step, done
                done += count
                bar.update(count)
                if callback is not None:
                    callback(self, step, done, {name: tokens.clone() for name in callback_inputs})
                    bring_back(self.transformer)
                step += 1
                self._num_timesteps = step
                return self.interrupt

            def heard(turn: Round) -> bool | None:
                stop = None if on_round is None else on_round(turn)
                bring_back(self.transformer)  # who looks at pictures meanwhile may push it out
                return stop

            hears: dict[str, Any] = {"on_commit": on_commit, "on_picture": on_picture}
            hears["on_round"] = None if on_round is None else heard
            size = grammar.num_tokens, raster.row_length, given
            request = DecodeRequest(*size, log_probs=log_probs, trace=trace, pictures=count, **hears)
            result = decode(target, parts, laws, noise, request, batch)
            result.tokens = result.tokens.clone()  # out of inference mode: autograd may use it
            return result

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
        conditions = encode()
        batch = rows_of(strategies, len(conditions.inputs), batch_size)
        keys = noise_keys(generator, len(conditions.inputs))

        # 3. Decode and turn into pictures
        decoders = strategies if len(strategies) > 1 else strategies * len(conditions.inputs)
        described = list(zip(*keys, decoders, conditions.inputs, strict=True))
        painted: dict[int, Tensor] = {}

        def output(result: Any, chosen: Sequence[int]) -> ARPipelineOutput:
            columns = zip(*(described[i] for i in chosen), strict=True)
            seeds, indices, made_by, made_of = (list(column) for column in columns)
            if output_type == "latent":
                images = conditions.raster.to_codes(result.tokens)
            else:
                for k, i in enumerate(chosen):
                    if i not in painted:  # on_picture may have been shown it
                        record = {**made_of[k], "noise_seed": seeds[k], "image_index": indices[k]}
                        extra = conditions.extra and [conditions.extra[i]]
                        painted[i] = self.paint(result.tokens[k : k + 1], conditions.raster, [record], extra)
                images = of_unit(torch.cat([painted[i] for i in chosen]), output_type)
            recorded = (result.log_probs, result.entropies, result.trace)
            return ARPipelineOutput(images, result.tokens, result.stats, seeds, indices, config, made_by, made_of, *recorded)

        def finished(picture: int, result: Any) -> None:
            assert on_picture is not None
            on_picture(picture, output(result, [picture]))
            bring_back(self.transformer)

        with in_use(self.transformer):
            result = self.run_decoder(
                conditions,
                strategies,
                config,
                keys,
                batch,
                callback_on_step_end,
                progress,
                callback_on_step_end_tensor_inputs,
                codebook,
                self.draft_maker(conditions, batch, encode),
                None if on_picture is None else finished,
                log_probs=log_probs,
                trace=trace,
                on_round=on_round,
            )
        result_output = output(result, range(len(conditions.inputs)))
        self.maybe_free_model_hooks()
        return result_output if return_dict else (result_output.images,)


def _count(given: Any) -> int:
    """How many inputs there are."""
    return 1 if isinstance(given, (str, int)) or (isinstance(given, Tensor) and given.ndim == 0) else len(given)


class _Silent:
    """Stands in for a progress bar."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Nothing to show."""
