"""GLM-Image (huggingface.co/zai-org/GLM-Image): its language model decoded here, its pictures painted by diffusers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, GlmImagePipeline, GlmImageTransformer2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from arsd.decoding import SJD, DecodingStrategy, LawConfig
from arsd.devices import in_use
from arsd.errors import CheckpointError, InputError
from arsd.models.eagle import EagleDrafter
from arsd.models.glm_image import FACTOR, GlmImageProtocol, place_by, upsampled
from arsd.models.glm_image_files import glm_image_kind, load_glm_image
from arsd.models.raster import Raster
from arsd.models.target import DecoderTarget
from arsd.pipelines.base import DraftMaker, TargetMaker
from arsd.pipelines.checks import check_image_size, check_sampling, dtype_of
from arsd.pipelines.outputs import Conditions
from arsd.pipelines.token_images import TokenImagePipeline

WORDS = ("image_start_token_id", "image_end_token_id", "image_token_id")  # of a configuration
PAINTERS = ("dit", "vae", "text_encoder", "tokenizer", "scheduler")
MOST_STEPS = 1000


class GLMImagePipeline(TokenImagePipeline):
    """GLM-Image from its published folder.

    The language model (``transformer``, the ``vision_language_encoder`` of diffusers) writes the codes of a small preview
    and of the picture; a diffusion model (``dit``, the ``transformer`` of diffusers) paints what they say. Codes alone,
    ``output_type="latent"``, need no diffusion model: it and the other parts that paint may be ``None``.

    ``height`` and ``width`` are multiples of 32. ``prompt_images`` are PIL pictures that the prompt speaks of: a list for
    all prompts, or a list of lists, one for each. The language model has no guidance, so ``guidance_scale`` is refused; that
    of the diffusion model is ``dit_guidance_scale``. A picture is painted by itself, with noise that belongs to its seed and
    index; its record says how.

    Args:
        transformer: the language model, a ``GlmImageForConditionalGeneration``.
        processor: its ``GlmImageProcessor``.
        dit: the diffusion model.
        vae: decodes its latents.
        text_encoder: of the words to be written in a picture.
        tokenizer: of the text encoder.
        scheduler: of the diffusion model.
        decoder: decoding strategy; :class:`arsd.SJD` with the ``gumbel`` coupling when none is given.
        drafter: a smaller language model with the same codes.
        image_size: side of a square picture in pixels; 1024 when ``None``.
        sampling: sampling options instead of the published ones (fields of :class:`arsd.decoding.LawConfig`).
        num_inference_steps: of the diffusion model; the attribute may be set.
        dit_guidance_scale: of the diffusion model; the attribute may be set.
    """

    model_cpu_offload_seq = "transformer->text_encoder->dit->vae"
    _optional_components = ["decoder", "drafter", *PAINTERS]
    _same_pixels_elsewhere = False
    default_size = 1024
    num_inference_steps: int
    dit_guidance_scale: float

    def __init__(
        self,
        transformer: Any,
        processor: Any,
        dit: GlmImageTransformer2DModel | None = None,
        vae: AutoencoderKL | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        decoder: DecodingStrategy | None = None,
        drafter: Any = None,
        image_size: int | None = None,
        sampling: dict[str, Any] | None = None,
        num_inference_steps: int = 50,
        dit_guidance_scale: float = 1.5,
    ) -> None:
        language, painting = getattr(transformer, "config", None), getattr(dit, "config", None)
        codes = getattr(getattr(language, "vq_config", None), "num_embeddings", None)
        if codes is None:
            raise InputError(f"transformer must be the language model of GLM-Image, not a {type(transformer).__name__}")
        if painting is not None and painting["prior_vq_quantizer_codebook_size"] != codes:
            known = painting["prior_vq_quantizer_codebook_size"]
            raise CheckpointError(f"the diffusion model knows {known} codes, the language model {codes}")
        super(TokenImagePipeline, self).__init__()  # whose own components are others
        check_sampling(sampling)
        check_image_size(image_size)
        self.register_modules(transformer=transformer, processor=processor, dit=dit, vae=vae, text_encoder=text_encoder)
        decoder = decoder if decoder is not None else SJD()
        self.register_modules(tokenizer=tokenizer, scheduler=scheduler, decoder=decoder, drafter=drafter)
        self.num_inference_steps, self.dit_guidance_scale = num_inference_steps, dit_guidance_scale
        painting = {"num_inference_steps": num_inference_steps, "dit_guidance_scale": dit_guidance_scale}
        self.register_to_config(image_size=image_size or self.default_size, sampling=sampling, **_painting(painting))

    @classmethod
    def of(cls, pipe: GlmImagePipeline, **options: Any) -> GLMImagePipeline:
        """A pipeline with the components of diffusers' pipeline, which it shares.

        Args:
            pipe: as it was loaded by diffusers.
            options: of this class.
        """
        named = {name: getattr(pipe, name) for name in ("processor", "vae", "text_encoder", "tokenizer", "scheduler")}
        made = cls(pipe.vision_language_encoder, dit=pipe.transformer, **named, **options)
        made.hf_device_map = pipe.hf_device_map
        return made

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, dtype: torch.dtype | str | None = None, **options: Any
    ) -> Any:
        """Load a published folder, or one that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: a local folder, or a hub id.
            dtype: of all weights (``torch_dtype`` is the same); by default that of the language model's files.
            options: arguments of this class, ``revision`` and ``cache_dir`` of the hub, and what diffusers'
                ``from_pretrained`` takes: ``device_map``, ``quantization_config`` (with diffusers' names of the parts) and
                so on. ``dit=None, vae=None, text_encoder=None`` loads the language model alone.

        Raises:
            CheckpointError: for a folder of another kind, and missing or damaged files.
        """
        from arsd.pipelines.auto import find_model

        dtype = dtype_of(dtype, options)
        hub = {name: options.pop(name) for name in ("revision", "cache_dir") if name in options}
        folder = find_model(pretrained_model_name_or_path, **hub)
        if options.pop("vq", None) is not None:
            raise InputError("GLM-Image has no image tokenizer of its own: leave out vq")
        if glm_image_kind(folder) is None:
            if not (folder / "model_index.json").is_file():
                raise CheckpointError(f"{folder} has no model_index.json: give the whole folder of GLM-Image")
            return super().from_pretrained(folder, dtype=dtype, **options)
        names = ("decoder", "drafter", "image_size", "sampling", "num_inference_steps", "dit_guidance_scale")
        own = {name: options.pop(name) for name in names if name in options}
        theirs = {"transformer": "vision_language_encoder", "dit": "transformer"}
        given = {theirs.get(name, name): value for name, value in options.items()}
        pipe = cls.of(load_glm_image(folder, dtype, **given), **own)
        pipe.make_raster()  # a processor or size that does not fit is refused now, not at the first prompt
        pipe.remember_sources(folder, parts=options)
        return pipe

    @classmethod
    def _check_saved_vq(cls, folder: Path, is_local: bool) -> None:
        """See :class:`TokenImagePipeline`: there is none."""

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        types: dict[str, Any] = super(TokenImagePipeline, cls)._get_signature_types()
        return types

    # --------------------------------------------------------------------------------------------------- the language model

    @property
    def protocol(self) -> GlmImageProtocol:
        """What the family does with words and codes."""
        return GlmImageProtocol(self.processor, self.transformer, self.config["image_size"], self.config["sampling"])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the language model."""
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    @property
    def vq(self) -> Any:
        """What makes codes of features: there is nothing that makes pictures of codes."""
        return self.transformer.model.vqmodel

    @property
    def codebook(self) -> Tensor:
        """See :class:`ARImagePipeline`; codes are compared by their directions."""
        embedding = self.vq.quantize.embedding
        with in_use(self.transformer, embedding):
            return self.protocol.codebook(F.normalize(embedding.weight.to(self._execution_device), dim=-1))

    def law_config(self, given: dict[str, Any]) -> LawConfig:
        """See :class:`ARImagePipeline`.

        Raises:
            InputError: for guidance, which the language model does not have.
        """
        config = super().law_config(given)
        if (config.guidance_scale, config.image_guidance_scale) != (1, 1):
            raise InputError(
                "the language model of GLM-Image has no guidance: leave out guidance_scale; that of the diffusion model is "
                "the pipeline's dit_guidance_scale"
            )
        return config

    @torch.no_grad()
    def encode_inputs(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] = (),
        prompt_images: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guided: bool = False,
        height: int | None = None,
        width: int | None = None,
        given: Tensor | None = None,
        slots: int | None = None,
        model: Any = None,
    ) -> Conditions:
        """See :class:`TokenImagePipeline`.

        Raises:
            InputError: for inputs that the models cannot work with, guidance among them.
        """
        protocol, size = self.protocol, self._size(height, width)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._negative(negative_prompt, len(prompts))
        if any(self.processor.image_token in text for text in prompts):
            raise InputError(
                f"a prompt of GLM-Image holds no {self.processor.image_token}: give the pictures as prompt_images"
            )
        images, raster = _images_of(prompt_images, len(prompts)), protocol.raster(*size)
        if prompt_images is not None:
            raster = replace(raster, preview=(0, 0))
        if guided:
            protocol.null_ids(*size)
        with in_use(self.transformer):
            pairs = zip(prompts, images, strict=True)
            readings = [protocol.read(text, raster, held, self.transformer) for text, held in pairs]
        streams = [[reading.ids for reading in readings]]
        known = self._embedded(streams, slots, num_images_per_prompt, model or self.transformer)
        made_of: dict[str, Any] = {"height": size[0], "width": size[1], "slots": known["ids"].shape[2]}
        made_of |= {"prompt_images": len(images[0])} if prompt_images is not None else {}
        made_of |= {"num_inference_steps": self.num_inference_steps, "dit_guidance_scale": self.dit_guidance_scale}
        inputs = [{"prompt": text} | made_of for text in prompts for _ in range(num_images_per_prompt)]
        extra = [reading for reading in readings for _ in range(num_images_per_prompt)]
        return Conditions(inputs=inputs, raster=raster, given=given, extra=extra, **known)

    def target_maker(self, conditions: Conditions, model: Any = None) -> TargetMaker:
        """See :class:`ARImagePipeline`."""
        make = super().target_maker(conditions, model)

        def make_target(pass_tokens: int, batch: int) -> DecoderTarget:
            target: DecoderTarget = make(pass_tokens, batch)
            place_by(conditions.extra or [], target)
            return target

        return make_target

    def draft_maker(self, conditions: Conditions, batch: int, encode: Callable[..., Conditions]) -> DraftMaker | None:
        """See :class:`ARImagePipeline`.

        Raises:
            InputError: for a drafter that is no smaller language model with the same codes.
        """
        config = getattr(self.drafter, "config", None)
        if self.drafter is not None:
            same = [getattr(config, name, None) == getattr(self.transformer.config, name) for name in WORDS]
            if isinstance(self.drafter, EagleDrafter) or not all(same):
                kind = type(self.drafter).__name__
                raise InputError(f"the drafter of GLM-Image is a smaller model with the same words, not this {kind}")
        return super().draft_maker(conditions, batch, encode)

    def _decoder(self, model: Any) -> Any:
        return model.model.language_model

    # ------------------------------------------------------------------------------------------------- the diffusion model

    @property
    def diffusers(self) -> GlmImagePipeline:
        """Diffusers' pipeline with the same components, and a scheduler of its own: calls may run in parallel.

        Raises:
            InputError: when a part is missing.
        """
        missing = [name for name in PAINTERS if getattr(self, name, None) is None]
        if missing:
            raise InputError(f"pictures need {', '.join(missing)}, loaded as None: ask for output_type='latent', the codes")
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        first = (self.tokenizer, self.processor, self.text_encoder, self.transformer)
        pipe = GlmImagePipeline(*first, self.vae, self.dit, scheduler)
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return pipe

    def check_output(self, output_type: str, callback_inputs: Sequence[str]) -> None:
        """See :class:`ARImagePipeline`; parts that are missing are named before anything is decoded."""
        super().check_output(output_type, callback_inputs)
        if output_type != "latent":
            self.diffusers  # noqa: B018
            _painting({"num_inference_steps": self.num_inference_steps, "dit_guidance_scale": self.dit_guidance_scale})

    def sketch(self, tokens: Tensor, raster: Raster) -> list[Image.Image]:
        """See :class:`ARImagePipeline`: codes as shades of grey, which say where they differ and nothing else."""
        shades = (255 * raster.to_codes(tokens) / (raster.codes - 1)).round().to("cpu", torch.uint8)
        size = (raster.columns * FACTOR, raster.rows * FACTOR)
        return [Image.fromarray(one.numpy()).convert("RGB").resize(size, Image.Resampling.NEAREST) for one in shades]

    def decode_pixels(self, tokens: Tensor, raster: Raster | None = None) -> Tensor:
        """Codes alone are no picture.

        Raises:
            InputError: always.
        """
        raise InputError("codes of GLM-Image are no picture without their prompt: paint takes both")

    @torch.no_grad()
    def paint(
        self, tokens: Tensor, raster: Raster, made_of: Sequence[dict[str, Any]], extra: Sequence[Any] | None = None
    ) -> Tensor:
        """See :class:`ARImagePipeline`; each picture by itself, with the noise of its seed and index."""
        pictures = []
        for i, (codes, record) in enumerate(zip(raster.to_codes(tokens), made_of, strict=True)):
            painting = _painting(record)
            options: dict[str, Any] = {"height": raster.rows * FACTOR, "width": raster.columns * FACTOR, "output_type": "pt"}
            options |= {"num_inference_steps": painting["num_inference_steps"], "prior_token_ids": upsampled(codes)[None]}
            options |= {"guidance_scale": painting["dit_guidance_scale"], "generator": _noise(record)}
            if extra is not None and extra[i].images:
                ids, grids = extra[i].prior()
                options |= {"image": [list(extra[i].images)], "prior_token_image_ids": [ids.to(codes.device)]}
                options |= {"source_image_grid_thw": [grids.to(codes.device)]}
            pictures.append(self.diffusers(prompt=[record["prompt"]], **options).images.float())
        return torch.cat(pictures)


