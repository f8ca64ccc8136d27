"""CLIP (Radford et al. 2021) as an extractor of picture features and as a scorer of pictures against prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from arsd.errors import CheckpointError, InputError
from arsd.metrics.images import check_pictures
from arsd.provenance import weights_hash

SHORT_NAMES = {
    "vit-b/32": "openai/clip-vit-base-patch32",
    "vit-b/16": "openai/clip-vit-base-patch16",
    "vit-l/14": "openai/clip-vit-large-patch14",
    "vit-l/14@336": "openai/clip-vit-large-patch14-336",
}
_PUBLISHED = {
    "openai/clip-vit-base-patch32": "CLIP ViT-B/32",
    "openai/clip-vit-base-patch16": "CLIP ViT-B/16",
    "openai/clip-vit-large-patch14": "CLIP ViT-L/14",
    "openai/clip-vit-large-patch14-336": "CLIP ViT-L/14@336",
}
_WIDTHS = {768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # of the picture tower


class ClipScorer:
    """A CLIP of transformers' layout in float32; pictures are prepared by its own image processor, with PIL.

    Args:
        source: folder with model, tokenizer and image processor, or a hub id (the cache is looked at first).
        name: column label; by default that of the published model, or the architecture and the first digits of the weights'
            hash, so that no two models share a column.
        prefix: put before every prompt, e.g. ``"A photo depicts "``. Scores with and without one are not comparable.
        batch: pictures or prompts of a forward pass.
        device: that the model runs on; results come back to the CPU.

    Raises:
        CheckpointError: when there is no such model, or its files are damaged or of another kind of model.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        prefix: str = "",
        batch: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.source, self.prefix, self.batch, self.device = str(source), prefix, batch, torch.device(device)
        self._model, self._tokenizer, self._processor = _find(self.source)
        self._hash = weights_hash(self._model)
        self._model.to(self.device)
        self._truncated: set[str] = set()
        published = None if Path(self.source).exists() else _PUBLISHED.get(self.source)
        self.name = name or published or f"{_architecture(self._model.config)} ({self._hash[:8]})"

    @property
    def dim(self) -> int:
        """Dimension of the features."""
        return int(self._model.config.projection_dim)

    @property
    def longest(self) -> int:
        """Tokens that the text tower reads; the rest of a prompt is cut off."""
        return int(self._model.config.text_config.max_position_embeddings)

    @property
    def truncated_prompts(self) -> int:
        """How many different prompts were cut so far."""
        return len(self._truncated)

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card; the same before and after use."""
        values = self._processor.to_dict()
        size, crop = (dict(values.get(key) or {}) if values.get(f"do_{verb}") else {} for key, verb in _STEPS)
        filter_name = Image.Resampling(values["resample"]).name.lower() if size else "none"
        steps = [filter_name, *size.values()] + (["center", *crop.values()] if crop else [])
        return {
            "name": self.name,
            "dim": self.dim,
            "weights_sha256": self._hash,
            "source": Path(self.source).name if Path(self.source).exists() else self.source,
            "input_size": int(self._model.config.vision_config.image_size),
            "resizer": "-".join(str(step) for step in steps),
            "normalised": True,
            "image_processor": type(self._processor).__name__,
            "pixel_mean": list(values.get("image_mean") or []),
            "pixel_std": list(values.get("image_std") or []),
            "prefix": self.prefix,
            "max_prompt_tokens": self.longest,
            "dtype": "float32",
            "device": self.device.type,
        }

    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Projected picture embeddings of unit length, float32 [B, dim].

        Args:
            pictures: uint8 [H, W, 3], of any sizes.

        Raises:
            InputError: for anything else.
        """
        check_pictures(pictures)
        parts = []
        for start in range(0, len(pictures), self.batch):
            images = [Image.fromarray(picture) for picture in pictures[start : start + self.batch]]
            pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                parts.append(_unit(self._model.get_image_features(pixel_values=pixels.to(self.device))))
        return torch.cat(parts)

    def text_features(self, prompts: Sequence[str], prefix: str | None = None) -> Tensor:
        """Projected text embeddings of unit length, float32 [B, dim].

        A prompt of more than :attr:`longest` tokens is cut, its end token kept, and a warning says how many were.

        Args:
            prompts: texts.
            prefix: instead of the scorer's own.

        Raises:
            InputError: when there are none.
        """
        if not len(prompts):
            raise InputError("no prompts were given: scores need one per picture")
        prefix = self.prefix if prefix is None else prefix
        texts = [prefix + prompt for prompt in prompts]
        self._note_truncation(texts)
        parts = []
        for start in range(0, len(texts), self.batch):
            chunk = texts[start : start + self.batch]
            words = self._tokenizer(chunk, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            inputs = {name: words[name].to(self.device) for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                parts.append(_unit(self._model.get_text_features(**inputs)))
        return torch.cat(parts)

    def score(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], prefix: str | None = None) -> Tensor:
        """100 * cosine of each picture and its prompt, float32 [B], not clamped.

        It is what torchmetrics' CLIPScore averages (which raises a negative mean to 0). The CLIPScore of Hessel et al. 2021
        is 2.5 * max(cosine, 0) with the prefix ``"A photo depicts "`` and ViT-B/32: ``score.clamp(min=0) / 40``.

        Args:
            pictures: B of uint8 [H, W, 3].
            prompts: B texts.
            prefix: instead of the scorer's own.

        Raises:
            InputError: when the numbers of pictures and prompts differ, or are 0.
        """
        if len(pictures) != len(prompts):
            raise InputError(f"{len(pictures)} pictures and {len(prompts)} prompts: give one prompt per picture")
        different = list(dict.fromkeys(prompts))
        texts = self.text_features(different, prefix)
        rows = [different.index(prompt) for prompt in prompts]
        return 100 * (self.features(pictures) * texts[rows]).sum(1)

    def _note_truncation(self, texts: Sequence[str]) -> None:
        cut = {text for text in texts if len(self._tokenizer(text, verbose=False)["input_ids"]) > self.longest}
        if cut - self._truncated:
            warnings.warn(
                f"{self.name} reads {self.longest} tokens: {len(cut)} of {len(texts)} prompts were cut", stacklevel=4
            )
        self._truncated |= cut


_STEPS = (("size", "resize"), ("crop_size", "center_crop"))


def _unit(output: Any) -> Tensor:
    """Features [B, D] (of transformers 5: in ``pooler_output``) scaled to unit length, on the CPU."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1).cpu()


def _architecture(config: Any) -> str:
    width, patch = config.vision_config.hidden_size, config.vision_config.patch_size
    return f"CLIP ViT-{_WIDTHS.get(width, width)}/{patch}"


def _find(source: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of a folder, of the hub's cache, or of the hub, in this order.

    Raises:
        CheckpointError: when they are nowhere, or damaged.
    """
    folder = Path(source)
    if not folder.exists() and source.count("/") != 1:
        raise CheckpointError(f"no CLIP {source!r}: give a folder, a hub id, or one of {', '.join(SHORT_NAMES)}")
    if folder.exists() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: give a folder as CLIPModel.save_pretrained writes it")
    try:
        return _load(source, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and safetensors raise a dozen types for damaged files
        if folder.exists():
            raise CheckpointError(f"could not load {folder}: {' '.join(str(error).split())[:300]}") from error
    try:
        return _load(source, local_files_only=False)
    except CheckpointError:
        raise
    except Exception as error:  # and the hub client another: missing, gated, offline, no disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"no folder {source!r}, and could not get it from the hub ({reason})") from error


def _load(source: str, local_files_only: bool) -> tuple[Any, Any, Any]:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    with _silent():
        loaded: Any = CLIPModel.from_pretrained(
            source, local_files_only=local_files_only, dtype=torch.float32, output_loading_info=True
        )
        model, report = loaded
        absent = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
        if absent:  # transformers would make them up at random
            raise CheckpointError(f"{source} lacks {len(absent)} weights of a CLIP ({absent[0]}, ...): download it again")
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=local_files_only, backend="pil")
    return model.eval().requires_grad_(False), tokenizer, processor


@contextmanager
def _silent() -> Iterator[None]:
    """Neither loading bars nor reports of transformers: what matters of them is an error here."""
    import transformers.utils.logging as transformers_logging

    from arsd.cli.common import quiet

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with quiet():
            yield
    finally:
        transformers_logging.set_verbosity(level)
