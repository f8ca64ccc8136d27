"""Tiny random checkpoints in the layouts that Lumina-mGPT (1 and 2.0), Anole and Chameleon were published in.

Keys, shapes, file names, config fields, and names and order of the vocabulary are the published ones; sizes are small: width
64, 2 layers, 4 heads, 32 codes. Weights are bfloat16, as published. Every writer returns the tensors of the network as they
lie in the files, by published key (those of :mod:`reference_chameleon`).

Vocabulary of all but Lumina-mGPT 2.0: ``<s> <pad> </s> <unk>``, the codes ``IMGIMG...Z`` (digits as letters A to J, one id
after the other), ``<eoss> <racm3:break>``, reserved words in order of their numbers, text (here: single bytes). The folders
in transformers' layout say ``<image>`` for ``<reserved08707>``, as its converter does. Lumina-mGPT 2.0 has Qwen's text
vocabulary, its special words at their published ids from 151643, and code c at 155000 + c. Its codes are named in the
``vocabulary_map`` of config.json (``<MOVQGAN``, which upstream's code looks for; the rest of these names is a guess), and
not in the tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from published_files import State, byte_tokenizer, byte_words, write_json, write_weights
from reference_chameleon import chameleon_state
from reference_vqgan import vqgan_state
from torch import Tensor

WIDTH, LAYERS, HEADS, HIDDEN, CODES = 64, 2, 4, 192, 32
GRIDS = 40  # size words <reserved08801> ... of up to 40 * 32 pixels
VQ_SIZES: dict[str, Any] = {"ch": 32, "mult": (1, 1), "blocks": 1, "z": 16, "dim": 8}
"""Of the image tokenizer that is written where none is given."""


# -------------------------------------------------------------------------------------------------------------- vocabulary


def code_word(code: int) -> str:
    """``IMGIMGBDZ`` is code 13."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def vocabulary(codes: int = CODES, picture: str = "<reserved08707>") -> dict[str, int]:
    """Ids by word of Chameleon's vocabulary; ``picture`` is the word at the place of ``<reserved08707>``."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *(code_word(code) for code in range(codes)), "<eoss>", "<racm3:break>"]
    words += ["<reserved08706>", picture, *(f"<reserved{n:05d}>" for n in range(8796, 8801 + GRIDS))]
    words += list(byte_words())
    return {word: i for i, word in enumerate(words)}


def vocabulary_2(first_code: int = 155000) -> dict[str, int]:
    """Ids by word of the tokenizer of Lumina-mGPT 2.0, which names no codes; ``first_code`` moves all but the bytes."""
    start = first_code - 155000 + 151643
    words = byte_words()
    assert start >= len(words), "first_code must be 3613 or more"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words |= {word: start + i for i, word in enumerate(special)}
    added = ["<racm3:break>", "<eoss>", *(f"<reserved{n:05d}>" for n in range(8796, 8801 + GRIDS))]
    added += ["<reserved08706>", "<reserved08707>"]
    return words | {word: start + 22 + i for i, word in enumerate(added)}


# ------------------------------------------------------------------------------------------------------------------ folders


def write_lumina(
    folder: Path,
    mp: int = 1,
    shards: int = 2,
    *,
    kv_heads: int | None = None,
    swin: bool = False,
    codes: int = CODES,
    layers: int = LAYERS,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    vq_state: State | None = None,
    suffix: str = ".safetensors",
) -> State:
    """Lumina-mGPT: q/k norms [mp, d], no ``model.vqmodel``; ``vq_state`` goes to ``vqgan.ckpt``, which the user adds."""
    words = vocabulary(codes, "<image>")
    state = _state(dtype, vocab=len(words), kv_heads=kv_heads, layers=layers, norm_rows=mp, seed=seed)
    config = _config(state, words, model_parallel_size=mp, swin_norm=swin, num_key_value_heads=kv_heads or HEADS)
    config |= {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "mask_image_logits": False}
    config |= {"dropout": 0.05, "z_loss_weight": 1e-05, "vq_config": _vq_config(codes, old_names=True)}
    _write_hf(folder, config, state, words, shards, suffix)
    if vq_state is not None:
        torch.save({"state_dict": vq_state}, folder / "vqgan.ckpt")
    return state


def write_lumina2(
    folder: Path,
    *,
    first_code: int = 155000,
    codes: int = CODES,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    vq_state: State | None = None,
) -> State:
    """Lumina-mGPT 2.0, with an embedding of 20 MB unless ``first_code`` is less; ``vq_state`` goes to movqgan_270M.ckpt."""
    words = vocabulary_2(first_code)
    state = _state(dtype, vocab=first_code + codes, seed=seed)
    named = words | {f"<MOVQGAN{code}>": first_code + code for code in range(codes)}
    config = _config(state, named, bos_token_id=None, eos_token_id=words["<|endoftext|>"], max_position_embeddings=10240)
    config |= {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "mask_image_logits": False}
    config |= {"dropout": 0.0, "z_loss_weight": 1e-05, "vq_config": _vq_config(8192, old_names=True)}
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    _write_hf(folder, config, state, words, 2, ".safetensors", special)
    if vq_state is not None:
        torch.save(vq_state, folder / "movqgan_270M.ckpt")
    return state


def write_anole(
    folder: Path,
    *,
    shards: int = 2,
    codes: int = CODES,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    vq_state: State | None = None,
    suffix: str = ".safetensors",
) -> State:
    """Anole in transformers' layout: q/k norms [heads, d], the image tokenizer as ``model.vqmodel.*``."""
    return _write_with_vq(folder, shards, codes, seed, dtype, vq_state, suffix)


