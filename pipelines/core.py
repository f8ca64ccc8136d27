"""What pipelines for pictures and for clips share: seeds, laws, decoding, progress, callbacks, tokens to an output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

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
from arsd.pipelines.checks import Decoders, check_output, rows_of, strategies_of
from arsd.pipelines.outputs import ARPipelineOutput, ARVideoOutput, Conditions, Generators, noise_keys, of_unit
from arsd.pipelines.provable import Provable
from arsd.profile import find_profile

TargetMaker = Callable[[int, int], Any]  # (pass_tokens, batch) -> target
DraftMaker = Callable[[int], DraftModel]  # window -> the draft model of a call


class ARPipeline(Provable, DiffusionPipeline):
    """Base of :class:`arsd.pipelines.base.ARImagePipeline` and :class:`arsd.pipelines.video.ARVideoPipeline`.

    Components: ``transformer``, the model; ``vq``, the tokenizer of pixels; ``decoder``, a :class:`arsd.DecodingStrategy`,
    which can be swapped like a scheduler; ``drafter``, a draft model or ``None``. Nothing here knows a model.
    """

    _callback_tensor_inputs = ["tokens"]
    _exclude_from_cpu_offload = ["drafter"]  # small, and used in every pass
    output_class: ClassVar[type[ARPipelineOutput] | type[ARVideoOutput]]
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

    @property
    def made_from(self) -> tuple[str, type]:
        """What the record of all that the model makes must hold for it to be verified, by name, and its type."""
        return ("class_label", int) if self.takes_classes else ("prompt", str)

    def make_raster(self, height: int | None = None, width: int | None = None) -> Any:
        """How a picture or clip of this size (pixels; the model's own when ``None``) lies in its tokens.

        Raises:
            InputError: for a size that the model cannot make.
        """
        raise NotImplementedError

    def encode_inputs(self, **inputs: Any) -> Conditions:
        """Inputs of a call to the conditions of all that it makes."""
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

    def make_grammar(self, raster: Any = None) -> Grammar:
        """What each position may hold, in this layout (the model's own when ``None``)."""
        return (raster or self.make_raster()).grammar(self._execution_device)

    @classmethod
    def from_saved(cls, path: str | Path, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
        """A pipeline from a folder that ``save_pretrained`` wrote, or a hub id; see diffusers for the options.

        Raises:
            CheckpointError: for a folder of another class.
        """
        from arsd.pipelines.auto import find_model
        from arsd.pipelines.families import check_class

        hub = {name: options.pop(name) for name in ("revision", "cache_dir") if name in options}
        folder = find_model(path, **hub)
        check_class(folder, cls)
        pipe = super().from_pretrained(str(folder), dtype=dtype or torch.float32, **options)
        pipe.remember_sources(folder, parts=options)
        return pipe

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
        more = {"codebook": codebook, "draft_model": draft_model, "given": given, "frame_length": raster.frame_length}
        parts = build_parts(decoders, Setting(*call, **more))
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

    def produce(
        self,
        encode: Callable[..., Conditions],
        decoders: list[DecodingStrategy],
        config: LawConfig,
        generator: Generators,
        batch_size: int | None,
        output_type: str,
        codebook: Tensor,
        on_picture: Callable[[int, Any], None] | None = None,
        **how: Any,
    ) -> Any:
        """The second half of a call: conditions, decoding, and what the tokens show.

        Args:
            encode: gives the conditions of all pictures or clips (``model=`` those of another model).
            decoders: one strategy, or one for each.
            config: sampling options.
            generator: of a call.
            batch_size: of a call.
            output_type: of a call.
            codebook: vectors [V, C] of all ids.
            on_picture: of a call.
            how: more of :meth:`run_decoder`.

        Returns:
            An :attr:`output_class`.
        """
        conditions = encode()
        count = len(conditions.inputs)
        batch, keys = rows_of(decoders, count, batch_size), noise_keys(generator, count)
        described = list(zip(*keys, decoders if len(decoders) > 1 else decoders * count, conditions.inputs, strict=True))
        painted: dict[int, Tensor] = {}

        def output(result: Any, chosen: Sequence[int]) -> Any:
            columns = zip(*(described[i] for i in chosen), strict=True)
            seeds, indices, made_by, made_of = (list(column) for column in columns)
            if output_type == "latent":
                shown = conditions.raster.to_codes(result.tokens)
            else:
                for k, i in enumerate(chosen):
                    if i not in painted:  # on_picture may have been shown it
                        record = {**made_of[k], "noise_seed": seeds[k], "image_index": indices[k]}
                        extra = conditions.extra and [conditions.extra[i]]
                        painted[i] = self.paint(result.tokens[k : k + 1], conditions.raster, [record], extra)
                shown = of_unit(torch.cat([painted[i] for i in chosen]), output_type)
            recorded = (result.log_probs, result.entropies, result.trace)
            return self.output_class(shown, result.tokens, result.stats, seeds, indices, config, made_by, made_of, *recorded)

        def finished(picture: int, result: Any) -> None:
            assert on_picture is not None
            on_picture(picture, output(result, [picture]))
            bring_back(self.transformer)

        with in_use(self.transformer):
            drafts = self.draft_maker(conditions, batch, encode)
            parts: dict[str, Any] = {
                "codebook": codebook,
                "draft_model": drafts,
                "on_picture": None if on_picture is None else finished,
            }
            result = self.run_decoder(conditions, decoders, config, keys, batch, **parts, **how)
        made = output(result, range(count))
        self.maybe_free_model_hooks()
        return made


class _Silent:
    """Stands in for a progress bar."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Nothing to show."""
