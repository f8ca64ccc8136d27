"""Cosmos-Predict1's autoregressive models (arXiv 2501.03575) and emoji-video, which is the same behind captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from arsd.decoding import SJD, DecodingStrategy
from arsd.devices import in_use
from arsd.errors import CheckpointError, InputError
from arsd.models.cosmos import CosmosTransformer
from arsd.models.cosmos_files import load_transformer
from arsd.models.volume import Volume
from arsd.pipelines.captioned import Captioned
from arsd.pipelines.checks import check_count, dtype_of, saved_component
from arsd.pipelines.outputs import Conditions, stand_in, with_given
from arsd.pipelines.video import ARVideoPipeline
from arsd.tokenizers.cosmos import HUB, CosmosTokenizer


class CosmosARPipeline(Captioned, ARVideoPipeline):
    """Clips from a prompt, from frames that they begin with, or from both: what the model was trained for.

    NVIDIA's base models go on from given frames (one, or nine); emoji-video takes a prompt, a picture or both.

    Args:
        transformer: the autoregressive model.
        vq: the tokenizer: of clips (:class:`arsd.CosmosTokenizer`), or of pictures, which then reads frame by frame.
        decoder: decoding strategy; :class:`arsd.SJD` from the previous frame when none is given.
        tokenizer: caption tokenizer (models with captions).
        text_encoder: T5 encoder (models with captions).
        drafter: an :class:`arsd.EagleDrafter`, or a smaller :class:`CosmosTransformer` of the same codes and conditions.
        captions: a model (shipped name, folder or hub id) whose tokenizer and text encoder these are; a saved folder without
            them gets them from there.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vq"
    _optional_components = ["decoder", "tokenizer", "text_encoder", "drafter"]

    def __init__(
        self,
        transformer: CosmosTransformer,
        vq: Any,
        decoder: DecodingStrategy | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        drafter: Any = None,
        captions: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vq=vq,
            decoder=decoder if decoder is not None else SJD(init="previous-frame"),
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            drafter=drafter,
        )
        self.register_to_config(captions=captions)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, vq: Any = None, dtype: Any = None, **options: Any
    ) -> Any:
        """Load a pipeline folder (see diffusers), or NVIDIA's files as :meth:`from_single_file` does."""
        from arsd.pipelines.auto import caption_source, find_model

        dtype = dtype_of(dtype, options)
        hub = {name: options.pop(name) for name in ("revision", "cache_dir") if name in options}
        folder = find_model(pretrained_model_name_or_path, **hub)
        vq = find_model(vq) if isinstance(vq, (str, Path)) else vq
        if not (folder / "model_index.json").is_file():
            return cls.from_single_file(folder, vq=vq, dtype=dtype, **options)
        if vq is not None:
            options["vq"] = CosmosTokenizer.from_pretrained(vq) if isinstance(vq, Path) else vq
        pipe, source = cls.from_saved(folder, dtype, options), caption_source(folder)
        wanted = [name for name in ("tokenizer", "text_encoder") if name not in options and getattr(pipe, name) is None]
        if source is not None and wanted:
            kinds = {"tokenizer": (PreTrainedTokenizerFast, None), "text_encoder": (T5EncoderModel, pipe.dtype)}
            found = {name: saved_component(kinds[name][0], source / name, kinds[name][1]) for name in wanted}
            pipe.register_modules(**found)
            pipe.remember_sources(folder, *(source / name for name in wanted), parts=options)
        return pipe

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        vq: Any = None,
        dtype: torch.dtype | None = None,
        decoder: DecodingStrategy | None = None,
        drafter: Any = None,
        **options: Any,
    ) -> CosmosARPipeline:
        """A pipeline of NVIDIA's files.

        Args:
            path: the folder of Cosmos-Predict1-4B or -12B, or its ``model.pt``.
            vq: the folder of Cosmos-Tokenize1-DV8x16x16-720p (its files are programs), or an object.
            dtype: of the transformer's weights; by default that of the file.
            decoder: decoding strategy.
            drafter: draft model.
            options: ``grid``, ``rope_base`` and ``yarn_scale`` of :func:`arsd.models.cosmos_files.load_transformer`.

        Raises:
            CheckpointError: when a file is missing, damaged or something else, or the files do not belong together.
        """
        if vq is None:
            raise CheckpointError(f"{path} is a transformer without its tokenizer: give vq=..., the folder of {HUB}")
        tokenizer = CosmosTokenizer.from_pretrained(vq) if isinstance(vq, (str, Path)) else vq
        transformer = load_transformer(path, dtype=dtype, **options)
        codes, known = len(tokenizer.codebook), transformer.config["vocab_size"]
        if codes != known:
            raise CheckpointError(f"the tokenizer has {codes} codes, the model {known}: give files that belong together")
        pipe = cls(transformer, tokenizer, decoder, drafter=drafter)
        pipe.remember_sources(path, *([vq] if isinstance(vq, (str, Path)) else []), parts={"vq": vq})
        return pipe

    @property
    def made_from(self) -> tuple[str, type]:
        """See :class:`ARPipeline`; models without captions go on from given tokens."""
        return ("prompt", str) if self.has_captions else ("given_tokens", int)

    def guidance_of(self, guidance_scale: float | None, inputs: dict[str, Any]) -> float | None:
        """See :class:`ARVideoPipeline`: without a prompt both streams would be the same."""
        if "prompt" in inputs or "prompt_embeds" in inputs:
            return guidance_scale
        if guidance_scale not in (None, 1):
            raise InputError("there is no prompt to guide with: leave out guidance_scale")
        return 1.0

    @property
    def has_captions(self) -> bool:
        """Whether the model reads prompts."""
        return self.transformer.config["caption_dim"] is not None

    @property
    def counts_padding(self) -> bool:
        """See :class:`Captioned`. The slot in front of a model without captions is a stand-in that nothing attends to."""
        return self.has_captions

    def make_raster(self, height: int | None = None, width: int | None = None, num_frames: int | None = None) -> Volume:
        """See :class:`ARVideoPipeline`; clips may be shorter than those that the model was trained on."""
        config, factor = self.transformer.config, self.vq.downsample_factor
        size = config["rows"] * factor, config["columns"] * factor
        if height not in (None, size[0]) or width not in (None, size[1]):
            raise InputError(f"this model makes frames of {size[1]} x {size[0]} pixels only")
        step, most = getattr(self.vq, "temporal_factor", 1), config["frames"]
        if num_frames is None:
            num_frames = 1 + step * (most - 1)
        if isinstance(num_frames, bool) or not isinstance(num_frames, int) or (num_frames - 1) % step or num_frames < 1:
            raise InputError(f"num_frames must be a multiple of {step} and 1 more, not {num_frames!r}")
        if (num_frames - 1) // step >= most:
            raise InputError(f"this model makes at most {1 + step * (most - 1)} frames, not {num_frames}")
        return Volume(1 + (num_frames - 1) // step, config["rows"], config["columns"], config["vocab_size"])

    def check_inputs(
        self,
        num_videos_per_prompt: int,
        frames: Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        **unknown: Any,
    ) -> None:
        """Raise InputError for anything that the model cannot work with."""
        if unknown:
            raise InputError(f"this model knows no {', '.join(unknown)}")
        if not self.has_captions and (prompt is not None or prompt_embeds is not None):
            raise InputError("this model has no captions: give the frames that a clip begins with, and no prompt")
        if prompt is not None and prompt_embeds is not None:
            raise InputError("give prompt or prompt_embeds, not both")
        if prompt is None and prompt_embeds is None and frames is None:
            raise InputError(
                "give a prompt, or frames" if self.has_captions else "this model goes on from frames: give some"
            )
        self.check_captions(prompt, prompt_embeds, prompt_attention_mask)
        check_count(num_videos_per_prompt, "num_videos_per_prompt")
        count = len([prompt] if isinstance(prompt, str) else prompt) if prompt is not None else None
        count = count if prompt_embeds is None else len(prompt_embeds)
        if frames is not None and count is not None and len(frames) not in (1, count):
            raise InputError(f"got {len(frames)} clips to begin with for {count} prompts: give one, or one for each")

    @torch.no_grad()
    def encode_inputs(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        num_videos_per_prompt: int = 1,
        guided: bool = True,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        given: Tensor | None = None,
        model: CosmosTransformer | None = None,
    ) -> Conditions:
        """See :class:`ARVideoPipeline`; ``model`` (the transformer) embeds. Without a prompt it is the null caption."""
        model = model or self.transformer
        inputs: list[dict[str, Any]] = [{}] * (1 if given is None else len(given))
        if prompt is not None or prompt_embeds is not None:
            rows, mask, inputs = self.caption_slots(model, prompt, prompt_embeds, prompt_attention_mask)
        else:
            rows, mask = self._unprompted(model, len(inputs))
            guided = False
        each = num_videos_per_prompt
        if given is not None:
            given = given.to(self._execution_device).expand(len(rows), -1).repeat_interleave(each, dim=0).contiguous()
        rows, mask = (part.repeat_interleave(each, dim=0) for part in (rows, mask))
        raster = self.make_raster(height, width, num_frames)
        size = {"num_frames": num_frames} if num_frames is not None else {}
        described = [one | size | with_given(given) for one in inputs for _ in range(each)]
        with in_use(model):
            streams = self.caption_streams(model, rows, mask, guided)
        return Conditions(*streams, described, raster, given)

    def conditions_of(self, records: Sequence[dict[str, Any]], guided: bool) -> Conditions:
        """See :class:`arsd.pipelines.provable.Provable`; what is given lies in the tokens of the record."""
        if self.has_captions:
            return super().conditions_of(records, guided)
        given = torch.zeros(len(records), records[0]["given_tokens"], dtype=torch.int64)
        return self.encode_inputs(given=given, guided=False, num_frames=records[0].get("num_frames"))

    @torch.no_grad()
    def null_conditions(self, batch: int, guided: bool) -> Conditions:
        """See :class:`ARPipeline`."""
        rows, mask = self._unprompted(self.transformer, batch)
        streams = self.caption_streams(self.transformer, rows, mask, guided and self.has_captions)
        raster = self.make_raster()
        given = None
        if not self.has_captions:  # its first frame is always given
            given = torch.zeros(batch, raster.frame_length, dtype=torch.int64, device=rows.device)
        return Conditions(*streams, [{}] * batch, raster, given)

    def _unprompted(self, model: CosmosTransformer, batch: int) -> tuple[Tensor, Tensor]:
        """Condition slots [B, T, D] and mask [B, T] without a prompt: the null caption, or one slot that is masked."""
        if not self.has_captions:
            condition, padding = stand_in(batch, model.config["hidden_size"], model.dtype, self._execution_device)
            return condition[0], (~padding[0]).long()
        with in_use(model):
            rows = model.embed_null_caption(batch)
        return rows, torch.ones(rows.shape[:2], dtype=torch.int64, device=rows.device)
