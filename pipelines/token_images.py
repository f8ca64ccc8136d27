"""The base of pipelines for language models that write image codes (Lumina-mGPT, Anole, Emu3, Janus-Pro and others)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from arsd.decoding import SJD, DecodingStrategy
from arsd.decoding.small_ar import SmallARDrafter
from arsd.decoding.types import DraftModel
from arsd.devices import in_use
from arsd.errors import CheckpointError, InputError, warn_caller
from arsd.models.eagle import EagleDrafter
from arsd.models.eagle_draft import EagleDraftModel
from arsd.models.folders import PublishedFiles, config_of, read_json
from arsd.models.raster import Raster
from arsd.models.target import DecoderTarget
from arsd.models.token_images import CodeEmbedding, CodeHead, TokenProtocol
from arsd.pipelines.base import ARImagePipeline, DraftMaker, TargetMaker
from arsd.pipelines.checks import (
    check_count,
    check_image_size,
    check_negative,
    check_prompts,
    check_sampling,
    dtype_of,
    saved_component,
)
from arsd.pipelines.outputs import Conditions, with_given
from arsd.pipelines.prefix import to_pixels

MOST_SLOTS = 1 << 13  # of a prompt; the longest pass reads them all, and its attention grows with their square
MOST_TOKENS = 1 << 20  # of a picture
SLOTS = 32  # conditions are padded to a multiple of it, so that the bits of a picture seldom depend on the other prompts


class TokenImagePipeline(ARImagePipeline):
    """Pictures from prompts, with a language model that writes image codes between its words.

    A subclass names its protocol and how its published folders are read; everything else is the same for all such families.
    One whose codes have an embedding and a head of their own (Janus-Pro) says where they are.

    Args:
        transformer: the language model with its head.
        vq: the image tokenizer.
        tokenizer: the text tokenizer.
        decoder: decoding strategy; :class:`arsd.SJD` with the ``gumbel`` coupling when none is given.
        drafter: an :class:`arsd.EagleDrafter`, or a smaller model of the same family and vocabulary.
        image_size: side of a square picture in pixels; the family's own when ``None``.
        sampling: sampling options instead of the published ones (fields of :class:`arsd.decoding.LawConfig`).
    """

    model_cpu_offload_seq = "transformer->vq"
    _recorded_size = ("height", "width", "slots")
    _optional_components = ["decoder", "drafter"]
    protocol_class: ClassVar[Callable[..., TokenProtocol]]
    default_size: ClassVar[int]
    files: ClassVar[PublishedFiles]

    def __init__(
        self,
        transformer: Any,
        vq: Any,
        tokenizer: Any,
        decoder: DecodingStrategy | None = None,
        drafter: Any = None,
        image_size: int | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_sampling(sampling)
        check_image_size(image_size)
        decoder = decoder if decoder is not None else SJD()
        self.register_modules(transformer=transformer, vq=vq, tokenizer=tokenizer, decoder=decoder, drafter=drafter)
        self.register_to_config(image_size=image_size or self.default_size, sampling=sampling)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        vq: Any = None,
        dtype: torch.dtype | str | None = None,
        image_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Load a published folder, or one that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: a local folder, or a hub id.
            vq: the image tokenizer, where it is not beside the weights: its published file or folder, a saved one, or an
                object.
            dtype: of all weights (``torch_dtype`` is the same); by default that of the files.
            image_size: side of a square picture; by default what the folder's name says (512, 768, 1024), else the family's.
            options: components (``decoder=...``, ``drafter=...``, ``tokenizer=...``, also as a folder), ``revision`` and
                ``cache_dir`` of the hub, and what transformers' ``from_pretrained`` takes: ``device_map``, ``max_memory``,
                ``offload_folder``, ``quantization_config``, ``attn_implementation``.

        Raises:
            CheckpointError: for a folder of another kind, missing or damaged files, or a tokenizer that does not fit.
        """
        from arsd.pipelines.auto import find_model
        from arsd.pipelines.families import check_class

        dtype = dtype_of(dtype, options)
        hub = {name: options.pop(name) for name in ("revision", "cache_dir") if name in options}
        folder = find_model(pretrained_model_name_or_path, **hub)
        vq = find_model(vq) if isinstance(vq, (str, Path)) else vq
        if isinstance(options.get("tokenizer"), (str, Path)):
            options["tokenizer"] = find_model(options["tokenizer"])
        given = {**options} if vq is None else {**options, "vq": vq}
        if vq is not None:
            vq = options["vq"] = cls._image_tokenizer(vq, dtype)
        if (folder / "model_index.json").is_file():
            check_class(folder, cls)
            if vq is None:
                cls._check_saved_vq(folder, Path(pretrained_model_name_or_path).exists())
            if image_size is not None:
                options["image_size"] = image_size
            pipe = super().from_pretrained(str(folder), dtype=dtype, **options)
            pipe.remember_sources(folder, parts=options)
            return pipe
        kind = cls.files.find_kind(folder)
        if kind not in cls.files.kinds:
            found = "nothing that is known" if kind is None else f"{kind} weights"
            raise CheckpointError(f"{folder} holds {found}, not those of {cls.__name__}: give another folder")
        names = ("decoder", "drafter", "sampling", "tokenizer", "vq")
        own = {name: options.pop(name) for name in names if name in options}
        if isinstance(own.get("drafter"), (str, Path)):
            raise InputError(f"drafter must be a model, not the path {str(own['drafter'])!r}: load it first")
        tokenizer = own.pop("tokenizer", None) or folder
        if isinstance(tokenizer, (str, Path)):
            tokenizer = cls.files.tokenizer(Path(tokenizer))
        source = cls.files.vq_source(folder) if vq is None else given["vq"]
        image_tokenizer = own.pop("vq", None) or cls._image_tokenizer(source, dtype)
        transformer = cls.files.network(folder, dtype=dtype, **options)
        if "device_map" in options and not hasattr(image_tokenizer, "hf_device_map"):
            place = transformer.get_input_embeddings().weight.device  # where prompts are read
            image_tokenizer.to(place if place.type != "meta" else "cpu")
        size = cls._size_of(folder, str(pretrained_model_name_or_path)) if image_size is None else image_size
        pipe = cls(transformer, image_tokenizer, tokenizer, image_size=size, **own)
        pipe.make_raster()  # a tokenizer or size that does not fit is refused now, not at the first prompt
        apart = [place for place in (source, given.get("tokenizer")) if isinstance(place, (str, Path))]
        files = [place for place in apart if Path(place) != folder]
        pipe.remember_sources(folder, *files, parts={name: part for name, part in given.items() if name not in options})
        return pipe

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        """What ``from_pipe`` hands over; diffusers reads the annotations, and ``vq`` is of the class that the family has."""
        types: dict[str, Any] = super()._get_signature_types()
        return types | {"vq": (cls.files.vq_class,)}

    @classmethod
    def _size_of(cls, folder: Path, name: str) -> int | None:
        """The side of pictures that a published folder tells, if it does: by its name, or the hub id that was given."""
        named = re.search(r"(?<!\d)(512|768|1024)(?!\d)", folder.resolve().name if Path(name).exists() else name)
        return int(named[1]) if named else None

    @classmethod
    def _check_saved_vq(cls, folder: Path, is_local: bool) -> None:
        """Nothing but the family's own image tokenizer is loaded, and none that is a program unless it was put there."""
        part = read_json(folder / "model_index.json").get("vq")
        found, wanted = part[-1] if isinstance(part, list) and part else None, cls.files.vq_class
        if found != wanted.__name__:
            raise CheckpointError(
                f"{folder} has the image tokenizer {found}, {cls.__name__} wants {wanted.__name__}: give vq=..."
            )
        if getattr(wanted, "runs_code", False) and not is_local:
            what = f"{folder} holds an image tokenizer whose files are programs"
            raise CheckpointError(f"{what}: download the folder and give its path if you trust it, or give vq=...")

    @classmethod
    def _image_tokenizer(cls, source: Any, dtype: torch.dtype | None) -> Any:
        """Of an object, a folder that ``save_pretrained`` wrote, or what was published."""
        wanted = cls.files.vq_class
        if isinstance(source, wanted):
            return source
        if isinstance(source, (str, Path)) and config_of(Path(source)).get("_class_name") == wanted.__name__:
            return saved_component(wanted, source, dtype)
        return cls.files.vq(source, dtype=dtype)

    @property
    def protocol(self) -> TokenProtocol:
        """What the family does with words and codes."""
        parts = (self.tokenizer, self.vq, self.transformer)
        made_for, protocol = self.__dict__.get("_protocol", ((), None))
        if protocol is None or any(known is not part for known, part in zip(made_for, parts, strict=True)):
            protocol = self._make_protocol()
            self.__dict__["_protocol"] = parts, protocol
        return protocol

    def _make_protocol(self) -> TokenProtocol:
        known = (self.tokenizer, len(self.vq.codebook), self.vq.downsample_factor, self.config["image_size"])
        return type(self).protocol_class(*known, self.config["sampling"], **self.protocol_options())

    def protocol_options(self) -> dict[str, Any]:
        """What only the weights' configuration tells the protocol."""
        return {}

    @property
    def sampling(self) -> dict[str, Any]:
        """See :class:`ARImagePipeline`."""
        return self.protocol.sampling

    @property
    def codebook(self) -> Tensor:
        """See :class:`ARImagePipeline`."""
        return self.protocol.codebook(self.vq.codebook)

    def make_raster(self, height: int | None = None, width: int | None = None) -> Raster:
        """See :class:`ARImagePipeline`."""
        raster = self.protocol.raster(*self._size(height, width))
        if raster.num_tokens > MOST_TOKENS:
            raise InputError(f"a picture of this size has {raster.num_tokens} tokens: at most {MOST_TOKENS} can be drawn")
        return raster

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        for name, side in (("height", height), ("width", width)):
            if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 1):
                raise InputError(f"{name} must be a number of pixels, not {side!r}")
        side = self.protocol.size
        return (height or side), (width or side)

    def check_inputs(
        self,
        height: int | None,
        width: int | None,
        num_images_per_prompt: int,
        prompt: str | Sequence[str] | None = None,
        prompt_images: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        **unknown: Any,
    ) -> None:
        """Raise InputError for anything that the model cannot work with."""
        if unknown:
            raise InputError(f"this model takes prompts: leave out {', '.join(unknown)}")
        if prompt is None:
            raise InputError("this model is text-conditional: give a prompt")
        prompts = check_prompts(prompt)
        self._negative(negative_prompt, len(prompts))
        check_count(num_images_per_prompt)
        self.make_raster(height, width)
        if advice := self.protocol.advice(*self._size(height, width)):
            warn_caller(advice)

    @torch.no_grad()
    def encode_inputs(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] = (),
        prompt_images: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        guided: bool = True,
        height: int | None = None,
        width: int | None = None,
        given: Tensor | None = None,
        slots: int | None = None,
        model: Any = None,
    ) -> Conditions:
        """See :class:`ARImagePipeline`.

        Streams and prompts of different lengths are padded on the left to a common number of slots, a multiple of
        :data:`SLOTS`, or to ``slots`` if that is more; every stream begins at position 0.

        Raises:
            InputError: for inputs that the model cannot work with.
        """
        size = self._size(height, width)
        raster = self.protocol.raster(*size)
        images = [] if prompt_images is None else self._codes_of(prompt_images)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = self._negative(negative_prompt, len(prompts))
        if negative_prompt is not None and not guided:
            raise InputError("without guidance nothing reads negative_prompt: leave it out, or guide")
        streams = [[self.protocol.prompt_ids(text, *size, images) for text in prompts]]
        if guided and images:
            streams.append([self.protocol.image_only_ids(*size, images)] * len(prompts))
        if guided:
            pairs = zip(streams[0], negative, strict=True)
            streams.append([self.protocol.null_ids(*size, ids, words) for ids, words in pairs])
        known = self._embedded(streams, slots, num_images_per_prompt, model or self.transformer)
        made_of = {"height": size[0], "width": size[1], "slots": known["ids"].shape[2]} | with_given(given)
        made_of |= {"prompt_images": len(images)} if images else {}
        asked = [{"prompt": text} for text in prompts]
        asked = [one | ({} if no is None else {"negative_prompt": no}) for one, no in zip(asked, negative, strict=True)]
        inputs = [one | made_of for one in asked for _ in range(num_images_per_prompt)]
        given = None if given is None else given.to(self._execution_device)
        return Conditions(inputs=inputs, raster=raster, given=given, **known)

    def _embedded(
        self, streams: Sequence[Sequence[list[int]]], slots: int | None, repeats: int, model: Any
    ) -> dict[str, Any]:
        """Streams of prompts, padded on the left and each ``repeats`` times, as :class:`Conditions` take them."""
        if slots is not None and (isinstance(slots, bool) or not isinstance(slots, int) or not 0 < slots <= MOST_SLOTS):
            raise InputError(f"slots must be a whole number in 1..{MOST_SLOTS}, not {slots!r}")
        longest = max(slots or 0, *(len(ids) for stream in streams for ids in stream))
        if longest > MOST_SLOTS:
            raise InputError(f"the prompt has {longest} words for the model: give one of {MOST_SLOTS} or fewer")
        longest, device = -(-longest // SLOTS) * SLOTS, self._execution_device
        rows = [[[0] * (longest - len(ids)) + ids for ids in stream] for stream in streams]
        padded = [[[True] * (longest - len(ids)) + [False] * len(ids) for ids in stream] for stream in streams]
        ids, padding = (torch.tensor(x, device=device).repeat_interleave(repeats, dim=1) for x in (rows, padded))
        with in_use(model):
            return {"condition": self._embed(model)(ids), "padding": padding, "ids": ids}

    def _negative(self, negative_prompt: Any, prompts: int) -> list[str | None]:
        if negative_prompt is not None and self.protocol.negative_prompt is None:
            raise InputError("the unconditional stream of this model has no words: leave out negative_prompt")
        return check_negative(negative_prompt, prompts)

    def null_conditions(self, batch: int, guided: bool) -> Conditions:
        """See :class:`ARImagePipeline`."""
        return self.encode_inputs([""] * batch, guided=guided)

    def target_maker(self, conditions: Conditions, model: Any = None) -> TargetMaker:
        """See :class:`ARImagePipeline`."""
        model = model or self.transformer
        condition, total = conditions.condition, conditions.raster.num_tokens
        head, embed = self._head(model, condition.device), self._code_embedding(model, condition.device)

        def make_target(pass_tokens: int, batch: int) -> DecoderTarget:
            rest = (total, pass_tokens, conditions.padding, batch, conditions.given)
            return DecoderTarget(self._decoder(model), head, embed, condition, *rest, count_padding=False)

        return make_target

    def draft_maker(self, conditions: Conditions, batch: int, encode: Callable[..., Conditions]) -> DraftMaker | None:
        """See :class:`ARImagePipeline`."""
        drafter, model, total = self.drafter, self.transformer, conditions.raster.num_tokens

        def make_eagle(window: int) -> DraftModel:
            condition = conditions.condition
            if drafter.embed_tokens is not None:
                known, words = drafter.embed_tokens.num_embeddings, self._embed(model).num_embeddings
                if known < words:
                    raise InputError(f"the drafter has {known} ids, the model {words}: it belongs to another model")
                condition = drafter.embed_tokens(conditions.ids).to(condition.dtype)
            head = self._head(model, condition.device)
            embed = self._code_embedding(model, condition.device)
            parts = (self._decoder(model).rotary_emb, head, embed, condition)
            ids = None if drafter.embed_tokens is None else self.protocol.local_ids.to(condition.device)
            rest = (conditions.padding, batch, conditions.given)
            return EagleDraftModel(drafter, *parts, total, window, *rest, count_padding=False, ids=ids)

        def make_small(window: int) -> DraftModel:
            maker = self.target_maker(encode(model=drafter), drafter)
            return SmallARDrafter(maker(max(window, 2), batch), window)

        if drafter is None:
            return None
        return make_eagle if isinstance(drafter, EagleDrafter) else make_small

    def _codes_of(self, images: Any) -> list[Tensor]:
        """Codes [h, w] of the pictures that a prompt speaks of."""
        side = self.protocol.size
        with in_use(self.vq):
            pixels = to_pixels(images, side, side, self.vq.downsample_factor).to(self.vq.device, self.vq.dtype)
            return [self.vq.encode(one[None])[0] for one in pixels]

    # ---------------------------------------------------------------------------- where a network keeps what is needed of it

    def _decoder(self, model: Any) -> Any:
        """The decoder without its head."""
        return model.model

    def _embed(self, model: Any) -> torch.nn.Embedding:
        """The embedding of words."""
        embed: torch.nn.Embedding = model.get_input_embeddings()
        return embed

    def _code_embedding(self, model: Any, device: torch.device) -> torch.nn.Module:
        """The embedding of the loop's ids."""
        return CodeEmbedding(self._embed(model), self.protocol.local_ids.to(device))

    def _head(self, model: Any, device: torch.device) -> torch.nn.Module:
        """The head over the loop's ids."""
        return CodeHead(model.get_output_embeddings(), self.protocol.code_ids, len(self.protocol.mark_ids), device)
