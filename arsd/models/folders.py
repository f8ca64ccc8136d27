"""What the readers of published folders share: configurations, weights, networks of transformers, text tokenizers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from arsd.errors import CheckpointError, InputError
from arsd.models.weight_files import read_state_dict

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class PublishedFiles:
    """How the published folders of a family become the components of its pipeline.

    Args:
        kinds: those that the pipeline loads, of what ``find_kind`` tells apart.
        find_kind: ``(folder) -> kind``, or ``None`` where the folder is of another family; reads only headers.
        network: ``(folder, dtype=..., **options) -> model``; options are those of transformers' ``from_pretrained``.
        tokenizer: ``(folder) -> text tokenizer``.
        vq_source: ``(folder) -> source`` of the image tokenizer where none is given: a path, or its tensors.
        vq: ``(source, dtype=...) -> image tokenizer`` of such a source.
        vq_class: class of the image tokenizer.
    """

    kinds: tuple[str, ...]
    find_kind: Callable[[Path], str | None]
    network: Callable[..., Any]
    tokenizer: Callable[[Path], Any]
    vq_source: Callable[[Path], Any]
    vq: Callable[..., Any]
    vq_class: type


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: when it cannot be read, or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON: download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again")
    return content


def config_of(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder, or nothing where there is none."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def first_file(places: Iterable[Path], names: Iterable[str]) -> Path | None:
    """The first of these files or folders that there is, place by place."""
    names = tuple(names)
    return next((place / name for place in places for name in names if (place / name).exists()), None)


def weight_map(folder: Path) -> dict[str, str]:
    """The file of every key of a folder in transformers' layout; only headers are read.

    Raises:
        CheckpointError: when there are no weights, or a file is damaged.
    """
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise CheckpointError(f"{folder} has no weights, neither {' nor '.join(WEIGHTS)}: download them")
    if name.endswith(".safetensors"):
        try:
            with safe_open(folder / name, "pt") as file:
                return dict.fromkeys(file.keys(), name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / name} is truncated, corrupt or no weight file: download it again") from error
    if not name.endswith(".json"):
        return dict.fromkeys(read_state_dict(folder / name), name)
    files = read_json(folder / name).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{folder / name} has no weight_map: download it again")
    return files


def read_tensors(folder: Path, wanted: Callable[[str], bool] = bool) -> dict[str, Tensor]:
    """The tensors of a folder in transformers' layout whose keys are ``wanted``, mapped from their files."""
    files = {file for key, file in weight_map(folder).items() if wanted(key)}
    state = {key: value for file in sorted(files) for key, value in read_state_dict(folder / file).items()}
    return {key: value for key, value in state.items() if wanted(key)}


def load_network(
    cls: Any,
    folder: Path,
    config: Any,
    *,
    renames: Mapping[str, str] | None = None,
    unread: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """A network of transformers with the weights of a published folder, in evaluation mode.

    Args:
        cls: its class.
        folder: with weights in transformers' containers.
        config: its configuration.
        renames: regular expressions of published keys, and what becomes of them.
        unread: what the published keys of other networks in the same files begin with.
        dtype: of all parameters; by default that of the files.
        options: of transformers' ``from_pretrained``: ``device_map``, ``max_memory``, ``offload_folder``,
            ``quantization_config``, ``attn_implementation`` and so on.

    Raises:
        CheckpointError: when files are missing or damaged, or have other keys or shapes.
        InputError: when weights go to disk without an ``offload_folder``.
    """
    weight_map(folder)
    wanted = {"key_mapping": dict(renames) if renames else None, "dtype": "auto" if dtype is None else dtype}
    try:
        with _no_report():
            model, found = cls.from_pretrained(
                folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **wanted, **options
            )
    except ValueError as error:
        if "offload_folder" in str(error):
            raise InputError("the device_map puts weights on disk: give offload_folder=..., a folder for them") from error
        raise
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: its weights cannot be read ({what}): download them again") from error
    shapes = [f"{key} has shape {list(theirs)}, expected {list(ours)}" for key, theirs, ours in found["mismatched_keys"]]
    surplus = [key for key in found["unexpected_keys"] if not key.startswith(tuple(unread)) and ".rotary_emb." not in key]
    odd = {"missing": found["missing_keys"], "unexpected": surplus}
    problems = [f"{what} {_listed(keys)}" for what, keys in odd.items() if keys]
    if shapes or problems:
        raise CheckpointError(f"{folder} is no {cls.__name__} ({'; '.join(problems + shapes[:1])}): give a published folder")
    if renames:  # or save_pretrained would write the published keys, which no class of transformers reads by itself
        model.__dict__.pop("_weight_conversions", None)
    model.config.name_or_path = str(folder)
    return model.eval()


def load_config(cls: Any, content: dict[str, Any], path: Path) -> Any:
    """A configuration of transformers.

    Raises:
        CheckpointError: when the values do not make one.
    """
    try:
        return cls.from_dict(content)
    except Exception as error:  # checks of huggingface_hub, or whatever odd values lead to
        reason = ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
        raise CheckpointError(f"{path} is no {cls.__name__} ({reason[:120]}): give the published one") from error


def load_fast_tokenizer(folder: Path, **special: Any) -> PreTrainedTokenizerFast:
    """The text tokenizer in ``tokenizer.json``, as it is.

    ``AutoTokenizer`` goes by the class that ``tokenizer_config.json`` names, which may cut text otherwise, or need code of
    its own.

    Args:
        folder: with ``tokenizer.json``.
        special: names of special tokens that the folder's own configuration lacks.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no tokenizer.json: download it with the weights, or give tokenizer=...")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, **special)
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(f"{path} is no readable tokenizer: download it again") from error


def _listed(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' table of missing and surplus keys, which :func:`load_network` judges itself."""

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