def _painting(record: dict[str, Any]) -> dict[str, Any]:
    """How the diffusion model paints.

    Raises:
        InputError: for numbers that it cannot work with.
    """
    steps, scale = record.get("num_inference_steps"), record.get("dit_guidance_scale")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise InputError(f"num_inference_steps must be a whole number in 1..{MOST_STEPS}, not {steps!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
        raise InputError(f"dit_guidance_scale must be a number >= 0, not {scale!r}")
    return {"num_inference_steps": steps, "dit_guidance_scale": scale}


def _noise(record: dict[str, Any]) -> torch.Generator:
    """Where the noise of a picture comes from: on the CPU, so that it is the same on every device."""
    digest = hashlib.sha256(f"{record['noise_seed']} {record['image_index']}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _images_of(prompt_images: Any, prompts: int) -> list[list[Image.Image]]:
    """The pictures of each prompt.

    Raises:
        InputError: for anything but PIL pictures, one list for all prompts or one for each.
    """
    if prompt_images is None:
        return [[]] * prompts
    held = list(prompt_images) if isinstance(prompt_images, (list, tuple)) else [prompt_images]
    lists = [list(one) for one in held] if all(isinstance(one, (list, tuple)) for one in held) else [held] * prompts
    right = all(isinstance(image, Image.Image) for one in lists for image in one)
    if len(lists) != prompts or not right or not lists or len({len(one) for one in lists}) != 1 or not lists[0]:
        raise InputError("prompt_images must be PIL pictures: a list for all prompts, or a list of as many for each")
    return [[image.convert("RGB") for image in one] for one in lists]
