"""The base of the pipelines whose network is Chameleon's: how published folders become components."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch

from arsd.errors import CheckpointError
from arsd.models.chameleon import ChameleonForImageGeneration
from arsd.models.chameleon_files import find_kind, load_chameleon, load_tokenizer, vqgan_source
from arsd.models.vqgan_files import load_vqgan
from arsd.pipelines.checks import dtype_of, saved_component
from arsd.pipelines.token_images import TokenImagePipeline
from arsd.tokenizers.vqgan import VQGANTokenizer


class ChameleonPipeline(TokenImagePipeline):
    """Loads published folders as they are, and pipeline folders as every pipeline does."""

    transformer: ChameleonForImageGeneration
    vq: VQGANTokenizer
    kinds: ClassVar[tuple[str, ...]]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        vq: str | Path | VQGANTokenizer | None = None,
        dtype: torch.dtype | str | None = None,
        image_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Load a published folder, or one that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: a local folder, or a hub id.
            vq: the image tokenizer, where it is not beside the weights: its published file, a saved one, or an object.
            dtype: of all weights (``torch_dtype`` is the same); by default that of the files.
            image_size: side of a square picture; by default what the folder's name says (512, 768, 1024), else the family's.
            options: components (``decoder=...``, ``drafter=...``), ``revision`` and ``cache_dir`` of the hub, and what
                transformers' ``from_pretrained`` takes: ``device_map``, ``max_memory``, ``offload_folder``,
                ``quantization_config``, ``attn_implementation``.

        Raises:
            CheckpointError: for a folder of another kind, missing or damaged files, or a tokenizer that does not fit.
        """
        from arsd.pipelines.auto import find_model
        from arsd.pipelines.families import check_class

        dtype = dtype_of(dtype, options)
        hub = {name: options.pop(name) for name in ("revision", "cache_dir") if name in options}
        folder = find_model(pretrained_model_name_or_path, **hub)
        given = {**options} if vq is None else {**options, "vq": vq}
        if vq is not None:
            vq = options["vq"] = _tokenizer(vq, dtype)
        if (folder / "model_index.json").is_file():
            check_class(folder, cls)
            if image_size is not None:
                options["image_size"] = image_size
            pipe = super().from_pretrained(str(folder), dtype=dtype, **options)
            pipe.remember_sources(folder, parts=options)
            return pipe
        kind = find_kind(folder)
        if kind not in cls.kinds:
            found = "nothing that is known" if kind is None else f"{kind} weights"
            raise CheckpointError(f"{folder} holds {found}, not those of {cls.__name__}: give another folder")
        names = ("decoder", "drafter", "sampling", "tokenizer", "vq")
        own = {name: options.pop(name) for name in names if name in options}
        tokenizer = own.pop("tokenizer", None) or load_tokenizer(folder)
        source = vqgan_source(folder) if vq is None else given["vq"]
        image_tokenizer = own.pop("vq", None) or _tokenizer(source, dtype)
        transformer = load_chameleon(folder, dtype=dtype, **options)
        named = re.search(r"(?<!\d)(512|768|1024)(?!\d)", folder.resolve().name)
        size = image_size or (int(named[1]) if named else None)
        pipe = cls(transformer, image_tokenizer, tokenizer, image_size=size, **own)
        pipe.protocol  # noqa: B018  a tokenizer that does not fit is refused now, not at the first prompt
        files = [source] if isinstance(source, (str, Path)) else []
        pipe.remember_sources(folder, *files, parts={name: part for name, part in given.items() if name not in options})
        return pipe


def _tokenizer(source: Any, dtype: torch.dtype | None) -> VQGANTokenizer:
    if isinstance(source, VQGANTokenizer):
        return source
    if isinstance(source, (str, Path)) and (Path(source) / "config.json").is_file():
        return saved_component(VQGANTokenizer, source, dtype)
    return load_vqgan(source, dtype=dtype)
