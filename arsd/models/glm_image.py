"""GLM-Image (huggingface.co/zai-org/GLM-Image): what its language model reads and writes, and where everything stands.

A prompt ends with the sizes of the picture and of its preview, in codes. Then come the codes of the preview, those of the
picture, and an end word. A prompt may hold pictures; then there is no preview. All codes stand in two dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from arsd.devices import in_use
from arsd.errors import CheckpointError, InputError
from arsd.models.raster import Raster
from arsd.models.target import DecoderTarget
from arsd.models.token_images import TokenProtocol

FACTOR = 32  # pixels along the side of a code
PREVIEW = 16  # a preview has as many codes as a square of this side, about
PLAIN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # what generate() of transformers takes where a model says nothing


@dataclass(frozen=True)
class Reading:
    """What the language model reads ahead of one picture.

    Args:
        ids: [P] of the prompt, with the codes of its pictures.
        places: [3, P + N] where they and the N tokens of the picture stand in time, height and width.
        images: the pictures of the prompt.
        codes: [h, w] the codes of each of them.
    """

    ids: list[int]
    places: Tensor
    images: Sequence[Any] = ()
    codes: Sequence[Tensor] = ()

    def prior(self) -> tuple[Tensor, Tensor]:
        """What the diffusion model reads of the prompt's pictures: codes [4 sum(h w)], and grids [n, 3] (1, 2 h, 2 w)."""
        grids = torch.tensor([[1, 2 * codes.shape[0], 2 * codes.shape[1]] for codes in self.codes])
        return torch.cat([upsampled(codes) for codes in self.codes]), grids


def places_of(ids: Sequence[int], placeholder: int, grids: Sequence[tuple[int, int]], raster: Raster) -> Tensor:
    """[3, P + N] positions of a prompt and of the picture behind it.

    A word stands at the next position in all three dimensions. The codes of a grid share the time at which it begins; from
    there their rows and columns count on. The next word comes as far behind as the longer side of the grid is.

    Args:
        ids: [P] of the prompt.
        placeholder: the id at the places of codes in the prompt.
        grids: (rows, columns) of each picture in the prompt.
        raster: of the picture that is made.
    """
    found, waiting, at, n = [], list(grids), 0, 0

    def stand(rows: int, columns: int) -> None:
        nonlocal at
        found.append(at + torch.cartesian_prod(torch.zeros(1).long(), torch.arange(rows), torch.arange(columns)).T)
        at += max(rows, columns)

    while n < len(ids):
        shape = waiting.pop(0) if ids[n] == placeholder and waiting else (1, 1)
        stand(*shape)
        n += shape[0] * shape[1]
    for shape in (raster.preview, (raster.rows, raster.columns), (1, 1)):
        stand(*shape)
    return torch.cat(found, dim=1)


def place_by(readings: Sequence[Reading], target: DecoderTarget) -> None:
    """Tell a target where the tokens of its pictures stand, one reading for each picture.

    The network's own wrapper keeps positions of the latest prompt on itself, so that two requests upset each other; a target
    is told of all positions in every pass.
    """
    longest = max(reading.places.shape[1] for reading in readings)
    rows = [torch.nn.functional.pad(r.places, (0, longest - r.places.shape[1]), mode="replicate") for r in readings]
    target.place = partial(_placed, target, torch.stack(rows).to(target.device))


def _placed(target: DecoderTarget, table: Tensor, positions: Tensor) -> Tensor:
    """[3, B, T] of ``positions`` [B, T]; what a pass feeds behind the end of a picture stands at the end."""
    index = positions.clamp_max(table.shape[2] - 1)[:, None].expand(-1, 3, -1)
    return table[target.pictures].gather(2, index).transpose(0, 1)


