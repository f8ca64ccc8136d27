"""Published T5 folders load their encoder alone, and its features are those of the whole model."""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from arsd.errors import CheckpointError
from arsd.models.captions import encode_captions
from arsd.models.text_encoders import load_t5_encoder

WORDS = ["▁a", "▁red", "▁cat", "▁dog", "▁and", "▁the", "▁", "a", "c", "d", "o", "g", "t"]
EXTRA = [f"<extra_id_{i}>" for i in range(100)]
SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": EXTRA}
# google/flan-t5-xl's, but for the sizes
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 48,
    "d_kv": 8,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 5,
    "num_heads": 4,
    "num_layers": 3,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 128,
}
CAPTIONS = ["a red cat", "the dog and the cat and a dog", ""]
LENGTH = 12
LAYOUTS = ["safetensors", "shards", "bin", "bin shards"]


def whole_model() -> T5ForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(**CONFIG))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write_weights(folder: Path, layout: str, state: dict[str, Tensor]) -> None:
    """As the repository has them: two shards; the safetensors hold ``shared`` once, though their index names its copies."""
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    stored = dict(state) if "bin" in layout else {k: v.contiguous().clone() for k, v in state.items() if k not in tied}
    stem, suffix, save = ("pytorch_model", "bin", torch.save) if "bin" in layout else ("model", "safetensors", save_file)
    if "shards" not in layout:
        save(stored, folder / f"{stem}.{suffix}")
        return
    names, index = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)], {}
    for name, keys in zip(names, (list(stored)[::2], list(stored)[1::2]), strict=True):
        save({key: stored[key] for key in keys}, folder / name)
        index |= dict.fromkeys(keys, name)
    index |= {key: index["shared.weight"] for key in tied}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / f"{stem}.{suffix}.index.json").write_text(text)


