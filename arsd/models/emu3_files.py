"""Published folders of Emu3 and Emu3.5: BAAI's own layouts, whose code is not needed, and that of transformers.

BAAI's network of Emu3 is transformers' ``Emu3ForCausalLM``, that of Emu3.5 (with norms of queries and keys) its
``Qwen3ForCausalLM``. Their image tokenizers have repositories of their own.
"""

from __future__ import annotations

import base64
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor
from transformers import Emu3Config, Emu3ForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig

from arsd.errors import CheckpointError
from arsd.models.emu3 import FIRST, LAST
from arsd.models.folders import (
    PublishedFiles,
    config_of,
    first_file,
    load_config,
    load_fast_tokenizer,
    load_network,
    read_tensors,
    weight_map,
)
from arsd.models.vqgan_files import load_vqgan
from arsd.models.weight_files import check_keys, check_tensors
from arsd.tokenizers.emu3 import Emu3VQTokenizer
from arsd.tokenizers.vqgan import VQGANTokenizer

TIKTOKEN, SPECIAL = "emu3.tiktoken", "emu3_vision_tokens.txt"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FIRST_SPECIAL = 151643  # the id behind the last piece of text; fixed in upstream's tokenizer, too
_VQ = ("Emu3-VisionTokenizer", "vision_tokenizer")
_IBQ = ("Emu3.5-VisionTokenizer", "vision_tokenizer")
_IBQ_WEIGHTS = ("model.ckpt", "model.safetensors")
_VQ_KEY = re.compile(r"^(model\.)?vqmodel\.")
_RENAMES = (  # ours of an image tokenizer to BAAI's
    ("encoder.down_block.", "encoder."),
    ("decoder.up_block.", "decoder."),
    (".middle_block.attn_norm.", ".mid.attn_1.norm."),
    (".middle_block.", ".mid."),
    (".q_proj.", ".q."),
    (".k_proj.", ".k."),
    (".v_proj.", ".v."),
    (".out_proj.", ".proj_out."),
)
_SIZES = {  # ours by BAAI's
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
}


def find_kind(folder: str | Path) -> str | None:
    """``emu3`` (BAAI's layout), ``emu3-hf`` (transformers'), ``emu3.5``, or ``None``.

    Raises:
        CheckpointError: for such a configuration without weights.
    """
    folder = Path(folder)
    kind = config_of(folder).get("model_type")
    if kind == "emu3":
        weight_map(folder)
        return "emu3-hf"
    if kind != "Emu3":
        return None
    return "emu3.5" if any(key.endswith("self_attn.q_norm.weight") for key in weight_map(folder)) else "emu3"