def codes_of(network: Any, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """The codes [h, w] of pictures that a prompt holds.

    Args:
        network: a ``GlmImageForConditionalGeneration``.
        pixels: [patches, ...] of all pictures, as the processor gives them.
        grids: [n, 3] time (1), rows and columns of each.
    """
    vision, vq, found = network.model.visual, network.model.vqmodel, []
    device = pixels.device if vision.device.type == "meta" else vision.device  # a hook brings weights and inputs together
    grids = grids.to(device)
    with in_use(vision.embeddings.position_embedding, vq.quantize.embedding):  # which are read without being called
        hidden = vision(pixels.to(device, vision.dtype), grid_thw=grids).last_hidden_state
        for rows, (_, height, width) in zip(hidden.split(grids.prod(-1).tolist()), grids.tolist(), strict=True):
            features = rows.T.reshape(1, -1, height, width)
            found.append(vq.encode(features).image_tokens.view(height, width))
    return found


def upsampled(codes: Tensor) -> Tensor:
    """Codes [h, w] as the diffusion model reads them, each as 2 x 2 of its own: [4 h w]."""
    return codes.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()


class GlmImageProtocol(TokenProtocol):
    """GLM-Image. There is one stream: its language model was trained without guidance.

    Args:
        processor: the ``GlmImageProcessor``, which knows the words of the structure and the template of prompts.
        network: the language model, for its configuration and its published sampling options; where those say nothing,
            they are the defaults of ``generate()`` (:data:`PLAIN`).
        size: side of the square picture that is made by default.
        sampling: sampling options instead of the published ones.

    Raises:
        CheckpointError: when the processor is another model's.
    """

    factor = FACTOR

    def __init__(self, processor: Any, network: Any, size: int = 1024, sampling: dict[str, float] | None = None) -> None:
        config, published = network.config, network.generation_config
        self.processor, self.size, self._placeholder = processor, size, int(config.image_token_id)
        words = {"bos_token": config.image_start_token_id, "image_token": self._placeholder}
        for name, expected in words.items():
            found = processor.tokenizer.convert_tokens_to_ids(getattr(processor, name))
            if found != expected:
                raise CheckpointError(f"the processor's {name} has the id {found}, not {expected}: it is another model's")
        codes = config.vq_config.num_embeddings
        if codes > config.image_start_token_id or codes > config.text_config.vision_vocab_size:
            raise CheckpointError(
                f"{codes} codes leave no room for the words around a picture: the configuration is damaged"
            )
        self.code_ids, self.mark_ids = torch.arange(codes), {"end": int(config.image_end_token_id)}
        told = {name: getattr(published, name, None) for name in PLAIN}
        self.sampling = sampling or PLAIN | {name: value for name, value in told.items() if value is not None}

    def raster(self, height: int, width: int) -> Raster:
        """See :class:`TokenProtocol`: of a picture made from text alone."""
        rows, columns = height // FACTOR, width // FACTOR
        ratio = rows / max(columns, 1)
        if height % FACTOR or width % FACTOR or not PREVIEW**-2 <= ratio <= PREVIEW**2:
            raise InputError(f"height and width must be multiples of {FACTOR}, not {height} x {width}")
        preview = int(math.sqrt(ratio) * PREVIEW), int(math.sqrt(1 / ratio) * PREVIEW)
        return Raster(rows, columns, len(self.code_ids), ("end",), None, ("end",), preview=preview)

    def prompt_ids(self, prompt: str, height: int, width: int, images: Sequence[Tensor] = ()) -> list[int]:
        """See :class:`TokenProtocol`; of prompts with pictures see :meth:`read`."""
        return self.read(prompt, self.raster(height, width)).ids

    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """See :class:`TokenProtocol`.

        Raises:
            InputError: always.
        """
        raise InputError("the language model of GLM-Image has no guidance: leave out guidance_scale")

    def read(self, prompt: str, raster: Raster, images: Sequence[Any] = (), network: Any = None) -> Reading:
        """What is read ahead of a picture.

        Args:
            prompt: the text.
            raster: of the picture; without a preview if there are ``images``.
            images: PIL pictures that the prompt speaks of.
            network: makes codes of them.

        Raises:
            InputError: for pictures that the models cannot work with.
        """
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
        size = {"target_h": raster.rows * FACTOR, "target_w": raster.columns * FACTOR, "padding": False}
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": size}
        try:
            inputs = self.processor.apply_chat_template([[{"role": "user", "content": content}]], **options)
        except ValueError as error:
            if not images:
                raise
            raise InputError(f"prompt_images cannot be read: {' '.join(str(error).split())[:150]}") from None
        ids, grids = inputs["input_ids"][0], inputs["image_grid_thw"][: len(images)]
        shapes = [(rows, columns) for _, rows, columns in grids.tolist()]
        for image, (rows, columns) in zip(images, shapes, strict=True):
            if (image.height // 16, image.width // 16) != (2 * rows, 2 * columns):
                raise InputError(
                    f"a picture of {image.height} x {image.width} pixels becomes {rows} x {columns} codes, which the "
                    f"diffusion model cannot place: give sides that are multiples of {FACTOR}, neither small nor large"
                )
        places = places_of(ids.tolist(), self._placeholder, shapes, raster)
        if not images:
            return Reading(ids.tolist(), places)
        codes = codes_of(network, inputs["pixel_values"], grids)
        ids = ids.masked_scatter(ids == self._placeholder, torch.cat([one.flatten().cpu() for one in codes]))
        return Reading(ids.tolist(), places, images, codes)
