"""The networks that clips are measured with: the shipped Video-LLM, the I3D of FVD, image extractors frame by frame."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.metrics.extractors import ImageFeatures, _rows_of_one_shape, find_extractor
from arsd.provenance import model_hash, weights_hash

I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"  # of the published file
SHIPPED = "emoji-video-chat"
MOTION_WEIGHT = 4.0  # look and motion then vary alike over real clips
_OPTIONS = ("rescale", "resize", "return_features")


@runtime_checkable
class VideoFeatures(Protocol):
    """Clips to features.

    Attributes:
        name: column label; different networks, weights or inputs never share one.
        dim: dimension of the features.
    """

    name: str

    @property
    def dim(self) -> int:
        """Dimension of the features."""

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card."""

    def features(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Of uint8 [T, H, W, 3], of any lengths and sizes: float32 [B, dim] on the CPU."""


def find_video_extractor(text: str, device: str | torch.device = "cpu") -> VideoFeatures:
    """The extractor of a name.

    Args:
        text: ``emoji-video-chat`` (shipped), ``i3d:PATH`` (the TorchScript file of FVD), or ``frames:EXTRACTOR`` with an
            extractor of :func:`arsd.metrics.find_extractor`, e.g. ``frames:inception``.
        device: that it runs on.

    Raises:
        InputError: when the text is none of them.
        CheckpointError: when the weights are missing or damaged, or a package is not installed.
    """
    kind, _, rest = text.partition(":")
    if text == SHIPPED:
        return VideoChatFeatures(device=device)
    if kind == "i3d" and rest:
        return I3DFeatures(rest, device=device)
    if kind == "frames" and rest:
        return FrameFeatures(find_extractor(rest, device))
    raise InputError(f"no extractor of clips {text!r}: there are {SHIPPED}, i3d:PATH, frames:EXTRACTOR (frames:inception)")


def distance_name(extractor: VideoFeatures) -> str:
    """Column of the Frechet distance of its features: FVD is the name of the one of I3D, and of no other."""
    figure = "FVD" if isinstance(extractor, I3DFeatures) else "Frechet video distance"
    return f"{figure} ({extractor.name})"


class VideoChatFeatures:
    """What the shipped Video-LLM makes of a clip, for animated emoji only.

    The states of its language model, half way up (where its training reads motion from them), at the visual tokens: each
    scaled to a mean square of 1, as the next layer does, and averaged over the tokens of each frame, they are a course over
    time. Features are the mean of the course (what is seen) and :data:`MOTION_WEIGHT` times its mean absolute change from
    frame to frame (how it moves). Without the scale a few clips of large states decide the distance.

    Args:
        source: shipped name or folder of a LLaVA-OneVision.
        batch: clips of a forward pass.
        device: that it runs on, in float32.

    Raises:
        CheckpointError: when there is no such model, it is damaged, or of another kind.
    """

    least_frames = 2

    def __init__(self, source: str | Path = SHIPPED, *, batch: int = 4, device: str | torch.device = "cpu") -> None:
        from arsd.pipelines.video_llm import VideoLLMPipeline

        pipe = VideoLLMPipeline.from_pretrained(source, dtype=torch.float32).to(device)
        if pipe.model.config.model_type != "llava_onevision":
            raise CheckpointError(f"{source} is a {pipe.model.config.model_type}: give a LLaVA-OneVision")
        self.batch, self.device, self._processor = batch, torch.device(device), pipe.processor
        self._model, self._visual = pipe.model.model, pipe.model.config.video_token_id
        self._hash = weights_hash(pipe.model)
        self._width = int(pipe.model.config.text_config.hidden_size)
        self._layer = (int(pipe.model.config.text_config.num_hidden_layers) + 1) // 2
        self.name = SHIPPED if str(source) == SHIPPED else f"LLaVA-OneVision ({self._hash[:8]})"
        parts = [{"type": "video"}, {"type": "text", "text": "Describe the clip."}]
        self._prompt = self._processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)

    @property
    def dim(self) -> int:
        """Twice the width of the language model."""
        return 2 * self._width

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card."""
        size = self._processor.video_processor.size
        return {
            "name": self.name,
            "dim": self.dim,
            "weights_sha256": self._hash,
            "source": self.name,
            "input_size": int(size["height"]),
            "resizer": f"video processor-{size['height']}x{size['width']}",
            "normalised": False,
            "features": f"states after layer {self._layer} of the language model, each of mean square 1, averaged over the "
            f"tokens of a frame: mean over time, then {MOTION_WEIGHT:g} times the mean absolute change from frame to frame",
            "dtype": "float32",
            "device": self.device.type,
        }

    def features(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Look and motion, float32 [B, dim].

        Args:
            clips: uint8 [T, H, W, 3], of two frames or more.

        Raises:
            InputError: for anything else.
        """
        check_clips(clips, self.least_frames, self.name)
        return _by_shape(clips, self.batch, self._run)

    def _run(self, clips: Sequence[np.ndarray]) -> Tensor:
        course = self.course(clips)
        return torch.cat([course.mean(1), MOTION_WEIGHT * course.diff(dim=1).abs().mean(1)], dim=1)

    @torch.no_grad()
    def course(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Averaged states of each frame, float32 [B, T, width], of clips of one shape."""
        prompts, videos = [self._prompt] * len(clips), [list(clip) for clip in clips]
        fed = self._processor(text=prompts, videos=videos, return_tensors="pt").to(self.device)
        states = self._model(**fed, output_hidden_states=True).hidden_states[self._layer]
        seen = states[fed["input_ids"] == self._visual].view(len(clips), -1, self._width)
        seen = seen / seen.square().mean(-1, keepdim=True).sqrt()
        frames = len(clips[0])
        each = seen.shape[1] // frames  # one token more ends the clip
        return seen[:, : each * frames].reshape(len(clips), frames, each, -1).mean(2).float().cpu()


class I3DFeatures:
    """The I3D of Kinetics-400 that FVD is computed with (Unterthiner et al. 2018), in the TorchScript port of StyleGAN-V.

    The network rescales and resizes by itself (bilinear, 224 pixels); its features are its 400 logits. TorchScript is code:
    open only a file that you trust.

    Args:
        path: of ``i3d_torchscript.pt``.
        batch: clips of a forward pass.
        device: that it runs on, in float32.

    Raises:
        CheckpointError: when the file is missing, damaged, or another network.
    """

    dim, least_frames = 400, 9  # its last pool spans two of the steps that eight frames make one of

    def __init__(self, path: str | Path, *, batch: int = 8, device: str | torch.device = "cpu") -> None:
        self.path, self.batch, self.device = Path(path), batch, torch.device(device)
        if not self.path.is_file():
            raise CheckpointError(f"there is no file {path}: download {I3D_URL}")
        self._hash = model_hash(self.path)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
                self._network = torch.jit.load(str(self.path), map_location=self.device).eval()
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} is no TorchScript file, or is damaged: download {I3D_URL}") from error
        known = [argument.name for argument in self._network.forward.schema.arguments]
        if not set(_OPTIONS) <= set(known):
            raise CheckpointError(f"{path} takes no {', '.join(_OPTIONS)} as the I3D of FVD does: download {I3D_URL}")
        self.name = "I3D" if self._hash == I3D_SHA256 else f"I3D ({self._hash[:8]})"

    @property
    def published(self) -> bool:
        """Whether it is the very file of the FVD papers."""
        return self._hash == I3D_SHA256

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card."""
        return {
            "name": self.name,
            "dim": self.dim,
            "weights_sha256": self._hash,
            "published_file": self.published,
            "source": self.path.name,
            "input_size": 224,
            "resizer": "its own, bilinear-224",
            "normalised": False,
            "features": "logits of Kinetics-400, before the softmax",
            "dtype": "float32",
            "device": self.device.type,
        }

    def features(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Logits, float32 [B, 400].

        Args:
            clips: uint8 [T, H, W, 3], of nine frames or more.

        Raises:
            InputError: for anything else.
            CheckpointError: when the network gives something else than 400 numbers of each clip.
        """
        check_clips(clips, self.least_frames, self.name)
        return _by_shape(clips, self.batch, self._run)

    @torch.no_grad()
    def _run(self, clips: Sequence[np.ndarray]) -> Tensor:
        pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).to(self.device, torch.float32)
        found = self._network(pixels, **dict.fromkeys(_OPTIONS, True))
        if not isinstance(found, Tensor) or found.shape != (len(clips), self.dim):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(f"{self.path} gives {shape} and the I3D of FVD [{len(clips)}, 400]: download {I3D_URL}")
        return found.float().cpu()