def write_tokenizer(folder: Path) -> None:
    """A Unigram vocabulary in the layout of T5's ``tokenizer.json``."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(word, -1.0 - i / 10) for i, word in enumerate(WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces + [(name, 0.0) for name in reversed(EXTRA)], unk_id=2))
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *EXTRA])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)


def write_tokenizer_config(folder: Path) -> None:
    settings = SPECIAL | {"extra_ids": 100, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL))


def published(folder: Path, layout: str = "shards", state: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    write_weights(folder, layout, state or whole_model().state_dict())
    write_tokenizer(folder)
    return folder


def right_padded(tokenizer: Any) -> Any:
    return tokenizer(CAPTIONS, max_length=LENGTH, padding="max_length", truncation=True, return_tensors="pt")


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_features_are_those_of_the_whole_models_encoder(tmp_path: Path, layout: str) -> None:
    tokenizer, encoder = load_t5_encoder(published(tmp_path, layout))
    batch = right_padded(tokenizer)
    assert batch["input_ids"][0, :5].tolist() == [3, 4, 5, 1, 0] and batch["attention_mask"].sum(1).tolist() == [4, 9, 1]
    expected = whole_model().encoder(**batch).last_hidden_state
    assert torch.equal(encoder(**batch).last_hidden_state, expected)
    features, mask = encode_captions(tokenizer, encoder, CAPTIONS, LENGTH)
    assert mask[0].tolist() == [0] * 8 + [1] * 4 and torch.equal(features[0, 8:], expected[0, :4])
    assert expected.std() > 0.1 and not features[0, :8].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_nothing_but_the_encoder_stays_in_memory(tmp_path: Path, layout: str) -> None:
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), Tensor)}
    tokenizer, encoder = load_t5_encoder(published(tmp_path, layout))
    batch = right_padded(tokenizer)
    expected = encoder(**batch).last_hidden_state
    gc.collect()
    mine = {id(parameter) for parameter in encoder.parameters()} | {id(part) for part in (expected, *batch.values())}
    assert not [t.shape for t in gc.get_objects() if issubclass(type(t), Tensor) and id(t) not in before | mine]
    assert not encoder.training and not any("decoder" in name for name, _ in encoder.named_parameters())
    assert sum(p.untyped_storage().nbytes() for p in encoder.parameters()) == sum(
        4 * p.numel() for p in encoder.parameters()
    )
    for file in [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]:
        with file.open("r+b") as old:
            old.write(bytes(file.stat().st_size))  # the weights are copies, not windows into the files
    assert torch.equal(encoder(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("layout", ["shards", "bin shards"])
def test_dtype_is_the_folders_unless_another_is_asked_for(tmp_path: Path, layout: str) -> None:
    state = {key: value.bfloat16() for key, value in whole_model().state_dict().items()}
    for folder, changes, asked, expected in (
        ("weights", {}, None, torch.bfloat16),
        ("config", {"torch_dtype": "float32"}, None, torch.float32),
        ("asked", {}, torch.float32, torch.float32),
        ("upstream", {"torch_dtype": "float32"}, torch.bfloat16, torch.bfloat16),
    ):
        _, encoder = load_t5_encoder(published(tmp_path / folder, layout, state, **changes), dtype=asked)
        assert {parameter.dtype for parameter in encoder.parameters()} == {expected}
    _, encoder = load_t5_encoder(tmp_path / "asked", dtype=torch.float16)
    assert {name.split(".")[-2] for name, p in encoder.named_parameters() if p.dtype != torch.float16} == {"wo"}


def test_an_encoder_without_decoder_loads_too(tmp_path: Path) -> None:
    load_t5_encoder(published(tmp_path / "whole"))[1].save_pretrained(tmp_path / "alone")
    write_tokenizer(tmp_path / "alone")
    batch = right_padded(load_t5_encoder(tmp_path / "whole")[0])
    features = [load_t5_encoder(tmp_path / name)[1](**batch).last_hidden_state for name in ("whole", "alone")]
    assert torch.equal(*features)


def test_loading_says_nothing_and_leaves_the_log_level_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    published(tmp_path, "bin")
    before = transformers_logging.get_verbosity()
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            load_t5_encoder(tmp_path)  # transformers would report lm_head as unexpected
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records and transformers_logging.get_verbosity() == before


def test_spiece_model_alone_gives_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "text").write_text("\n".join(["a red cat and the dog", "the cat sat on a mat", "dogs and cats"] * 20))
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=28, hard_vocab_limit=False, **ids
    )
    folder = published(
        tmp_path, vocab_size=130, state=T5ForConditionalGeneration(T5Config(**CONFIG | {"vocab_size": 130})).state_dict()
    )
    (folder / "tokenizer.json").unlink()
    tokenizer, _ = load_t5_encoder(folder)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for caption in (*CAPTIONS, "two  spaces", "a ﬁne Cat, 3 dogs"):
        assert tokenizer(caption)["input_ids"] == [*expected.encode(caption), 1]


# ----------------------------------------------------------------------------------------------------------------- errors


def _damaged(kind: str, folder: Path) -> Path:
    published(folder, vocab_size=64 if kind == "vocabulary" else 128)
    shard = folder / "model-00001-of-00002.safetensors"
    removed = {"no config": "config.json", "no tokenizer": "tokenizer.json", "no shard": shard.name}
    written = {
        "config is a list": ("config.json", "[]"),
        "config is cut": ("config.json", '{"model_type": "t5'),
        "another model": ("config.json", '{"model_type": "bert"}'),
        "tokenizer is cut": ("tokenizer.json", '{"version": '),
        "index is cut": ("model.safetensors.index.json", "{"),
    }
    if kind == "no folder":
        return folder / "nowhere"
    if kind == "a file":
        return shard
    if kind in removed:
        (folder / removed[kind]).unlink()
    elif kind in written:
        (folder / written[kind][0]).write_text(written[kind][1])
    elif kind == "shard is cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif kind == "no weights":
        for file in folder.glob("model*"):
            file.unlink()
    elif kind == "weights missing":
        state = {
            k: v for k, v in whole_model().state_dict().items() if k != "encoder.block.1.layer.0.SelfAttention.q.weight"
        }
        write_weights(folder, "shards", state)
    elif kind in ("wrong shape", "vocabulary"):
        state = whole_model().state_dict()
        key = "encoder.final_layer_norm.weight" if kind == "wrong shape" else "shared.weight"
        write_weights(folder, "shards", state | {key: torch.zeros(64, *state[key].shape[1:])})
    return folder


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no folder", "is not a folder"),
        ("a file", "is not a folder"),
        ("no config", "config.json is missing or damaged"),
        ("config is a list", "config.json is missing or damaged"),
        ("config is cut", "config.json is missing or damaged"),
        ("another model", "holds a 'bert' model, not a 't5'"),
        ("no tokenizer", "neither tokenizer.json nor spiece.model"),
        ("tokenizer is cut", "incomplete or damaged"),
        ("index is cut", "incomplete or damaged"),
        ("no shard", "model-00001-of-00002.safetensors"),
        ("shard is cut", "incomplete or damaged"),
        ("no weights", "incomplete or damaged"),
        (
            "weights missing",
            "lacks weights of the encoder or has other shapes (encoder.block.1.layer.0.SelfAttention.q.weight)",
        ),
        ("wrong shape", "lacks weights of the encoder or has other shapes (encoder.final_layer_norm.weight)"),
        ("vocabulary", "the tokenizer knows 116 tokens, its weights 64"),
    ],
)
def test_a_bad_folder_is_one_clear_line(tmp_path: Path, kind: str, says: str) -> None:
    path = _damaged(kind, tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_t5_encoder(path)
    message = str(error.value)
    assert says in message and str(path) in message
    assert "\n" not in message and "\033" not in message and len(message) < 300 + 2 * len(str(path))


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_spiece_model_without_its_packages_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    (published(tmp_path) / "tokenizer.json").rename(tmp_path / "spiece.model")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(CheckpointError, match=r"no tokenizer.json: add it, or read spiece.model with pip install .*"):
        load_t5_encoder(tmp_path)