def load_emu3(folder: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """The language model of a published folder; see :func:`arsd.models.folders.load_network` for options and errors."""
    folder = Path(folder)
    content, path = config_of(folder), folder / "config.json"
    if find_kind(folder) == "emu3.5":
        scaling = {} if content.get("rope_scaling") is None else {"rope_scaling": content["rope_scaling"]}
        wanted = {name: value for name, value in content.items() if name not in ("model_type", "auto_map", "rope_scaling")}
        config = load_config(Qwen3Config, wanted | scaling, path)
        return load_network(Qwen3ForCausalLM, folder, config, dtype=dtype, **options)
    if content.get("model_type") == "emu3":
        config = load_config(Emu3Config, content, path).text_config
        renames = {r"^text_model\.": "", r"^model\.text_model\.": "model."}
        unread = ("vqmodel.", "model.vqmodel.")
        return load_network(Emu3ForCausalLM, folder, config, renames=renames, unread=unread, dtype=dtype, **options)
    wanted = {name: value for name, value in content.items() if name not in ("model_type", "auto_map")}
    return load_network(Emu3ForCausalLM, folder, load_config(Emu3TextConfig, wanted, path), dtype=dtype, **options)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The text tokenizer of a folder: ``tokenizer.json``, or BAAI's ``emu3.tiktoken`` with ``emu3_vision_tokens.txt``.

    Raises:
        CheckpointError: when there is none, or it is damaged.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return load_fast_tokenizer(folder)
    if not (folder / TIKTOKEN).is_file() or not (folder / SPECIAL).is_file():
        what = f"{folder} holds neither tokenizer.json nor {TIKTOKEN} with {SPECIAL}"
        raise CheckpointError(f"{what}: give tokenizer=..., a folder with them (Emu3.5: src/tokenizer_emu3_ibq of its code)")
    try:
        return _of_ranks(folder / TIKTOKEN, (folder / SPECIAL).read_text(encoding="utf-8").split("\n"))
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(f"{folder / TIKTOKEN} is no readable tokenizer: download it again") from error


def _of_ranks(path: Path, special: list[str]) -> PreTrainedTokenizerFast:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    names += [name.strip() for name in special if name.strip()]

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = (line.split() for line in path.read_bytes().splitlines() if line)
            return {base64.b64decode(piece): int(rank) for piece, rank in lines}

        def extract_vocab_merges_from_model(self, tiktoken_url: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
            pieces, merges = super().extract_vocab_merges_from_model(tiktoken_url)
            return pieces | {name: _FIRST_SPECIAL + i for i, name in enumerate(names)}, merges

    made: Tokenizer = Converter(str(path), pattern=_WORDS, extra_special_tokens=names).converted()
    made.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=FIRST, eos_token=LAST, pad_token=names[0], clean_up_tokenization_spaces=False
    )


def vq_source(folder: str | Path) -> Path:
    """Where Emu3's image tokenizer is: in the folder (transformers' layout), or in one of its own in it or beside it.

    Raises:
        CheckpointError: when there is none; the message says which to fetch.
    """
    folder = Path(folder)
    if find_kind(folder) == "emu3-hf":
        return folder
    if (found := first_file([folder, folder.absolute().parent], _VQ)) is not None:
        return found
    raise CheckpointError(f"{folder} holds no image tokenizer: give vq=..., the folder of BAAI/Emu3-VisionTokenizer")


def load_emu3_vq(folder: str | Path, *, dtype: torch.dtype | None = None) -> Emu3VQTokenizer:
    """Emu3's image tokenizer in evaluation mode on the CPU.

    Args:
        folder: of BAAI/Emu3-VisionTokenizer, or of an Emu3 in transformers' layout.
        dtype: of all parameters; by default that of the codebook.

    Raises:
        CheckpointError: when files are missing, damaged, or something else.
    """
    folder = Path(folder)
    content = config_of(folder)
    with_network = content.get("model_type") == "emu3"
    if not with_network and content.get("model_type") != "Emu3VisionVQ":
        raise CheckpointError(f"{folder} is no image tokenizer of Emu3: give the folder of BAAI/Emu3-VisionTokenizer")
    sizes = content.get("vq_config") if with_network else {_SIZES.get(name, name): n for name, n in content.items()}
    known = Emu3VQTokenizer._get_init_keys(Emu3VQTokenizer) - {"self"}
    try:
        with torch.device("meta"):
            tokenizer = Emu3VQTokenizer(**{name: n for name, n in (sizes or {}).items() if name in known})
    except Exception as error:  # whatever odd values lead to
        what = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{folder / 'config.json'} does not give the sizes of an image tokenizer ({what})") from error
    found = read_tensors(folder, lambda key: bool(_VQ_KEY.match(key)) or not with_network)
    state = {_VQ_KEY.sub("", key): value for key, value in found.items()}
    ours = {key.removeprefix("net."): value for key, value in tokenizer.state_dict().items()}
    layout = {key: key if with_network else _theirs(key) for key in ours}
    check_keys(state, layout.values(), folder, "Emu3's image tokenizer")
    counts = {key for key in ours if key.endswith("num_batches_tracked")}
    shapes = {layout[key]: _shape(layout[key], value, state) for key, value in ours.items() if key not in counts}
    check_tensors(state, shapes, folder)
    dtype = dtype or state["quantize.embedding.weight"].dtype
    copies = {}
    for key, value in ours.items():
        mine = state[layout[key]].reshape(value.shape)
        copies[f"net.{key}"] = mine.clone() if key in counts else mine.to(dtype, copy=True)
    tokenizer.load_state_dict(copies, assign=True)
    return tokenizer.eval()


def _theirs(key: str) -> str:
    for mine, published in _RENAMES:
        key = key.replace(mine, published)
    return re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", key)


def _shape(key: str, value: Tensor, state: dict[str, Tensor]) -> list[int]:
    """BAAI attends with 1x1 convolutions."""
    is_matrix = value.ndim == 2 and not key.startswith("quantize.") and state[key].ndim == 4
    return [*value.shape, 1, 1] if is_matrix else [*value.shape]


def ibq_source(folder: str | Path) -> Path:
    """Where Emu3.5's image tokenizer is: a folder of its own, in the language model's or beside it.

    Raises:
        CheckpointError: when there is none; the message says which to fetch.
    """
    folder = Path(folder)
    if (found := first_file([folder, folder.absolute().parent], _IBQ)) is not None:
        return found
    raise CheckpointError(f"{folder} holds no image tokenizer: give vq=..., the folder of BAAI/Emu3.5-VisionTokenizer")


def load_ibq(source: str | Path, *, dtype: torch.dtype | None = None) -> VQGANTokenizer:
    """Emu3.5's image tokenizer (IBQ, arXiv 2412.02692): a VQGAN whose codebook is searched by inner products.

    Args:
        source: the folder of BAAI/Emu3.5-VisionTokenizer, or its weight file.
        dtype: of all parameters; by default that of the codebook.

    Raises:
        CheckpointError: when files are missing, damaged, or something else.
    """
    path = Path(source)
    if path.is_dir():
        found = first_file([path], _IBQ_WEIGHTS)
        if found is None:
            named = " nor ".join(_IBQ_WEIGHTS)
            raise CheckpointError(f"{path} holds neither {named}: give the folder of BAAI/Emu3.5-VisionTokenizer")
        path = found
    return load_vqgan(path, dtype=dtype, lookup="dot")


_EMU3 = partial(PublishedFiles, find_kind=find_kind, network=load_emu3, tokenizer=load_tokenizer)
EMU3 = _EMU3(kinds=("emu3", "emu3-hf"), vq_source=vq_source, vq=load_emu3_vq, vq_class=Emu3VQTokenizer)
EMU35 = _EMU3(kinds=("emu3.5",), vq_source=ibq_source, vq=load_ibq, vq_class=VQGANTokenizer)
