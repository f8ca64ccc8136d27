"""Published T5 text encoders, such as google/flan-t5-xl (arXiv 2210.11416), whose features LlamaGen's text models read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, T5EncoderModel
from transformers.utils import logging

from arsd.errors import CheckpointError


def load_t5_encoder(folder: str | Path, *, dtype: torch.dtype | None = None) -> tuple[Any, T5EncoderModel]:
    """Load the tokenizer and the encoder of a published T5, in evaluation mode on the CPU; the decoder is left out.

    Args:
        folder: what a hub repository holds: ``config.json``; the weights of the whole model or of the encoder, as
            safetensors or ``pytorch_model*.bin``, in one file or in shards with their index; ``tokenizer.json``, or
            ``spiece.model``, which needs the packages sentencepiece and protobuf.
        dtype: dtype of all parameters; by default that of ``config.json``, else that of the weights. Upstream LlamaGen
            uses bfloat16. In float16 the output layers of the MLPs stay in float32, as transformers has it.

    Returns:
        What :func:`arsd.models.captions.encode_captions` takes.

    Raises:
        CheckpointError: when there is no such folder, it holds another model, a file is missing or damaged, or weights and
            tokenizer do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: check the path, or download google/flan-t5-xl first")
    _check_kind(folder / "config.json")
    _check_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with _without_report():
            loaded: Any = T5EncoderModel.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{folder} is incomplete or damaged ({reason}): download it again") from error
    encoder, report = loaded
    if wrong := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        listed = ", ".join(wrong[:2]) + (", ..." if len(wrong) > 2 else "")
        raise CheckpointError(f"{folder} lacks weights of the encoder or has other shapes ({listed}): download it again")
    if len(tokenizer) > encoder.config.vocab_size:
        known = f"knows {len(tokenizer)} tokens, its weights {encoder.config.vocab_size}"
        raise CheckpointError(f"{folder}: the tokenizer {known}: give a folder whose files belong together")
    for parameter in encoder.parameters():
        parameter.data = parameter.data.clone()  # no window into the file, which may change or go away
    return tokenizer, encoder.eval()


def _check_kind(path: Path) -> None:
    try:
        kind = json.loads(path.read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or damaged: give the folder of a T5, such as google/flan-t5-xl") from error
    if kind != "t5":
        raise CheckpointError(f"{path.parent} holds a {kind!r} model, not a 't5': give a T5, such as google/flan-t5-xl")


def _check_tokenizer(folder: Path) -> None:
    """Without its files transformers would make up a tokenizer, and without sentencepiece misread them."""
    if (folder / "tokenizer.json").is_file():
        return
    if not (folder / "spiece.model").is_file():
        raise CheckpointError(f"{folder} has neither tokenizer.json nor spiece.model: download it again")
    if missing := [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]:
        wanted = " ".join(missing).replace("google.", "")
        raise CheckpointError(f"{folder} has no tokenizer.json: add it, or read spiece.model with pip install {wanted}")


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence the report of transformers, which calls lm_head unexpected; what matters of it raises an error here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
