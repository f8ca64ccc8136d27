"""iVideoGPT (arXiv 2405.15223): clips of robots that go on from one or two given pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import SJD, DecodingStrategy
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.types import DraftModel
from arsd.devices import in_use
from arsd.errors import CheckpointError, InputError
from arsd.models.ivideogpt import FRAMES, SAMPLING, ContextVolume
from arsd.models.ivideogpt_files import find_kind, load_ivideogpt, load_ivideogpt_tokenizer
from arsd.models.target import DecoderTarget
from arsd.models.token_images import with_marks
from arsd.pipelines.checks import check_count, check_sampling, dtype_of
from arsd.pipelines.core import DraftMaker, TargetMaker
from arsd.pipelines.outputs import Conditions, stand_in, with_given
from arsd.pipelines.prefix import to_pixels
from arsd.pipelines.video import ARVideoPipeline, clips_of, is_codes
from arsd.tokenizers.ivideogpt import IVideoGPTTokenizer


class IVideoGPTPipeline(ARVideoPipeline):
    """Clips that begin with given frames, which are kept token for token.

    Models that read actions are not supported. One that aims at a goal (``goal-cond``) is given its last frame first, and
    then the one that it begins with: what it makes begins with the goal as well.

    Args:
        transformer: a ``LlamaForCausalLM`` over the codes of both kinds and two marks.
        vq: the tokenizer of context pictures and of what changes.
        decoder: decoding strategy; :class:`arsd.SJD` from the previous frame when none is given.
        drafter: a smaller ``LlamaForCausalLM`` of the same ids.
        num_frames: frames of a clip, those that are given included, where a call does not say.
        sampling: sampling options instead of the published ones (fields of :class:`arsd.decoding.LawConfig`).
    """

    model_cpu_offload_seq = "transformer->vq"
    _optional_components = ["decoder", "drafter"]

    def __init__(
        self,
        transformer: Any,
        vq: IVideoGPTTokenizer,
        decoder: DecodingStrategy | None = None,
        drafter: Any = None,
        num_frames: int = FRAMES,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_sampling(sampling)
        known, wanted = transformer.config.vocab_size, len(vq.codebook) + 2
        if known != wanted:
            raise CheckpointError(
                f"the model has {known} ids, the tokenizer needs {wanted}: give files that belong together"
            )
        decoder = decoder if decoder is not None else SJD(init="previous-frame")
        self.register_modules(transformer=transformer, vq=vq, decoder=decoder, drafter=drafter)
        self.register_to_config(num_frames=num_frames, sampling=sampling)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, vq: Any = None, dtype: Any = None, **options: Any
    ) -> Any:
        """Load a published folder, or one that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: a local folder, or a hub id (thuml/ivideogpt-oxe-64-act-free and its siblings).
            vq: a tokenizer instead of the folder's own: a folder, or an object.
            dtype: of all weights (``torch_dtype`` is the same); by default that of the files.
            options: components (``decoder=...``, ``drafter=...``), ``num_frames``, ``sampling``, ``revision`` and
                ``cache_dir`` of the hub, and what transformers' ``from_pretrained`` takes.

        Raises:
            CheckpointError: for a folder of another kind, missing or damaged files, or a model that reads actions.
        """
        from arsd.pipelines.auto import find_model

        dtype = dtype_of(dtype, options)
        hub = {name: options.pop(name) for name in ("revision", "cache_dir") if name in options}
        folder = find_model(pretrained_model_name_or_path, **hub)
        given = options | ({} if vq is None else {"vq": vq})
        if isinstance(vq, (str, Path)):
            vq = load_ivideogpt_tokenizer(find_model(vq), dtype=dtype)
        if (folder / "model_index.json").is_file():
            return cls.from_saved(folder, dtype, options | ({} if vq is None else {"vq": vq}))
        if find_kind(folder) is None:
            raise CheckpointError(f"{folder} is no folder of iVideoGPT: give one that holds tokenizer and transformer")
        own = {name: options.pop(name) for name in ("decoder", "drafter", "num_frames", "sampling") if name in options}
        tokenizer = vq if vq is not None else load_ivideogpt_tokenizer(folder, dtype=dtype)
        pipe = cls(load_ivideogpt(folder, dtype=dtype, **options), tokenizer, **own)
        apart = [Path(given["vq"])] if isinstance(given.get("vq"), (str, Path)) else []
        pipe.remember_sources(folder, *apart, parts=given)
        return pipe

    @property
    def sampling(self) -> dict[str, Any]:
        """See :class:`ARPipeline`."""
        return self.config["sampling"] or SAMPLING

    @property
    def made_from(self) -> tuple[str, type]:
        """See :class:`ARPipeline`; what is given lies in the tokens of the record."""
        return "given_tokens", int

    def conditions_of(self, records: Sequence[dict[str, Any]], guided: bool) -> Conditions:
        """See :class:`arsd.pipelines.provable.Provable`."""
        given = torch.zeros(len(records), records[0]["given_tokens"], dtype=torch.int64)
        return self.encode_inputs(given=given, num_frames=records[0].get("num_frames"))

    @property
    def codebook(self) -> Tensor:
        """See :class:`ARPipeline`; marks lie far away from all codes."""
        return with_marks(self.vq.codebook, 2)

    @property
    def frame_rate(self) -> float:
        """See :class:`ARVideoPipeline`; what upstream shows its clips at."""
        return 4.0

    def make_raster(self, height: int | None = None, width: int | None = None, num_frames: int | None = None) -> Any:
        """See :class:`ARVideoPipeline`: a :class:`ContextVolume`."""
        vq = self.vq
        size, first = int(vq.config["resolution"]), vq.context_length
        if height not in (None, size) or width not in (None, size):
            raise InputError(f"this model makes frames of {size} x {size} pixels only")
        count = self.config["num_frames"] if num_frames is None else num_frames
        kinds = (int(vq.config["num_vq_embeddings"]), int(vq.config["num_dyn_embeddings"]))
        one, two = (ContextVolume(first + n, first, vq.side, vq.patches, *kinds).num_tokens for n in (1, 2))
        most = first + 1 + (int(self.transformer.config.max_position_embeddings) - one) // (two - one)
        if isinstance(count, bool) or not isinstance(count, int) or not first < count <= most:
            raise InputError(
                f"num_frames must be in {first + 1}..{most}, the {first} of the context included, not {count!r}"
            )
        return ContextVolume(count, first, vq.side, vq.patches, *kinds)

    def check_inputs(self, num_videos_per_prompt: int, frames: Tensor | None = None, **unknown: Any) -> None:
        """Raise InputError for anything that the model cannot work with."""
        if "actions" in unknown:
            raise InputError("models that read actions are not supported: leave out actions")
        if unknown:
            raise InputError(f"this model knows no {', '.join(unknown)}: it goes on from frames")
        if frames is None:
            raise InputError(f"this model goes on from frames: give {self.vq.context_length} or more")
        check_count(num_videos_per_prompt, "num_videos_per_prompt")

    def law_config(self, given: dict[str, Any]) -> Any:
        """See :class:`ARPipeline`.

        Raises:
            InputError: for guidance.
        """
        config = super().law_config(given)
        if config.guidance_scale != 1:
            raise InputError("this model has no unconditional stream: leave out guidance_scale")
        return config

    @torch.no_grad()
    def encode_clips(self, frames: Any, raster: Any) -> Tensor:
        """Codes [n, K'] of the pictures that clips begin with; see :class:`arsd.tokenizers.ivideogpt.IVideoGPTTokenizer`.

        Raises:
            InputError: for what is no clip, is shorter than the context, or as long as what is to be made.
        """
        if is_codes(frames):
            if not len(frames) or not raster.begins(raster.from_codes(frames).shape[1]):
                raise InputError("frames holds codes of all frames: give fewer, so that something is left to be made")
            raster.check(frames)
            return frames.long()
        size, first = int(self.vq.config["resolution"]), self.vq.context_length
        clips = [to_pixels(clip, size, size, self.vq.downsample_factor) for clip in clips_of(frames)]
        lengths = {len(clip) for clip in clips}
        if len(lengths) > 1:
            raise InputError("the clips in frames have different lengths: give as many frames of each")
        if not first <= min(lengths) < raster.frames:
            raise InputError(f"frames must be {first}..{raster.frames - 1} of {raster.frames}, not {min(lengths)}")
        with in_use(self.vq):
            return self.encode_frames(torch.stack(clips).to(self.vq.device, self.vq.dtype))

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Clips [n, T, 3, H, W] in [-1, 1] to codes [n, K], clip by clip."""
        return torch.cat([self.vq.encode(clip[None]) for clip in frames])

    def decode_frames(self, codes: Tensor) -> Tensor:
        """See :class:`ARVideoPipeline`; of codes [n, K]."""
        return torch.cat([self.vq.decode(clip[None]) for clip in codes])

    @torch.no_grad()
    def encode_inputs(  # type: ignore[override]
        self,
        num_videos_per_prompt: int = 1,
        guided: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        given: Tensor | None = None,
        model: Any = None,
    ) -> Conditions:
        """See :class:`ARVideoPipeline`; one slot in front of the tokens stands in for a condition, and is never read.

        Raises:
            InputError: without ``given`` tokens.
        """
        if given is None:
            raise InputError("this model goes on from frames: give some")
        given = given.to(self._execution_device).repeat_interleave(num_videos_per_prompt, dim=0)
        size = {"num_frames": num_frames} if num_frames is not None else {}
        return self._conditions(given, self.make_raster(height, width, num_frames), size, model or self.transformer)

    @torch.no_grad()
    def null_conditions(self, batch: int, guided: bool) -> Conditions:
        """See :class:`ARPipeline`."""
        raster = self.make_raster()
        codes = torch.zeros(batch, raster.context * raster.side**2, dtype=torch.int64, device=self._execution_device)
        return self._conditions(raster.from_codes(codes), raster, {}, self.transformer)

    def target_maker(self, conditions: Conditions, model: Any = None) -> TargetMaker:
        """See :class:`ARPipeline`."""
        lm, total = model or self.transformer, conditions.raster.num_tokens

        def make_target(pass_tokens: int, batch: int) -> DecoderTarget:
            inputs = (conditions.condition, total, pass_tokens, conditions.padding, batch, conditions.given)
            return DecoderTarget(lm.model, lm.lm_head, lm.get_input_embeddings(), *inputs, count_padding=False)

        return make_target

    def draft_maker(self, conditions: Conditions, batch: int, encode: Callable[..., Conditions]) -> DraftMaker | None:
        """See :class:`ARPipeline`.

        Raises:
            InputError: for a drafter that is no language model of the same ids.
        """
        drafter = self.drafter
        if drafter is None:
            return None
        if getattr(getattr(drafter, "config", None), "vocab_size", None) != self.transformer.config.vocab_size:
            raise InputError("the drafter must be a LlamaForCausalLM with the ids of the model")

        def make_small(window: int) -> DraftModel:
            maker = self.target_maker(encode(model=drafter), drafter)
            return SmallARDrafter(maker(max(window, 2), batch), window)

        return make_small

    def _conditions(self, given: Tensor, raster: ContextVolume, size: dict[str, Any], model: Any) -> Conditions:
        slot, padding = stand_in(len(given), model.config.hidden_size, model.dtype, given.device)
        described = [size | with_given(given) for _ in range(len(given))]
        return Conditions(slot, padding, described, raster, given.contiguous())