class FrameFeatures:
    """Features of pictures, averaged over the frames of a clip: blind to their order.

    Args:
        extractor: of pictures.
    """

    least_frames = 1

    def __init__(self, extractor: ImageFeatures) -> None:
        self.extractor, self.name = extractor, f"frames of {extractor.name}"

    @property
    def dim(self) -> int:
        """That of the extractor."""
        return self.extractor.dim

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card."""
        own = self.extractor.describe()
        return {**own, "name": self.name, "normalised": False, "features": f"mean over frames of {own['name']}"}

    def features(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Mean features, float32 [B, dim].

        Args:
            clips: uint8 [T, H, W, 3].

        Raises:
            InputError: for anything else.
        """
        check_clips(clips)
        return torch.stack([self.extractor.features(list(clip)).double().mean(0).float() for clip in clips])


def check_clips(clips: Sequence[np.ndarray], least: int = 1, name: str = "this figure") -> None:
    """Refuse what is not a non-empty sequence of uint8 [T, H, W, 3].

    Args:
        clips: to be checked.
        least: frames that each must have.
        name: of who asks for them.

    Raises:
        InputError: naming the first that is wrong.
    """
    if not len(clips):
        raise InputError("no clips were given: give at least one")
    for i, clip in enumerate(clips):
        whole = isinstance(clip, np.ndarray) and clip.dtype == np.uint8 and clip.ndim == 4
        if not whole or clip.shape[3] != 3 or not clip.size:
            found = f"{clip.dtype} {list(clip.shape)}" if hasattr(clip, "dtype") else type(clip).__name__
            raise InputError(f"clip {i} is {found}: give numpy uint8 [T, H, W, 3]")
        if len(clip) < least:
            raise InputError(f"clip {i} has {len(clip)} frames, {name} needs {least}: give longer clips")


def _by_shape(clips: Sequence[np.ndarray], batch: int, run: Callable[[list[np.ndarray]], Tensor]) -> Tensor:
    """``run`` of clips of one shape at a time, at most ``batch`` of them; rows in the order of the clips."""
    rows = list(_rows_of_one_shape(clips, batch))
    found = torch.cat([run([clips[i] for i in some]) for some in rows])
    return found[torch.tensor([i for some in rows for i in some]).argsort()]
