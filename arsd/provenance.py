"""What a picture carries about its making: a JSON record in the PNG, enough to make it again."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from arsd.clip_files import frames_of, write_file, xmp_record
from arsd.errors import InputError

KEY = "arsd"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".jit")
_WHOLE = ("tokenizer.json", "text_tokenizer.json", "emu3.tiktoken", "emu3_vision_tokens.txt", "scheduler_config.json")
_NOT_THE_MODEL = ("transformers_version", "dtype", "torch_dtype")


def model_hash(*sources: str | Path) -> str:
    """SHA-256 over the weights, tokenizers and network configurations of a pipeline folder (64 hex digits).

    Files count in the order of their names. What a library writes about itself into a configuration does not count, nor do
    the model index, the decoding strategy and the drafter: they do not belong to the model. Of a model that was published in
    several places (files or folders), it is the hash of their hashes.
    """
    if len(sources) != 1:
        return hashlib.sha256("".join(model_hash(source) for source in sources).encode()).hexdigest()
    folder, digest = Path(sources[0]), hashlib.sha256()
    if folder.is_file():
        return _file_hash(folder).hex()
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] == "drafter":
            continue
        if path.suffix in _WEIGHTS or path.name in _WHOLE or _is_only_tokenizer(path):
            hashed = _file_hash(path)
        elif path.name == "config.json":
            values = json.loads(path.read_bytes())
            kept = {k: v for k, v in values.items() if not k.startswith("_") and k not in _NOT_THE_MODEL}
            hashed = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()
        else:
            continue
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(hashed)
    return digest.hexdigest()


def _is_only_tokenizer(path: Path) -> bool:
    """Whether words lie in files of the older kind, with no ``tokenizer.json`` beside them."""
    return path.name in ("vocab.json", "merges.txt") and not (path.parent / "tokenizer.json").is_file()


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:  # never whole in memory: a shard may be 5 GB
        return hashlib.file_digest(file, "sha256").digest()


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over the names and float32 values of a module's weights (64 hex digits)."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pack_tokens(tokens: Tensor) -> str:
    """Token ids [N] as text: little-endian uint32, deflated, base64."""
    return base64.b64encode(zlib.compress(tokens.cpu().numpy().astype("<u4").tobytes(), 9)).decode()


def unpack_tokens(text: str, most: int = 1 << 20) -> np.ndarray:
    """Inverse of :func:`pack_tokens`, for at most ``most`` tokens.

    Raises:
        InputError: for more.
    """
    content = zlib.decompressobj().decompress(base64.b64decode(text), 4 * most + 1)  # never more, whatever is packed
    if len(content) > 4 * most:
        raise InputError(f"the record holds more than {most} tokens")
    return np.frombuffer(content, dtype="<u4").astype(np.int64)


def tokens_sha256(tokens: Tensor) -> str:
    """SHA-256 of the ids as little-endian uint32."""
    return hashlib.sha256(tokens.cpu().numpy().astype("<u4").tobytes()).hexdigest()


def make_record(pipe: Any, output: Any, index: int) -> dict[str, Any]:
    """Everything that a picture depends on, and how it came about.

    Args:
        pipe: the pipeline that made it.
        output: what the pipeline returned.
        index: of the picture.
    """
    import arsd
    from arsd.devices import device_kind, dtype_name

    stats, decoder, tokens = output.stats, output.decoders[index], output.tokens[index]
    guided = output.law_config.guidance_scale != 1
    return {
        "arsd": arsd.__version__,
        "model": Path(str(pipe.config.get("_name_or_path") or "")).name or type(pipe).__name__,
        "model_hash": pipe.model_hash,
        **output.inputs[index],
        "noise_seed": output.seeds[index],
        "image_index": output.image_indices[index],
        "decoder": str(decoder),
        "lossless": decoder.lossless,
        "seed_exact": decoder.seed_exact,
        "drafter_hash": _drafter_that_matters(pipe, decoder),
        "batch": stats.batch,
        "pass_tokens": stats.pass_tokens,
        "sampling": asdict(output.law_config),
        "dtype": dtype_name(pipe),
        "device": pipe.device.type,
        "device_kind": device_kind(pipe.device),
        "torch": torch.__version__,
        "probe": pipe.arithmetic_probe(stats.batch, stats.pass_tokens, guided),
        "tokens": pack_tokens(tokens),
        "tokens_sha256": tokens_sha256(tokens),
        "forward_passes": stats.row_passes[index],
        "near_ties": stats.near_ties[index],
        "expected_changed_tokens": stats.expected_changed_tokens[index],
    }


def picture_entry(result: Any, i: int) -> dict[str, Any]:
    """The figures of picture ``i`` of a call (a batch shares its passes and seconds)."""
    stats = result.stats
    return {
        "tokens_sha256": tokens_sha256(result.tokens[i]),
        "tokens": stats.tokens[i],
        "forward_passes": stats.row_passes[i],
        "tokens_per_pass": stats.tokens[i] / max(1, stats.row_passes[i]),
        "pass_tokens": stats.pass_tokens,
        "seconds": stats.total_seconds,
        "expected_changed_tokens": stats.expected_changed_tokens[i],
        "near_ties": stats.near_ties[i],
    }


def slug(prompt: str) -> str:
    """A file name for a prompt: letters, digits and dashes, at most 60 (and 160 bytes: file systems count those)."""
    name = re.sub(r"[^\w]+", "-", prompt.lower(), flags=re.UNICODE).strip("-")[:60]
    return name.encode()[:160].decode(errors="ignore") or "picture"


def _drafter_that_matters(pipe: Any, decoder: Any) -> str | None:
    """The hash of the drafter where it can show in the picture; under a seed-exact strategy it cannot."""
    drafter = getattr(pipe, "drafter", None)
    return None if drafter is None or decoder.seed_exact else weights_hash(drafter)


def png_bytes(image: Image.Image, record: dict[str, Any]) -> bytes:
    """The content of a PNG file with ``record`` in its metadata."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt(KEY, json.dumps(record, ensure_ascii=False))
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(image: Image.Image, path: str | Path, record: dict[str, Any], overwrite: bool = False) -> None:
    """Write a PNG with ``record`` in its metadata; a file is there whole or not at all.

    Raises:
        InputError: when the file exists and ``overwrite`` is off, or it cannot be written.
    """
    write_file(png_bytes(image, record), path, overwrite)


