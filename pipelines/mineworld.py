"""MineWorld (arXiv 2504.08388): what Minecraft looks like after given frames, when given actions are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import SJD, DecodingStrategy
from arsd.errors import CheckpointError, InputError
from arsd.models.folders import config_of
from arsd.models.mineworld import ACTION_IDS, ActionVolume, MineWorldTransformer, parse_actions
from arsd.models.mineworld_files import VAE_FILES, holds_vae, load_transformer, load_vae
from arsd.models.token_images import with_marks
from arsd.pipelines.captioned import WithLanguageModel
from arsd.pipelines.checks import check_count, dtype_of, saved_component
from arsd.pipelines.outputs import Conditions, stand_in, with_given
from arsd.pipelines.video import ARVideoPipeline
from arsd.tokenizers.amused import AmusedTokenizer


class MineWorldPipeline(WithLanguageModel, ARVideoPipeline):
    """Clips that go on from given frames, with an action between every two frames.

    ``actions`` of a call says what is done behind each frame, see :func:`arsd.models.mineworld.parse_actions`:
    ``pipe(frames=image, actions=[{"forward": 1}, {"forward": 1, "camera": [0, 15]}, ...])``. Every clip of a call may have
    actions of its own.

    Args:
        transformer: the autoregressive model.
        vq: the tokenizer of frames.
        decoder: decoding strategy; :class:`arsd.SJD` from the previous frame when none is given.
        drafter: an :class:`arsd.EagleDrafter`, or a smaller :class:`MineWorldTransformer` of the same codes.
    """

    model_cpu_offload_seq = "transformer->vq"
    _optional_components = ["decoder", "drafter"]
    counts_padding = False  # the slot in front of a clip is a stand-in that nothing attends to

    def __init__(
        self,
        transformer: MineWorldTransformer,
        vq: AmusedTokenizer,
        decoder: DecodingStrategy | None = None,
        drafter: Any = None,
    ) -> None:
        super().__init__()
        decoder = decoder if decoder is not None else SJD(init="previous-frame")
        self.register_modules(transformer=transformer, vq=vq, decoder=decoder, drafter=drafter)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, vq: Any = None, dtype: Any = None, **options: Any
    ) -> Any:
        """Load a pipeline folder, or a published file as :meth:`from_single_file` does; see diffusers for other options."""
        dtype = dtype_of(dtype, options)
        if Path(pretrained_model_name_or_path).is_file():
            return cls.from_single_file(pretrained_model_name_or_path, vq=vq, dtype=dtype, **options)
        if vq is not None:
            options["vq"] = _tokenizer(vq, dtype)
        return cls.from_saved(pretrained_model_name_or_path, dtype, options)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        vq: str | Path | AmusedTokenizer | None = None,
        dtype: torch.dtype | None = None,
        frames: int | None = None,
        grid: tuple[int, int] = (14, 24),
        num_heads: int | None = None,
        decoder: DecodingStrategy | None = None,
        drafter: Any = None,
    ) -> MineWorldPipeline:
        """A pipeline of published files.

        Args:
            path: the model, such as ``700M_16f.ckpt``.
            vq: the tokenizer: ``vae.ckpt``, its folder, or an object; by default that in the model's file, else in the
                folder ``vae`` beside it.
            dtype: of all weights; by default that of the files.
            frames: see :func:`arsd.models.mineworld_files.load_transformer`, as ``grid`` and ``num_heads``.
            grid: likewise.
            num_heads: likewise.
            decoder: decoding strategy.
            drafter: draft model.

        Raises:
            CheckpointError: when a file is missing, damaged or something else, or the files do not belong together.
        """
        path = Path(path)
        transformer = load_transformer(path, frames=frames, grid=grid, num_heads=num_heads, dtype=dtype)
        source = vq
        if source is None:
            beside = next((path.parent / "vae" / n for n in VAE_FILES if (path.parent / "vae" / n).is_file()), None)
            source = path if holds_vae(path) or beside is None else beside
        tokenizer = _tokenizer(source, dtype)
        codes, known = len(tokenizer.codebook), transformer.config["vocab_size"] - ACTION_IDS
        if codes != known:
            raise CheckpointError(f"the tokenizer has {codes} codes, the model {known}: give files that belong together")
        pipe = cls(transformer, tokenizer, decoder, drafter)
        apart = [Path(source)] if isinstance(source, (str, Path)) and Path(source) != path else []
        pipe.remember_sources(path, *apart, parts={"vq": vq})
        return pipe

    @property
    def made_from(self) -> tuple[str, type]:
        """See :class:`ARPipeline`."""
        return "actions", list

    @property
    def codebook(self) -> Tensor:
        """See :class:`ARPipeline`; ids of actions have vectors that lie far away from all codes, and from each other."""
        return with_marks(self.vq.codebook, ACTION_IDS)

    def make_raster(
        self, height: int | None = None, width: int | None = None, num_frames: int | None = None
    ) -> ActionVolume:
        """See :class:`ARVideoPipeline`; clips may be shorter than those that the model was trained on."""
        config, factor = self.transformer.config, self.vq.downsample_factor
        size = config["rows"] * factor, config["columns"] * factor
        if height not in (None, size[0]) or width not in (None, size[1]):
            raise InputError(f"this model makes frames of {size[1]} x {size[0]} pixels only")
        num_frames = config["frames"] if num_frames is None else num_frames
        if isinstance(num_frames, bool) or not isinstance(num_frames, int) or not 2 <= num_frames <= config["frames"]:
            raise InputError(f"this model makes clips of 2 to {config['frames']} frames, not {num_frames!r}")
        return ActionVolume(num_frames, config["rows"], config["columns"], config["vocab_size"] - ACTION_IDS)

    def check_inputs(
        self, num_videos_per_prompt: int, frames: Tensor | None = None, actions: Any = None, **unknown: Any
    ) -> None:
        """Raise InputError for anything that the model cannot work with."""
        if unknown:
            raise InputError(f"this model knows no {', '.join(unknown)}: give frames and actions")
        if frames is None:
            raise InputError("this model goes on from frames: give some")
        if actions is None:
            raise InputError("this model wants actions: give one for each frame but the last, or {} to do nothing")
        check_count(num_videos_per_prompt, "num_videos_per_prompt")

    @torch.no_grad()
    def encode_inputs(  # type: ignore[override]
        self,
        actions: Any = None,
        num_videos_per_prompt: int = 1,
        guided: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        given: Tensor | None = None,
        model: MineWorldTransformer | None = None,
    ) -> Conditions:
        """See :class:`ARVideoPipeline`; the actions behind given frames are filled in.

        Raises:
            InputError: for actions that are none, or of another number of clips than ``given``, or for guidance.
        """
        if guided:
            raise InputError("this model has no unconditional stream to guide with: leave out guidance_scale")
        raster, device = self.make_raster(height, width, num_frames), self._execution_device
        ids = parse_actions(actions, raster.frames, raster.codes).to(device)
        clips = len(ids) if given is None else len(given)
        count = max(len(ids), clips)
        if not {len(ids), clips} <= {1, count}:
            raise InputError(f"got actions of {len(ids)} clips for frames of {clips}: give one, or one for each")
        ids = ids.expand(count, -1, -1).repeat_interleave(num_videos_per_prompt, dim=0)
        raster = replace(raster, actions=ids)
        if given is not None:
            given = given.to(device).expand(count, -1).repeat_interleave(num_videos_per_prompt, dim=0)
            forced = raster.tables[:, : given.shape[1]]
            given = torch.where(forced >= 0, forced, given)
        size = {} if num_frames is None else {"num_frames": num_frames}
        described = [{"actions": rows} | size | with_given(given) for rows in ids.tolist()]
        return Conditions(*self._stand_in(model or self.transformer, len(ids)), described, raster, given)

    @torch.no_grad()
    def null_conditions(self, batch: int, guided: bool) -> Conditions:
        """See :class:`ARPipeline`: nothing is done behind a frame of one colour."""
        raster = self.make_raster()
        codes = torch.zeros(batch, 1, raster.rows, raster.columns, dtype=torch.int64, device=self._execution_device)
        return Conditions(*self._stand_in(self.transformer, batch), [{}] * batch, raster, raster.from_codes(codes))

    def raster_of(self, record: Mapping[str, Any]) -> ActionVolume:
        """See :class:`arsd.pipelines.provable.Provable`: with the actions of the record."""
        raster = self.make_raster(num_frames=record.get("num_frames"))
        return replace(raster, actions=parse_actions(record.get("actions"), raster.frames, raster.codes)[:1])

    def conditions_of(self, records: Sequence[dict[str, Any]], guided: bool) -> Conditions:
        """See :class:`arsd.pipelines.provable.Provable`."""
        return self.encode_inputs(
            [record["actions"] for record in records], guided=guided, num_frames=records[0].get("num_frames")
        )

    def _stand_in(self, model: MineWorldTransformer, batch: int) -> tuple[Tensor, Tensor]:
        return stand_in(batch, model.config["hidden_size"], model.dtype, self._execution_device)


def _tokenizer(source: Any, dtype: torch.dtype | None) -> AmusedTokenizer:
    """The tokenizer of an object, a published file or its folder, or a folder that ``save_pretrained`` wrote."""
    if isinstance(source, AmusedTokenizer):
        return source
    if config_of(Path(source)).get("_class_name") == AmusedTokenizer.__name__:
        found: AmusedTokenizer = saved_component(AmusedTokenizer, source, dtype)
        return found
    return load_vae(source, dtype=dtype)
