"""NVIDIA's Cosmos tokenizer with discrete codes (arXiv 2501.03575), in the form it was published: TorchScript.

Cosmos-1.0-Tokenizer-DV8x16x16 (Cosmos-Tokenize1-DV8x16x16-720p is its successor) reads videos; a picture is a video of one
frame. Its codes are points of a fixed grid (finite scalar quantisation, arXiv 2309.15505), so there is no codebook to load.
**TorchScript files are programs: to load and call them is to run the code in them.** Take them from NVIDIA, or from whom you
trust as much.
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
        temporal_factor: frames per code behind the first frame, which has codes of its own: t codes are
            1 + temporal_factor (t - 1) frames.

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
        temporal_factor: int = 8,
    ) -> None:
        super().__init__()
        if not levels or not all(isinstance(level, int) and level > 1 for level in levels):
            raise InputError(f"levels must be whole numbers of 2 or more, not {list(levels)}")
        self.register_to_config(levels=list(levels), factor=factor, temporal_factor=temporal_factor)
        self.encoder, self.decoder = encoder, decoder

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along one side."""
        return int(self.config["factor"])

    @property
    def temporal_factor(self) -> int:
        """Frames per token behind the first frame."""
        return int(self.config["temporal_factor"])

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
        check_pictures(images, self.downsample_factor)
        return self._ids(images[:, :, None])[:, 0]

    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> Tensor:
        """Code ids [B, t, h, w] of videos [B, 3, T, H, W] in [-1, 1], T = 1 + :attr:`temporal_factor` (t - 1).

        Raises:
            InputError: for another number of frames, or when a side is not a multiple of the downsampling factor.
            CheckpointError: as :meth:`encode`.
        """
        step, count = self.temporal_factor, frames.shape[2] if frames.ndim == 5 else 0
        if count < 1 or (count - 1) % step:
            raise InputError(f"videos must be [B, 3, T, H, W] with T = 1 + {step} k frames, not {tuple(frames.shape)}")
        check_pictures(frames[:, :, 0], self.downsample_factor)
        return self._ids(frames)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of ids [B, h, w], nominally in [-1, 1] and not clamped, in the dtype of the decoder.

        Raises:
            InputError: when the ids are not a [B, h, w] grid of codes.
            CheckpointError: when the decoder gives no such pictures: it is another tokenizer's.
        """
        check_ids(ids, math.prod(self.config["levels"]))
        return self._frames(ids[:, None])[:, :, 0]

    @torch.no_grad()
    def decode_video(self, ids: Tensor) -> Tensor:
        """Videos [B, 3, T, H, W] of ids [B, t, h, w], nominally in [-1, 1] and not clamped, in the dtype of the decoder.

        Raises:
            InputError: when the ids are not a [B, t, h, w] grid of codes.
            CheckpointError: as :meth:`decode`.
        """
        if ids.ndim != 4:
            raise InputError(f"ids of videos must be a [B, t, h, w] grid, not {tuple(ids.shape)}")
        check_ids(ids.flatten(0, 1), math.prod(self.config["levels"]))
        return self._frames(ids)

    def _ids(self, frames: Tensor) -> Tensor:
        """Ids [B, t, h, w] of frames [B, 3, T, H, W]."""
        found = _run(self.encoder, frames.to(self.device, self.dtype))
        ids = found[0] if isinstance(found, tuple) else found
        height, width = (side // self.downsample_factor for side in frames.shape[3:])
        grid = (len(frames), 1 + (frames.shape[2] - 1) // self.temporal_factor, height, width)
        if ids.is_floating_point() or ids.shape != grid:
            what = f"encoder.jit gives {ids.dtype} {list(ids.shape)} where ids {list(grid)} belong"
            raise CheckpointError(f"{what}: give the folder of {HUB}")
        return ids.long()

    def _frames(self, ids: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W] of ids [B, t, h, w]."""
        videos: Tensor = _run(self.decoder, ids.to(self.device))
        height, width = (side * self.downsample_factor for side in ids.shape[2:])
        size = (len(ids), 3, 1 + self.temporal_factor * (ids.shape[1] - 1), height, width)
        if videos.shape != size:
            what = f"decoder.jit gives {list(videos.shape)} where pictures {list(size)} belong"
            raise CheckpointError(f"{what}: give the folder of {HUB}")
        return videos

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> CosmosTokenizer:
        """Load NVIDIA's folder, or one that :meth:`save_pretrained` wrote; this runs code from the files in it.

        Args:
            pretrained_model_name_or_path: with ``encoder.jit`` and ``decoder.jit``, and a ``config.json`` where levels or
                factors are not those of DV8x16x16.
            options: of diffusers; none is needed (the files tell the dtype).

        Raises:
            CheckpointError: when a file is missing or damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        sizes = {name: value for name, value in config_of(folder).items() if name in ("levels", "factor", "temporal_factor")}
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
