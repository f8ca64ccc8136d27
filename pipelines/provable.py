"""What a pipeline can say of its pictures: records, hashes, arithmetic, and whether a picture is the sample of its seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from arsd.decoding.types import OnRound
from arsd.devices import in_use
from arsd.models.raster import Raster
from arsd.pipelines.outputs import ARPipelineOutput, Conditions, of_unit, to_output, to_unit


class Provable:
    """The part of an image pipeline that provenance and verification need."""

    config: Any
    transformer: Any
    dtype: torch.dtype
    _execution_device: torch.device
    encode_inputs: Any
    null_conditions: Any
    target_maker: Any
    decode_pixels: Any
    make_raster: Any
    _same_pixels_elsewhere = True  # other arithmetic paints the same pixels, but for rounding
    _recorded_size: tuple[str, ...] = ("height", "width")  # what of a record encode_inputs takes besides prompts or labels

    @property
    def model_hash(self) -> str | None:
        """Hash of the files that the pipeline was loaded from (:func:`arsd.provenance.model_hash`), else ``None``."""
        from arsd.provenance import model_hash, weights_hash

        known: tuple[str, str | None] | None = getattr(self, "_known_hash", None)
        folder = str(self.config.get("_name_or_path") or "")
        if known is None or known[0] != folder:
            sources = getattr(self, "_sources", ()) or ([folder] if folder and Path(folder).is_dir() else [])
            found = model_hash(*sources) if sources and all(Path(source).exists() for source in sources) else None
            for part in (
                getattr(self, "_own_parts", ()) if found else ()
            ):  # given as objects, in the place of what lies there
                own = weights_hash(part) if isinstance(part, torch.nn.Module) else part.backend_tokenizer.to_str()
                found = hashlib.sha256(f"{found}{own}".encode()).hexdigest()
            known = (folder, found)
            self._known_hash = known
        return known[1]

    def arithmetic_probe(self, batch: int, pass_tokens: int, guided: bool) -> str:
        """How this machine computes passes of a shape, as 16 hex digits (:func:`arsd.shapes.probe`); remembered."""
        from arsd.shapes import probe

        key = (batch, pass_tokens, guided, str(self._execution_device), str(self.dtype))
        known: dict[Any, str] = self.__dict__.setdefault("_known_probes", {})
        if key not in known:
            with in_use(self.transformer):
                conditions = self.null_conditions(batch, guided)
                target = self.target_maker(conditions)(pass_tokens, batch)
                known[key] = probe(target, conditions.raster.num_tokens, pass_tokens)
        return known[key]

    def to_pil(self, tokens: Tensor, raster: Raster | None = None) -> list[Image.Image]:
        """The pictures of token rows [B, N]."""
        pictures: list[Image.Image] = to_output(self.decode_pixels(tokens, raster), "pil")
        return pictures

    def sketch(self, tokens: Tensor, raster: Raster) -> list[Image.Image]:
        """What can be shown of token rows [B, N] that are not all known yet: the pictures, where they cost little."""
        return self.to_pil(tokens, raster)

    def pictures_of(self, output: ARPipelineOutput) -> list[Image.Image]:
        """The pictures of an output whose ``images`` are codes, all of one size."""
        raster = self.raster_of(output.inputs[0])
        numbered = zip(output.inputs, output.seeds, output.image_indices, strict=True)
        records = [{**one, "noise_seed": seed, "image_index": index} for one, seed, index in numbered]
        pictures: list[Image.Image] = of_unit(self.paint(output.tokens, raster, records), "pil")
        return pictures

    def paint(
        self, tokens: Tensor, raster: Raster, made_of: Sequence[dict[str, Any]], extra: Sequence[Any] | None = None
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] of tokens [B, N]: what a call returns, and what verification compares with.

        Args:
            tokens: of finished pictures.
            raster: their layout.
            made_of: [B] what the record of each says: its inputs, ``noise_seed`` and ``image_index``.
            extra: [B] see :class:`arsd.pipelines.outputs.Conditions`.
        """
        return to_unit(self.decode_pixels(tokens, raster))

    def raster_of(self, record: Mapping[str, Any]) -> Any:
        """The layout of what a record describes.

        Raises:
            InputError: for a size that the model cannot make.
        """
        sizes = (name for name in self._recorded_size if name != "slots")
        return self.make_raster(**{name: record.get(name) for name in sizes})

    def conditions_of(self, records: Sequence[dict[str, Any]], guided: bool) -> Conditions:
        """The conditions that recorded pictures of one size were made from, without what was given of them."""
        first = records[0]
        size = {name: first.get(name) for name in self._recorded_size if name in first}
        name, plural = ("prompt", "prompt") if "prompt" in first else ("class_label", "class_labels")
        inputs = {plural: [record[name] for record in records]}
        if any("negative_prompt" in record for record in records):
            inputs["negative_prompt"] = [record.get("negative_prompt") for record in records]
        return self.encode_inputs(**inputs, guided=guided, **size)

    def record(self, output: ARPipelineOutput, index: int) -> dict[str, Any]:
        """Everything that picture ``index`` of an output depends on, for :func:`arsd.provenance.save_png`."""
        from arsd.provenance import make_record

        return make_record(self, output, index)

    def verify(self, images: Any, on_round: OnRound | None = None) -> Any:
        """Whether pictures are the plain AR samples of their seeds: see :mod:`arsd.verification`.

        Args:
            images: a path or a PIL image opened from a PNG that arsd wrote, or a list of them.
            on_round: hears of every pass; ``True`` gives up.

        Returns:
            A :class:`arsd.verification.Verification`, or a list of them.
        """
        from arsd.verification import verify_pictures

        if isinstance(images, Sequence) and not isinstance(images, str):
            return verify_pictures(self, images, on_round)
        return verify_pictures(self, [images], on_round)[0]

    def remember_sources(self, *sources: str | Path, parts: Mapping[str, Any]) -> None:
        """What the model is made of: files or folders, and components that were given as objects."""
        self._sources = tuple(Path(source).resolve() for source in sources)
        given = (part for name, part in sorted(parts.items()) if name != "drafter")
        self._own_parts = tuple(x for x in given if isinstance(x, torch.nn.Module) or hasattr(x, "backend_tokenizer"))
