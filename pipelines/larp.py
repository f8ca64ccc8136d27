"""LARP (arXiv 2410.21264): clips of 16 pictures of a class (UCF-101), or that go on from given ones (Kinetics-600)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import SJD, DecodingStrategy, LawConfig
from arsd.devices import in_use
from arsd.errors import CheckpointError, InputError, warn_caller
from arsd.models.eagle import EagleDrafter
from arsd.models.folders import config_of
from arsd.models.larp import LARPTransformer
from arsd.models.larp_files import HUB, load_larp, load_larp_tokenizer
from arsd.models.volume import Volume
from arsd.pipelines.captioned import WithLanguageModel
from arsd.pipelines.checks import check_count, check_labels, dtype_of, saved_component
from arsd.pipelines.core import DraftMaker
from arsd.pipelines.outputs import Conditions
from arsd.pipelines.prefix import to_pixels
from arsd.pipelines.video import ARVideoPipeline, clips_of, is_codes
from arsd.tokenizers.larp import LARPTokenizer


class LARPPipeline(WithLanguageModel, ARVideoPipeline):
    """Clips from class labels, or from frames, whichever the model was trained for.

    The codes of a clip are a sequence without places: strategies that look at neighbours (``init=above``,
    ``init=previous-frame``, grouped) have none to look at. A model of frames makes all of its clip anew, the given frames
    included: they are what it is told, not codes that are kept.

    Args:
        transformer: the autoregressive model.
        vq: the video tokenizer. Upstream has it in float32 where frames are given, and in float16 elsewhere.
        decoder: decoding strategy; :class:`arsd.SJD` when none is given.
        drafter: a smaller :class:`LARPTransformer` of the same codes and conditions.
    """

    model_cpu_offload_seq = "transformer->vq"
    _optional_components = ["decoder", "drafter"]

    def __init__(
        self,
        transformer: LARPTransformer,
        vq: LARPTokenizer,
        decoder: DecodingStrategy | None = None,
        drafter: LARPTransformer | None = None,
    ) -> None:
        super().__init__()
        decoder = decoder if decoder is not None else SJD()
        self.register_modules(transformer=transformer, vq=vq, decoder=decoder, drafter=drafter)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, vq: Any = None, dtype: Any = None, **options: Any
    ) -> Any:
        """Load a published folder with its tokenizer, or a folder that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: a local folder, or a hub id (hywang66/LARP-L-long-AR, LARP-L-long-AR-FP).
            vq: the video tokenizer of a published transformer: a folder, a hub id (hywang66/LARP-L-long-tokenizer), or an
                object.
            dtype: of all weights (``torch_dtype`` is the same); by default that of the files.
            options: components (``decoder=...``, ``drafter=...``), ``revision`` and ``cache_dir`` of the hub.

        Raises:
            CheckpointError: for a folder of another kind, missing or damaged files, or files that do not belong together.
        """
        from arsd.pipelines.auto import find_model

        dtype = dtype_of(dtype, options)
        hub = {name: options.pop(name) for name in ("revision", "cache_dir") if name in options}
        folder = find_model(pretrained_model_name_or_path, **hub)
        source = find_model(vq) if isinstance(vq, (str, Path)) else vq
        given = options | ({} if source is None else {"vq": source})
        if source is not None:
            options["vq"] = _tokenizer(source, dtype)
        if (folder / "model_index.json").is_file():
            return cls.from_saved(folder, dtype, options)
        if source is None:
            raise CheckpointError(f"{folder} holds no video tokenizer: give vq=..., the folder of {HUB}")
        transformer, tokenizer = load_larp(folder, dtype=dtype), options["vq"]
        for what, ours, theirs in (
            ("codes", transformer.config["vocab_size"], tokenizer.codes.num_embeddings),
            ("codes per clip", transformer.num_tokens, tokenizer.config["num_tokens"]),
        ):
            if ours != theirs:
                raise CheckpointError(f"the model has {ours} {what}, the video tokenizer {theirs}: give its own, vq=...")
        pipe = cls(transformer, **options)
        pipe.remember_sources(folder, *([source] if isinstance(source, Path) else []), parts=given)
        return pipe

    @property
    def takes_classes(self) -> bool:
        """See :class:`ARPipeline`."""
        return bool(self.transformer.config["condition"] == "class")

    @property
    def frame_rate(self) -> float:
        """See :class:`ARVideoPipeline`; what upstream writes its clips at."""
        return 25.0

    def law_config(self, given: dict[str, Any]) -> LawConfig:
        """See :class:`ARPipeline`.

        Raises:
            InputError: for guidance of a model of frames.
        """
        config = super().law_config(given)
        if config.guidance_scale != 1 and not self.takes_classes:
            raise InputError("a model that goes on from frames has no unconditional stream: leave out guidance_scale")
        return config

    def make_raster(self, height: int | None = None, width: int | None = None, num_frames: int | None = None) -> Volume:
        """See :class:`ARVideoPipeline`: one row of codes, which tell all frames."""
        size, frames = self.vq.config["size"], self.vq.config["frames"]
        if height not in (None, size) or width not in (None, size) or num_frames not in (None, frames):
            raise InputError(f"this model makes clips of {frames} frames of {size} x {size} pixels only")
        return Volume(1, 1, self.transformer.num_tokens, int(self.transformer.config["vocab_size"]))

    def check_inputs(
        self, num_videos_per_prompt: int, frames: Tensor | None = None, class_labels: Any = None, **unknown: Any
    ) -> None:
        """Raise InputError for anything that the model cannot work with."""
        if unknown:
            raise InputError(f"this model knows no {', '.join(unknown)}")
        if self.takes_classes and class_labels is None:
            raise InputError("this model needs class_labels")
        if not self.takes_classes and (frames is None or class_labels is not None):
            raise InputError("this model goes on from frames: give some, and no class_labels")
        check_count(num_videos_per_prompt, "num_videos_per_prompt")

    @torch.no_grad()
    def encode_clips(self, frames: Any, raster: Volume) -> Tensor:
        """The codes [n, 1, 1, N] of clips that begin with ``frames`` and then stand still: what a model of frames is told.

        Raises:
            InputError: for what is no clip, or is as long as what is to be made; for a model of classes.
        """
        if self.takes_classes:
            raise InputError("this model makes whole clips of a class: leave out frames")
        if is_codes(frames):
            if frames.ndim != 4 or not len(frames) or frames.shape[1:] != raster.places.shape:
                wanted = f"[n, {', '.join(map(str, raster.places.shape))}]"
                raise InputError(f"frames holds codes of shape {tuple(frames.shape)}: give {wanted}, or pixels in [0, 1]")
            return frames.long()
        size, length, usual = (self.vq.config["size"], self.vq.config["frames"], self.transformer.config["given_frames"])
        clips = [to_pixels(clip, size, size, self.vq.downsample_factor) for clip in clips_of(frames)]
        most = max(map(len, clips))
        if most >= length:
            raise InputError(f"frames fill {most} of {length} frames: give fewer, so that something is left to be made")
        if any(len(clip) != usual for clip in clips):
            warn_caller(f"this model was trained to go on from {usual} frames")
        still = [torch.cat([clip, clip[-1:].expand(length - len(clip), -1, -1, -1)]) for clip in clips]
        with in_use(self.vq):
            return self.encode_frames(torch.stack(still).to(self.vq.device, self.vq.dtype))

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Whole clips [n, T, 3, H, W] in [-1, 1] to codes [n, 1, 1, N], clip by clip."""
        found: list[Tensor] = [self.vq.encode(clip[None].transpose(1, 2)) for clip in frames]
        return torch.cat(found)[:, None, None]

    def decode_frames(self, codes: Tensor) -> Tensor:
        """See :class:`ARVideoPipeline`; of codes [n, 1, 1, N]."""
        found: list[Tensor] = [self.vq.decode(clip.flatten(1)).transpose(1, 2) for clip in codes]
        return torch.cat(found)

    @torch.no_grad()
    def encode_inputs(  # type: ignore[override]
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_videos_per_prompt: int = 1,
        guided: bool = True,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        given: Tensor | None = None,
        model: LARPTransformer | None = None,
    ) -> Conditions:
        """See :class:`ARVideoPipeline`; ``given`` [n, N] are what :meth:`encode_clips` found. ``model`` embeds them.

        Raises:
            InputError: for labels that are none.
        """
        model, device = model or self.transformer, self._execution_device
        if given is None:
            labels = check_labels(class_labels, device)
            with in_use(model):
                rows, inputs = model.embed_classes(labels), [{"class_label": n} for n in labels.tolist()]
        else:
            with in_use(model):
                rows, inputs = model.embed_clips(given.to(device)), [{}] * len(given)
        self.make_raster(height, width, num_frames)
        rows = rows.repeat_interleave(num_videos_per_prompt, dim=0)
        return self._conditions(model, rows, guided, [one for one in inputs for _ in range(num_videos_per_prompt)])

    @torch.no_grad()
    def null_conditions(self, batch: int, guided: bool) -> Conditions:
        """See :class:`ARPipeline`."""
        model, device = self.transformer, self._execution_device
        if self.takes_classes:
            rows = model.embed_classes(torch.arange(batch, device=device) % model.config["num_classes"])
        else:
            rows = model.embed_clips(torch.zeros(batch, model.num_tokens, dtype=torch.int64, device=device))
        return self._conditions(model, rows, guided, [{}] * batch)

    def draft_maker(self, conditions: Conditions, batch: int, encode: Callable[..., Conditions]) -> DraftMaker | None:
        """See :class:`ARPipeline`.

        Raises:
            InputError: for an EAGLE drafter, which would not know where a code stands.
        """
        if isinstance(self.drafter, EagleDrafter):
            raise InputError("an EAGLE drafter cannot read this model's positions: give a smaller LARPTransformer")
        return super().draft_maker(conditions, batch, encode)

    def _conditions(self, model: LARPTransformer, rows: Tensor, guided: bool, inputs: list[dict[str, Any]]) -> Conditions:
        """Both streams of a model of classes, one of a model of frames."""
        condition = rows[None]
        if guided and self.takes_classes:
            null = torch.full((len(rows),), model.config["num_classes"], device=rows.device)
            with in_use(model):
                condition = torch.stack([rows, model.embed_classes(null)])
        return Conditions(condition, None, inputs, self.make_raster())


def _tokenizer(source: Any, dtype: torch.dtype | None) -> LARPTokenizer:
    """Of an object, a folder that ``save_pretrained`` wrote, or the published one."""
    if isinstance(source, LARPTokenizer):
        return source
    if config_of(Path(source)).get("_class_name") == LARPTokenizer.__name__:
        saved: LARPTokenizer = saved_component(LARPTokenizer, source, dtype)
        return saved
    return load_larp_tokenizer(source, dtype=dtype)
