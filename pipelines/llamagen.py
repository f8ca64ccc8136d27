"""LlamaGen: class-conditional and text-to-image generation (arXiv 2406.06525)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsd.decoding import SJD, DecodingStrategy
from arsd.devices import in_use
from arsd.errors import CheckpointError, InputError
from arsd.models.eagle import EagleDrafter
from arsd.models.llamagen import LlamaGenTransformer
from arsd.models.llamagen_files import load_transformer, load_vq
from arsd.models.raster import Raster
from arsd.models.text_encoders import load_t5_encoder
from arsd.pipelines.base import ARImagePipeline
from arsd.pipelines.captioned import Captioned
from arsd.pipelines.checks import check_count, check_labels, dtype_of, saved_component
from arsd.pipelines.outputs import Conditions, with_given
from arsd.tokenizers.vq import VQTokenizer

PUBLISHED_SAMPLING = {
    "class": {"guidance_scale": 4.0, "top_k": 2000, "temperature": 1.0},
    "text": {"guidance_scale": 7.5, "top_k": 1000, "temperature": 1.0},
}
"""What upstream's sampling scripts use; its evaluation of class models has guidance 1.5 to 2 and no top-k."""


class LlamaGenPipeline(Captioned, ARImagePipeline):
    """Pictures from class labels or prompts, token by token or many tokens per pass.

    Args:
        transformer: the autoregressive model.
        vq: the image tokenizer.
        decoder: decoding strategy; :class:`arsd.SJD` with the ``gumbel`` coupling when none is given.
        tokenizer: caption tokenizer (text models only).
        text_encoder: T5 encoder (text models only).
        drafter: draft model for the strategies that want one: an :class:`arsd.EagleDrafter`, or a smaller
            :class:`LlamaGenTransformer` of the same codes and conditions.
        clean_captions: pass prompts through :func:`arsd.models.captions.clean_caption` first, as published text models want.
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
        clean_captions: bool = False,
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
        self.register_to_config(clean_captions=clean_captions)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, vq: Any = None, dtype: Any = None, **options: Any
    ) -> Any:
        """Load a pipeline folder; ``vq`` may be the path of another image tokenizer, or an object. See diffusers."""
        dtype = dtype_of(dtype, options)
        if vq is not None:
            options["vq"] = vq if isinstance(vq, VQTokenizer) else _tokenizer(vq, dtype)
        return cls.from_saved(pretrained_model_name_or_path, dtype, options)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        vq: str | Path | VQTokenizer | None = None,
        text_encoder: str | Path | Any = None,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        image_size: int | None = None,
        num_heads: int | None = None,
        decoder: DecodingStrategy | None = None,
        drafter: EagleDrafter | LlamaGenTransformer | None = None,
    ) -> LlamaGenPipeline:
        """A pipeline of published files.

        Args:
            path: the transformer: ``c2i_*.pt``, ``t2i_*.pt``, or a folder of the hub.
            vq: the image tokenizer that goes with it: ``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt`` or ``vq_ds16_t2i.pt``.
            text_encoder: the folder of google/flan-t5-xl, or an encoder (text models; without one give ``prompt_embeds``).
            tokenizer: with an encoder that is an object, its tokenizer.
            dtype: of all weights; by default that of the files.
            image_size: pixels along one side, where neither the file's name nor a ``config.json`` tells.
            num_heads: attention heads, for sizes that were never published.
            decoder: decoding strategy.
            drafter: draft model.

        Raises:
            CheckpointError: when a file is missing, damaged or something else, or the files do not belong together.
        """
        if vq is None:
            what = "is a transformer without its image tokenizer"
            raise CheckpointError(f"{path} {what}: give vq=..., vq_ds16_c2i.pt for classes or vq_ds16_t2i.pt for text")
        given = {"vq": vq, "text_encoder": text_encoder}
        sources = [Path(path), *([] if isinstance(vq, VQTokenizer) else [Path(vq)])]
        vq = vq if isinstance(vq, VQTokenizer) else _tokenizer(vq, dtype)
        if image_size is not None and (image_size < 1 or image_size % vq.downsample_factor):
            raise InputError(f"image_size must be a multiple of {vq.downsample_factor} pixels, not {image_size}")
        grid = None if image_size is None else image_size // vq.downsample_factor
        transformer = load_transformer(path, grid=grid, num_heads=num_heads, dtype=dtype)
        is_text = transformer.config["condition"] == "text"
        if len(vq.codebook) != transformer.config["vocab_size"]:
            codes = f"{len(vq.codebook)} codes, the transformer {transformer.config['vocab_size']}"
            raise CheckpointError(f"the image tokenizer has {codes}: give files that belong together")
        if isinstance(text_encoder, (str, Path)):
            sources.append(Path(text_encoder))
            tokenizer, text_encoder = load_t5_encoder(text_encoder, dtype=dtype or transformer.dtype)
        if text_encoder is not None and is_text and text_encoder.config.d_model != transformer.config["caption_dim"]:
            wide = f"{text_encoder.config.d_model} wide, the model reads {transformer.config['caption_dim']}"
            raise CheckpointError(f"the features of the text encoder are {wide}: it wants google/flan-t5-xl")
        transformer.register_to_config(sampling=PUBLISHED_SAMPLING[transformer.config["condition"]])
        pipe = cls(transformer, vq, decoder, tokenizer, text_encoder, drafter, clean_captions=is_text)
        pipe.remember_sources(*sources, parts=given)
        return pipe

    @property
    def image_size(self) -> int:
        """Pixels along one side."""
        return int(self.transformer.config["grid"]) * self.vq.downsample_factor

    @property
    def takes_classes(self) -> bool:
        """See :class:`ARImagePipeline`."""
        return bool(self.transformer.config["condition"] == "class")

    def make_raster(self, height: int | None = None, width: int | None = None) -> Raster:
        """See :class:`ARImagePipeline`; every code is allowed everywhere."""
        if any(side not in (None, self.image_size) for side in (height, width)):
            raise InputError(f"this model makes pictures of {self.image_size} x {self.image_size} pixels only")
        grid = int(self.transformer.config["grid"])
        return Raster(grid, grid, int(self.transformer.config["vocab_size"]))

    def check_inputs(
        self,
        height: int | None,
        width: int | None,
        num_images_per_prompt: int,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        **unknown: Any,
    ) -> None:
        """Raise InputError for anything that the model cannot work with."""
        if unknown:
            raise InputError(f"this model knows no {', '.join(unknown)}")
        given = [x is not None for x in (prompt, class_labels, prompt_embeds)]
        if sum(given) != 1:
            raise InputError("give exactly one of prompt, class_labels and prompt_embeds")
        wants_text = self.transformer.config["condition"] == "text"
        if wants_text != (class_labels is None):
            raise InputError(
                "this model is text-conditional: give a prompt" if wants_text else "this model needs class_labels"
            )
        self.check_captions(prompt, prompt_embeds, prompt_attention_mask)
        check_count(num_images_per_prompt)
        self.make_raster(height, width)

    @torch.no_grad()
    def encode_inputs(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        num_images_per_prompt: int = 1,
        guided: bool = True,
        height: int | None = None,
        width: int | None = None,
        given: Tensor | None = None,
        model: LlamaGenTransformer | None = None,
    ) -> Conditions:
        """See :class:`ARImagePipeline`.

        A prompt is encoded unless its ``prompt_embeds`` are given as well; ``model`` (the transformer) embeds them.

        Raises:
            InputError: for labels that are none.
        """
        model = model or self.transformer
        device, mask = self._execution_device, None
        if class_labels is not None:
            labels = check_labels(class_labels, device)
            with in_use(model):
                rows, inputs = model.embed_classes(labels), [{"class_label": n} for n in labels.tolist()]
        else:
            rows, mask, inputs = self.caption_slots(model, prompt, prompt_embeds, prompt_attention_mask)
            mask = mask.repeat_interleave(num_images_per_prompt, dim=0)
        rows = rows.repeat_interleave(num_images_per_prompt, dim=0)
        given = None if given is None else given.to(device)
        each = [one | with_given(given) for one in inputs for _ in range(num_images_per_prompt)]
        with in_use(model):
            return self._conditions(model, rows, mask, guided, each, given)

    @torch.no_grad()
    def null_conditions(self, batch: int, guided: bool) -> Conditions:
        """See :class:`ARImagePipeline`."""
        if self.transformer.config["condition"] == "text":
            rows = self.transformer.embed_null_caption(batch)
            mask = torch.ones(rows.shape[:2], device=rows.device)
            return self._conditions(self.transformer, rows, mask, guided, [{}] * batch)
        labels = torch.arange(batch, device=self._execution_device) % self.transformer.config["num_classes"]
        return self._conditions(self.transformer, self.transformer.embed_classes(labels), None, guided, [{}] * batch)

    def _conditions(
        self,
        model: LlamaGenTransformer,
        rows: Tensor,
        mask: Tensor | None,
        guided: bool,
        inputs: list[dict[str, Any]],
        given: Tensor | None = None,
    ) -> Conditions:
        """Both streams; the null stream reuses the conditional padding, as upstream does."""
        padding, condition = None, rows[None]
        if mask is not None:
            condition, padding = self.caption_streams(model, rows, mask, guided)
        elif guided:
            labels = torch.full((len(rows),), model.config["num_classes"], device=rows.device)
            condition = torch.stack([rows, model.embed_classes(labels)])
        return Conditions(condition, padding, inputs, self.make_raster(), given)


def _tokenizer(source: Any, dtype: torch.dtype | None) -> VQTokenizer:
    """A published image tokenizer, or one that ``save_pretrained`` wrote."""
    if (Path(source) / "diffusion_pytorch_model.safetensors").is_file():
        tokenizer: VQTokenizer = saved_component(VQTokenizer, source, dtype)
        return tokenizer
    return load_vq(source, dtype=dtype)