def read_png(path: str | Path) -> dict[str, Any]:
    """The record of a picture made by arsd.

    Raises:
        InputError: when the file is no picture, or has no record.
    """
    return read_record(path)[1]


def read_record(source: Any) -> tuple[Image.Image | list[Image.Image], dict[str, Any]]:
    """A picture (RGB) and its record, or the frames of a clip and its record.

    A picture that shows more than its RGB values (alpha, several frames) comes as RGBA.

    Args:
        source: path of a picture, or a PIL image opened from one.

    Raises:
        InputError: when it is no picture, or has no record.
    """
    opened = isinstance(source, Image.Image)
    try:
        with contextlib.nullcontext(source) if opened else Image.open(source) as image:
            record = _parse(_text(image), "the picture" if opened else str(source))
            return _content(image), record  # pixels last: a file without a record is not worth them
    except (OSError, AttributeError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{'the picture' if opened else source} cannot be read as a picture: {error}") from None


def _text(image: Image.Image) -> str | None:
    found: str | None = getattr(image, "text", {}).get(KEY) or xmp_record(image)
    return found


def _content(image: Image.Image) -> Image.Image | list[Image.Image]:
    return frames_of(image) if image.format == "WEBP" and xmp_record(image) is not None else _pixels(image)


def _pixels(image: Image.Image) -> Image.Image:
    plain = image.mode == "RGB" and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1
    return image.convert("RGB" if plain else "RGBA")


def _parse(text: str | None, name: str) -> dict[str, Any]:
    if text is None:
        raise InputError(f"{name} carries no arsd record")
    try:
        record = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{name} carries a damaged arsd record")
    return record
