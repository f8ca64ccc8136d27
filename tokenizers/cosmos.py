"""NVIDIA's Cosmos tokenizer with discrete codes (arXiv 2501.03575) for pictures, in the form it was published: TorchScript.

Cosmos-1.0-Tokenizer-DV8x16x16 reads videos; a picture is a video of one frame. Its codes are points of a fixed grid (finite
scalar quantisation, arXiv 2309.15505), so there is no codebook to load. **TorchScript files are programs: to load and call
them is to run the code in them.** Take them from NVIDIA, or from whom you trust as much.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.models.folders import config_of
from arsd.tokenizers.checks import check_ids, check_pictures

FILES = {"encoder": "encoder.jit", "decoder": "decoder.jit"}
HUB = "huggingface.co/nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"


class CosmosTokenizer(ModelMixin, ConfigMixin):
    """Encoder and decoder as two TorchScript modules.

    They compute in the dtype that they were exported in, whatever the pipeline's is: pictures are converted on their way in,
    and ``to`` moves the modules, but never changes their dtype.

    Args:
        encoder: ``[B, 3, T, H, W]`` in [-1, 1] to a tuple that begins with whole numbers ``[B, t, h, w]``.
        decoder: whole numbers ``[B, t, h, w]`` to ``[B, 3, T, H, W]``; one frame for ``t = 1``.
        levels: values that each channel of a code can take (64,000 codes by default). A code's id is
            ``sum_i digit_i * prod(levels[:i])``: the first channel counts fastest, as in NVIDIA's ``FSQuantizer``.
        factor: pixels per code along one side.

    Raises:
        InputError: for levels that make no grid.
    """

    runs_code = True  # to load a saved one is to run what is in it

    def __init__(
        self,
        encoder: torch.jit.ScriptModule,
        decoder: torch.jit.ScriptModule,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        factor: int = 16,
    ) -> None:
        super().__init__()
        if not levels or not all(isinstance(level, int) and level > 1 for level in levels):
            raise InputError(f"levels must be whole numbers of 2 or more, not {list(levels)}")
        self.register_to_config(levels=list(levels), factor=factor)
        self.encoder, self.decoder = encoder, decoder

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along one side."""
        return int(self.config["factor"])

    @property
    def codebook(self) -> Tensor:
        """The codes as they are used: [C, len(levels)] float32, each channel in [-1, 1]."""
        levels = torch.tensor(self.config["levels"], device=self.device)
        ids, half = torch.arange(int(levels.prod()), device=self.device), levels // 2
        digits = ids[:, None] // (levels.cumprod(0) // levels) % levels
        return (digits - half) / half

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Code ids [B, h, w] of pictures [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: when a side is not a multiple of the downsampling factor.
            CheckpointError: when the encoder gives no such ids: it is another tokenizer's.
        """
        factor = self.downsample_factor
        check_pictures(images, factor)
        found = _run(self.encoder, images[:, :, None].to(self.device, self.dtype))
        ids = found[0] if isinstance(found, tuple) else found
        grid = (len(images), 1, images.shape[2] // factor, images.shape[3] // factor)
        if ids.is_floating_point() or ids.shape != grid:
            what = f"encoder.jit gives {ids.dtype} {list(ids.shape)} where ids {list(grid)} belong"
            raise CheckpointError(f"{what}: give the folder of {HUB}")
        return ids[:, 0].long()

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of ids [B, h, w], nominally in [-1, 1] and not clamped, in the dtype of the decoder.

        Raises:
            InputError: when the ids are not a [B, h, w] grid of codes.
            CheckpointError: when the decoder gives no such pictures: it is another tokenizer's.
        """
        check_ids(ids, math.prod(self.config["levels"]))
        videos = _run(self.decoder, ids[:, None].to(self.device))
        size = (len(ids), 3, 1, *(side * self.downsample_factor for side in ids.shape[1:]))
        if videos.shape != size:
            what = f"decoder.jit gives {list(videos.shape)} where pictures {list(size)} belong"
            raise CheckpointError(f"{what}: give the folder of {HUB}")
        return videos[:, :, 0]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> CosmosTokenizer:
        """Load NVIDIA's folder, or one that :meth:`save_pretrained` wrote; this runs code from the files in it.

        Args:
            pretrained_model_name_or_path: with ``encoder.jit`` and ``decoder.jit``, and a ``config.json`` where levels or
                factor are not those of DV8x16x16.
            options: of diffusers; none is needed (the files tell the dtype).

        Raises:
            CheckpointError: when a file is missing or damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        sizes = {name: value for name, value in config_of(folder).items() if name in ("levels", "factor")}
        return cls(_load(folder / FILES["encoder"]), _load(folder / FILES["decoder"]), **sizes).eval()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write both modules and the configuration.

        Args:
            save_directory: a folder.
            options: of diffusers; none is needed.
        """
        self.save_config(save_directory)
        for part, name in FILES.items():
            with _hushed():
                torch.jit.save(getattr(self, part), Path(save_directory) / name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Only the device: dtypes are built into the code of the modules."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)


def _run(module: torch.jit.ScriptModule, value: Tensor) -> Any:
    with torch.jit.optimized_execution(False):  # or later calls run another program than the first, with other roundings
        return module(value)


def _load(path: Path) -> torch.jit.ScriptModule:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: give vq=..., the folder of {HUB}")
    try:
        with _hushed():
            return torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(f"{path} is truncated, corrupt or no TorchScript file: download it again") from error


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the advice to export the modules anew, which is for those who publish them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
