"""Published folders of iVideoGPT (arXiv 2405.15223): ``tokenizer/`` in diffusers' layout, and ``transformer/``, a Llama."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from arsd.errors import CheckpointError, InputError
from arsd.models.folders import WEIGHTS, config_of, load_config, load_network, read_json, weight_map
from arsd.models.weight_files import check_keys, check_tensors, read_state_dict
from arsd.tokenizers.ivideogpt import IVideoGPTTokenizer

KIND = "ivideogpt"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PARTS = ("tokenizer", "transformer")

_FIXED = {  # what every published tokenizer is, of what its configuration could say
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "norm_type": "group",
}
_ABSENT = {"resolution": 256, "max_att_resolution": 32, "patch_size": 4, "context_length": 1, "norm_num_groups": 32}
"""Upstream's values of what a configuration does not say."""

_ARGUMENTS = tuple(signature(IVideoGPTTokenizer.__init__).parameters)[1:]


def find_kind(folder: str | Path) -> str | None:
    """``"ivideogpt"``, or ``None`` for any other folder; its configurations tell.

    Raises:
        CheckpointError: when they are damaged.
    """
    tokenizer, transformer = (config_of(Path(folder) / part) for part in PARTS)
    return KIND if "num_dyn_embeddings" in tokenizer and transformer.get("model_type") == "llama" else None


def load_ivideogpt(folder: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> LlamaForCausalLM:
    """The transformer of a published folder; see :func:`arsd.models.folders.load_network` for options and errors.

    Raises:
        CheckpointError: besides those: for a model that reads actions, which is not supported.
    """
    folder = Path(folder) / "transformer"
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json: give the folder that holds {' and '.join(PARTS)}")
    if any((folder / name).is_file() for name in WEIGHTS) and "action_linear.weight" in weight_map(folder):
        raise CheckpointError(f"{folder} reads actions, which is not supported: give an act-free or goal-cond model")
    ends = {"bos_token_id": None, "eos_token_id": None}  # in the files they are GPT-2's, beyond the vocabulary
    config = load_config(LlamaConfig, read_json(path) | ends | {"tie_word_embeddings": False}, path)
    return load_network(LlamaForCausalLM, folder, config, dtype=dtype, **options)


def load_ivideogpt_tokenizer(folder: str | Path, *, dtype: torch.dtype | None = None) -> IVideoGPTTokenizer:
    """The tokenizer of a published folder, in evaluation mode on the CPU.

    Args:
        folder: ``tokenizer/``, or the folder that holds it.
        dtype: of all parameters; by default that of the file.

    Raises:
        CheckpointError: when files are missing or damaged, have other keys or shapes, or the configuration is another one's.
    """
    folder = Path(folder)
    folder = folder / PARTS[0] if (folder / PARTS[0] / "config.json").is_file() else folder
    path, told = folder / "config.json", _ABSENT | config_of(folder)
    if "num_dyn_embeddings" not in told:
        raise CheckpointError(
            f"{path} is not that of an iVideoGPT tokenizer: give the folder that holds {' and '.join(PARTS)}"
        )
    odd = [name for name, value in _FIXED.items() if told.get(name, value) != value]
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        odd += [name] if set(told.get(name, [block])) != {block} else []
    if odd:
        raise CheckpointError(f"{path}: {odd[0]} {told[odd[0]]!r} is not supported: give a published tokenizer")
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} has no weights, neither {' nor '.join(WEIGHT_FILES)}: download them")
    state = read_state_dict(weights)
    try:
        with torch.device("meta"):
            tokenizer = IVideoGPTTokenizer(**{name: told[name] for name in _ARGUMENTS if name in told})
    except (InputError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        what = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{path} does not make a tokenizer ({what}): download it again") from error
    ours = tokenizer.state_dict()
    check_keys(state, ours, weights, "an iVideoGPT tokenizer")
    check_tensors(state, {key: value.shape for key, value in ours.items()}, weights)
    dtype = dtype or state["quantize.embedding.weight"].dtype
    tokenizer.load_state_dict({key: value.to(dtype, copy=True) for key, value in state.items()}, assign=True)
    return tokenizer.eval()
