"""Diffusers' own ``GlmImagePipeline`` with prior tokens that are decoded here."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import GlmImagePipeline
from PIL import Image
from torch import Tensor

from arsd.decoding import SJD, DecodeStats, DecodingStrategy
from arsd.devices import in_use
from arsd.errors import InputError
from arsd.models.glm_image import upsampled
from arsd.pipelines.checks import strategies_of
from arsd.pipelines.glm_image import GLMImagePipeline
from arsd.pipelines.outputs import noise_keys


def accelerate(pipe: GlmImagePipeline, decoder: DecodingStrategy | str | None = None, drafter: Any = None) -> Acceleration:
    """Have diffusers' ``GlmImagePipeline`` write its prior tokens with a decoding strategy of this package.

    The user's calls stay as they are, with several prompts, ``num_images_per_prompt`` and condition images: ::

        fast = arsd.accelerate(pipe, decoder=arsd.SJD(window=32))
        image = pipe("a red apple", height=1024, width=1024, generator=torch.Generator().manual_seed(7)).images[0]
        print(fast.stats.tokens_per_pass)
        fast.undo()  # or: with arsd.accelerate(pipe): ...

    Tokens are drawn with the sampling options of the language model's ``generation_config``, from the codes alone; so no
    picture ends before it is whole, which in diffusers is an error. Their noise belongs to the initial seed of the generator
    (without one, to torch's global generator), as in diffusers, but no generator is seeded or advanced. Nothing of a call is
    kept on the language model, so that calls of ``pipe.generate_prior_tokens`` may run in parallel.

    Args:
        pipe: as it was loaded by diffusers. Only this object is changed, not its class nor its components.
        decoder: a strategy or its text, such as ``"sjd:window=32"``; ``SJD()`` by default.
        drafter: a smaller language model with the same codes, for strategies that need one.

    Raises:
        InputError: for another pipeline or drafter.
        StrategyError: for a decoder that is none.
    """
    if not isinstance(pipe, GlmImagePipeline):
        raise InputError(f"accelerate takes diffusers' GlmImagePipeline, not {type(pipe).__name__}")
    return Acceleration(pipe, {"decoder": strategies_of(decoder, SJD())[0], "drafter": drafter})


class Acceleration:
    """What :func:`accelerate` returns; a context manager.

    Attributes:
        stats: figures of the latest call that is finished, :class:`arsd.decoding.DecodeStats`; ``None`` before the first.
        tokens: [B, N] what it decoded: codes of previews and pictures, and end marks.
    """

    stats: DecodeStats | None = None
    tokens: Tensor | None = None

    def __init__(self, pipe: GlmImagePipeline, options: dict[str, Any]) -> None:
        self.pipe, self.options = pipe, options
        GLMImagePipeline.of(pipe, **options).protocol  # noqa: B018  what does not fit is refused now
        pipe.generate_prior_tokens = self.generate_prior_tokens

    @torch.no_grad()
    def generate_prior_tokens(
        self,
        prompt: str | list[str],
        height: int,
        width: int,
        image: list[list[Image.Image]] | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, list[Tensor] | None, list[Tensor] | None]:
        """What diffusers' method of this name gives, with the same arguments.

        Raises:
            InputError: for inputs that the models cannot work with.
        """
        if height is None or width is None:
            raise InputError("give height and width")
        own = GLMImagePipeline.of(self.pipe, **self.options)
        encode = partial(own.encode_inputs, prompt, image, height=height, width=width)
        conditions = encode()
        seed = int(torch.randint(2**63 - 1, ())) if generator is None else generator.initial_seed()
        count, codebook = len(conditions.inputs), own.codebook
        keys = noise_keys(torch.Generator().manual_seed(seed), count)
        call = (conditions, own.check_decoder(None), own.law_config({}), keys, count)
        draft_model = own.draft_maker(conditions, count, encode)
        with in_use(own.transformer):
            result = own.run_decoder(*call, progress=False, codebook=codebook, draft_model=draft_model)
        self.stats, self.tokens = result.stats, result.tokens
        device = device or conditions.condition.device
        prior = torch.stack([upsampled(codes) for codes in conditions.raster.to_codes(result.tokens)]).to(device)
        if image is None:
            return prior, None, None
        ids, grids = zip(*(reading.prior() for reading in conditions.extra or []), strict=True)
        return prior, [one.to(device) for one in ids], [one.to(device) for one in grids]

    def undo(self) -> None:
        """Have the pipeline write its prior tokens itself again."""
        if self.pipe.__dict__.get("generate_prior_tokens") == self.generate_prior_tokens:
            del self.pipe.__dict__["generate_prior_tokens"]

    def __enter__(self) -> Acceleration:
        """Accelerated since it was made."""
        return self

    def __exit__(self, *error: object) -> None:
        """:meth:`undo`."""
        self.undo()