def write_chameleon(
    folder: Path,
    *,
    shards: int = 2,
    codes: int = CODES,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    vq_state: State | None = None,
    suffix: str = ".safetensors",
) -> State:
    """Chameleon in transformers' layout: as Anole's, without the decoder of the image tokenizer."""
    vq_state = vq_state or vqgan_state(**VQ_SIZES, codes=codes)
    vq_state = {key: value for key, value in vq_state.items() if not key.startswith("decoder.")}
    return _write_with_vq(folder, shards, codes, seed, dtype, vq_state, suffix)


def write_anole_meta(
    folder: Path,
    *,
    shards: int = 1,
    fused: bool = False,
    kv_heads: int | None = None,
    swin: bool = False,
    theta: float = 1e4,
    codes: int = CODES,
    size: str = "7b",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    vq_state: State | None = None,
) -> State:
    """Meta's own layout (Anole, Chameleon): ``models/7b``, ``tokenizer``; the returned tensors are those of all shards."""
    words = vocabulary(codes)
    rows = -(-len(words) // shards) * shards
    state = _state(dtype, meta=True, vocab=rows, kv_heads=kv_heads, norm_rows=shards, seed=seed)
    inner = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": rows, "multiple_of": 32}
    inner |= {"ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": theta, "qk_normalization": True, "swin_norm": swin}
    inner |= {"n_kv_heads": kv_heads} if kv_heads else {}
    models_folder, tokenizer = folder / "models" / size, folder / "tokenizer"
    models_folder.mkdir(parents=True)
    tokenizer.mkdir(exist_ok=True)
    write_json(models_folder / "params.json", {"model_parallel_size": 8, "model": inner})
    write_json(models_folder / "consolidate_params.json", {"model_parallel_size": shards})
    for i in range(shards):
        name = "consolidated.pth" if shards == 1 else f"consolidated.{i:02d}.pth"
        shard = {key: _cut(key, value, i, shards) for key, value in state.items()}
        shard = _fused(shard) if fused else shard
        torch.save(shard | {"rope.freqs": torch.ones(WIDTH // HEADS // 2)}, models_folder / name)
    byte_tokenizer(words).save(str(tokenizer / "text_tokenizer.json"))
    torch.save({"state_dict": vq_state or vqgan_state(**VQ_SIZES, codes=codes)}, tokenizer / "vqgan.ckpt")
    return state


# -------------------------------------------------------------------------------------------------------------------- parts


def _state(dtype: torch.dtype, **sizes: Any) -> State:
    state = chameleon_state(width=WIDTH, heads=HEADS, hidden=HIDDEN, **sizes)
    return {key: value.to(dtype) for key, value in state.items()}


def _config(state: State, words: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "_name_or_path": "output/7B/epoch1-iter11999",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_parallel_size": 1,
        "model_type": "chameleon",
        "num_attention_heads": HEADS,
        "num_hidden_layers": sum(key.endswith("q_proj.weight") for key in state),
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "swin_norm": False,
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "transformers_version": "4.44.0",
        "use_cache": True,
        "vocab_size": len(state["lm_head.weight"]),
        "vocabulary_map": words,
        **more,
    }


def _vq_config(codes: int, old_names: bool, **sizes: Any) -> dict[str, Any]:
    sizes = VQ_SIZES | sizes
    config = {
        "model_type": "chameleon_vqgan",
        "attn_resolutions": [],
        "attn_type": "vanilla",
        "base_channels": sizes["ch"],
        "channel_multiplier": list(sizes["mult"]),
        "double_latent": False,
        "dropout": 0.0,
        "embed_dim": sizes["dim"],
        "in_channels": 3,
        "latent_channels": sizes["z"],
        "num_embeddings": codes,
        "num_res_blocks": sizes["blocks"],
        "resolution": 512,
    }
    if old_names:  # transformers' first converter left those of vqgan.yaml beside its own
        config |= {"ch": sizes["ch"], "ch_mult": list(sizes["mult"]), "double_z": False, "n_embed": codes, "out_ch": 3}
        config |= {"out_channels": 3, "z_channels": sizes["z"]}
    return config


def _write_with_vq(
    folder: Path, shards: int, codes: int, seed: int, dtype: torch.dtype, vq_state: State | None, suffix: str
) -> State:
    words = vocabulary(codes, "<image>")
    state = _state(dtype, vocab=len(words), norm_rows=HEADS, seed=seed)
    vq_state = vq_state or vqgan_state(**VQ_SIZES, codes=codes)
    convs = [key for key in vq_state if key.startswith("encoder.down.") and key.endswith("block.0.conv1.weight")]
    width = len(vq_state["encoder.conv_in.weight"])
    sizes = {
        "ch": width,
        "mult": [len(vq_state[f"encoder.down.{i}.block.0.conv1.weight"]) // width for i in range(len(convs))],
        "blocks": sum(key.startswith("encoder.down.0.block.") and key.endswith("conv1.weight") for key in vq_state),
        "z": vq_state["quant_conv.weight"].shape[1],
        "dim": vq_state["quantize.embedding.weight"].shape[1],
    }
    config = _config(state, words) | {"architectures": ["ChameleonForConditionalGeneration"]}
    config["vq_config"] = _vq_config(len(vq_state["quantize.embedding.weight"]), old_names=False, **sizes)
    with_vq = state | {f"model.vqmodel.{key}": value.to(dtype).contiguous() for key, value in vq_state.items()}
    _write_hf(folder, config, with_vq, words, shards, suffix)
    return state


def _write_hf(
    folder: Path,
    config: dict[str, Any],
    state: State,
    words: dict[str, int],
    shards: int,
    suffix: str,
    special: dict[str, str] | None = None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2})
    write_weights(folder, state, shards, suffix)
    byte_tokenizer(words).save(str(folder / "tokenizer.json"))
    special = special or {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "sep_token": "<reserved08706>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", {"clean_up_tokenization_spaces": False, "legacy": False, **special})


def _cut(key: str, value: Tensor, shard: int, shards: int) -> Tensor:
    if "_normalization." in key:
        return value[shard].clone()
    if key.endswith("norm.weight"):
        return value
    axis = int(key.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")))
    return value.chunk(shards, axis)[shard].clone()


def _fused(state: State) -> State:
    fused = {}
    for parts, whole in ((("wq", "wk", "wv"), "wqkv"), (("w1", "w3"), "w13")):
        for key in [key for key in state if f".{parts[0]}." in key]:
            tensors = [state.pop(key.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
            fused[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat(tensors)
    return state | fused


# ----------------------------------------------------------------------------------------------------------------- for tests


WRITERS: dict[str, Callable[..., State]] = {
    "lumina-mgpt": write_lumina,
    "lumina-mgpt-2": partial(write_lumina2, first_code=4000),
    "anole": write_anole,
    "anole-meta": write_anole_meta,
    "chameleon": write_chameleon,
}
"""A writer of each kind; that of Lumina-mGPT 2.0 makes a small vocabulary."""


def some_ids(batch: int = 2, count: int = 17, vocab: int = 340) -> Tensor:
    """Ids [batch, count] that every kind knows."""
    return torch.randint(vocab, (batch, count), generator=torch.Generator().manual_seed(1))


def near(found: Tensor, expected: Tensor) -> None:
    """Fail unless both are equal to 1e-5."""
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=0)


@contextmanager
def warnings_of(*names: str) -> Iterator[list[str]]:
    """What these libraries log meanwhile, from warnings on."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
