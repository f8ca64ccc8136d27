"""Published EAGLE drafters load, are checked against their target, and are written back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference_eagle as reference
import torch
from safetensors.torch import load_file, save_file
from test_drafters import PROMPTS, drafting
from tiny_pipeline import one_clear_line, seeded, text_pipeline
from torch import Tensor

from arsd import EagleDrafter
from arsd.errors import CheckpointError, InputError

LLAMA = {"model_type": "llama", "num_attention_heads": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu", "hidden_size": 64}
CHAMELEON = {"model_type": "chameleon", "num_attention_heads": 4, "rms_norm_eps": 1e-5, "model_parallel_size": 1}


def published(folder: Path, state: dict[str, Tensor], config: dict[str, Any] | None = LLAMA, suffix: str = ".bin") -> Path:
    folder.mkdir(exist_ok=True)
    if suffix == ".bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def chameleon_state(**options: Any) -> dict[str, Tensor]:
    return reference.drafter_state(chameleon=True, **{"width": 32, "heads": 4, "hidden": 48, "vocab": 40} | options)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and left[k].equal(right[k]) for k in left)


# ---------------------------------------------------------------------------------------------------------------- loading


def test_what_the_files_do_not_say_is_as_published(tmp_path):
    drafter = EagleDrafter.from_single_file(published(tmp_path / "a", reference.drafter_state(kv_heads=1)))
    wanted = {"hidden_size": 64, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96, "norm_eps": 1e-6}
    wanted |= {"block": "llama", "input_norm": False, "condition_inputs": "zero-token", "see_padding": True}
    assert drafter.config.items() >= (wanted | {"see_first": False, "bias": True, "vocab_size": 32}).items()
    assert not drafter.training and not drafter.embed_tokens.weight.requires_grad and drafter.fc.weight.requires_grad
    wanted = {"block": "chameleon", "input_norm": True, "condition_inputs": "embedding", "see_padding": False}
    wanted |= {"num_heads": 4, "norm_eps": 1e-5, "see_first": False, "bias": False, "embed_upscale": 1.0}
    folder = published(tmp_path / "b", chameleon_state(bias=False), None)
    assert EagleDrafter.from_single_file(folder / "pytorch_model.bin").config.items() >= wanted.items()
    bare = published(tmp_path / "d", reference.drafter_state(), None)
    assert EagleDrafter.from_single_file(bare, num_heads=2).config["norm_eps"] == 1e-6
    scaled = EagleDrafter.from_single_file(published(tmp_path / "c", chameleon_state(), CHAMELEON | {"embed_upscale": 2.0}))
    assert scaled.config["embed_upscale"] == 2.0


@pytest.mark.parametrize(("width", "heads"), [(1280, 20), (3200, 32)])
def test_published_sizes_tell_their_heads(tmp_path, width, heads):
    state = reference.drafter_state(width=width, heads=heads, hidden=8, vocab=4)
    folder = published(tmp_path / "a", {key: value.half() for key, value in state.items()}, None, ".safetensors")
    assert EagleDrafter.from_single_file(folder).config["num_heads"] == heads


def test_the_embedding_of_the_target_is_not_kept_twice(tmp_path):
    pipe = text_pipeline()
    lm = pipe.transformer.lm
    state = reference.drafter_state() | {"embed_tokens.weight": lm.model.embed_tokens.weight.detach().half()}
    folder = published(tmp_path / "a", {key: value.half() for key, value in state.items()})
    shared, own = (EagleDrafter.from_single_file(folder, lm=given) for given in (pipe.transformer, None))
    assert shared.embed_tokens is None and shared.config["vocab_size"] is None and own.embed_tokens is not None
    assert shared.dtype == torch.float32 and own.dtype == torch.float16  # the target's, else the file's
    # the release falls back to the weights of the head as token embeddings: such a drafter keeps its own
    other = state | {"embed_tokens.weight": lm.lm_head.weight.detach().half()}
    folder = published(tmp_path / "b", {key: value.half() for key, value in other.items()})
    kept = EagleDrafter.from_single_file(folder, lm=lm)
    assert torch.equal(kept.embed_tokens.weight, lm.lm_head.weight.half().float())
    drafts = []
    for drafter in (shared, kept, own.float()):
        out = drafting(text_pipeline(), drafter)(PROMPTS, generator=seeded(0), decoder="eagle", trace=True, progress=False)
        drafts.append(torch.cat([step.drafts for step in out.trace], dim=1))
    assert not torch.equal(drafts[0], drafts[1])


# ------------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("kind", ["llama", "llama-gqa", "chameleon", "chameleon-shards", "chameleon-heads"])
@pytest.mark.parametrize(("suffix", "dtype"), [(".bin", torch.float32), (".safetensors", torch.bfloat16)])
def test_saving_writes_the_published_layout_bit_for_bit(tmp_path, kind, suffix, dtype):
    make: Any = chameleon_state if kind.startswith("chameleon") else reference.drafter_state
    more = {"llama-gqa": {"kv_heads": 1}, "chameleon-shards": {"shards": 2}, "chameleon-heads": {"shards": 4}}
    state = {key: value.to(dtype) for key, value in make(**more.get(kind, {})).items()}
    config = CHAMELEON if kind.startswith("chameleon") else LLAMA
    first = EagleDrafter.from_single_file(published(tmp_path / "a", state, config, suffix))
    assert {p.dtype for p in first.parameters()} == {dtype}
    first.save_single_file(tmp_path / "folder")
    first.save_single_file(tmp_path / f"file{suffix}")
    written = (
        torch.load(tmp_path / "file.bin", weights_only=True) if suffix == ".bin" else load_file(tmp_path / f"file{suffix}")
    )
    assert same(written, state) and same(load_file(tmp_path / "folder" / "model.safetensors"), state)
    second = EagleDrafter.from_single_file(tmp_path / "folder")
    assert same(second.state_dict(), first.state_dict()) and dict(second.config) == dict(first.config)
    told = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert told["num_hidden_layers"] == 1 and (config == LLAMA or told["model_parallel_size"] == len(_q_norm(state)))


def _q_norm(state: dict[str, Tensor]) -> Tensor:
    return state["layers.0.self_attn.q_norm.weight"]


def test_a_drafter_without_an_embedding_is_saved_with_the_targets(tmp_path):
    lm = text_pipeline().transformer.lm
    state = reference.drafter_state() | {"embed_tokens.weight": lm.model.embed_tokens.weight.detach()}
    drafter = EagleDrafter.from_single_file(published(tmp_path / "a", state), lm=lm)
    drafter.save_single_file(tmp_path / "b.safetensors", lm=lm)
    assert same(load_file(tmp_path / "b.safetensors"), state)
    with pytest.raises(InputError) as error:
        drafter.save_single_file(tmp_path / "c.safetensors")
    one_clear_line(error.value, "lm=")


def test_what_the_layout_cannot_hold_is_not_written(tmp_path):
    ours = EagleDrafter(hidden_size=32, num_heads=2, intermediate_size=32, vocab_size=8)
    torn = EagleDrafter.from_single_file(published(tmp_path / "a", chameleon_state(kv_heads=2), CHAMELEON))
    torn.layer.self_attn.q_norm.weight.data = torch.randn(4, 8)
    for drafter, says in ((ours, "condition_inputs, see_padding, see_first"), (torn, "norms of queries")):
        with pytest.raises(InputError) as error:
            drafter.save_single_file(tmp_path / "b")
        one_clear_line(error.value, says)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("container", ["model", "module", "state_dict"])
def test_other_containers_load_too(tmp_path, container):
    state = reference.drafter_state()
    torch.save({container: state, "epoch": 20}, tmp_path / "drafter.pt")
    drafter = EagleDrafter.from_single_file(tmp_path / "drafter.pt", num_heads=2)
    assert torch.equal(drafter.embed_tokens.weight, state["embed_tokens.weight"])


# ---------------------------------------------------------------------------------------------------------------- errors

Q, NORM = "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_norm.weight"


def _state(kind: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    llama, chameleon = reference.drafter_state(), chameleon_state()
    table: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None]] = {
        "missing key": ({k: v for k, v in llama.items() if k != Q}, LLAMA),
        "missing norm": ({k: v for k, v in chameleon.items() if k != NORM}, CHAMELEON),
        "extra key": (llama | {"midlayer.norm.weight": torch.zeros(64)}, LLAMA),
        "input norm": (llama | {"layers.0.input_layernorm.weight": torch.ones(64)}, LLAMA),
        "no bias": ({k: v for k, v in llama.items() if k != "fc.bias"}, LLAMA | {"bias": True}),
        "two layers": (llama | {k.replace("layers.0", "layers.1"): v for k, v in llama.items()}, LLAMA),
        "wrong shape": (llama | {"fc.weight": torch.zeros(7, 7)}, LLAMA),
        "wrong axes": (llama | {"embed_tokens.weight": torch.zeros(7)}, LLAMA),
        "integers": (llama | {Q: torch.zeros(64, 64, dtype=torch.int8)}, LLAMA),
        "norm rows": (chameleon_state(shards=3), CHAMELEON),
        "norm shape": (chameleon | {NORM.replace("q_norm", "k_norm"): torch.zeros(1, 4)}, CHAMELEON),
        "no heads": (llama, None),
        "heads": (llama, LLAMA | {"num_attention_heads": 3}),
        "kv heads": (reference.drafter_state(kv_heads=1), LLAMA | {"num_attention_heads": 1}),
        "norm heads": (chameleon, CHAMELEON | {"num_attention_heads": 8}),
        "odd heads": (llama, LLAMA | {"num_attention_heads": "2"}),
        "odd eps": (llama, LLAMA | {"rms_norm_eps": -1}),
        "other config": (llama, LLAMA | {"hidden_size": 128}),
        "activation": (llama, LLAMA | {"hidden_act": "gelu"}),
    }
    return table[kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing key", f"missing {Q}"),
        ("missing norm", f"missing {NORM}"),
        ("extra key", "unexpected midlayer.norm.weight"),
        ("input norm", "unexpected layers.0.input_layernorm.weight"),
        ("no bias", "missing fc.bias"),
        ("two layers", "2 decoder layers"),
        ("wrong shape", "fc.weight has shape [7, 7], expected [64, 128]"),
        ("wrong axes", "embed_tokens.weight has shape [7], expected 2 axes"),
        ("integers", "dtype torch.int8"),
        ("norm rows", "3 rows, no divisor of 4 heads"),
        ("norm shape", "has shape [1, 4], expected [1, 8]"),
        ("no heads", "say num_heads="),
        ("heads", "give the right num_heads"),
        ("kv heads", "give the right num_heads"),
        ("norm heads", "does not fit 8 heads"),
        ("odd heads", "num_attention_heads must be a whole number"),
        ("odd eps", "rms_norm_eps must be a number > 0"),
        ("other config", "hidden_size is 128, but 64"),
        ("activation", "hidden_act must be 'silu'"),
    ],
)
def test_a_bad_drafter_is_one_clear_line(tmp_path, kind, says):
    folder = published(tmp_path / "a", *_state(kind))
    with pytest.raises(CheckpointError) as error:
        EagleDrafter.from_single_file(folder)
    one_clear_line(str(error.value).replace(str(tmp_path), ""), says)
    assert str(folder) in str(error.value)


def test_damaged_and_missing_files_are_one_clear_line(tmp_path):
    cut = published(tmp_path / "cut", reference.drafter_state())
    (cut / "pytorch_model.bin").write_bytes((cut / "pytorch_model.bin").read_bytes()[:-500])
    half = published(tmp_path / "half", reference.drafter_state(), suffix=".safetensors")
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:-500])
    broken, listed = (published(tmp_path / name, reference.drafter_state()) for name in ("broken", "listed"))
    (broken / "config.json").write_text('{"hidden_size": ')
    (listed / "config.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    cases = {"cut": "truncated", "half": "truncated", "broken": "no readable JSON", "listed": "no JSON object"}
    for name, says in (cases | {"empty": "neither model.safetensors nor", "nowhere": "is not a file"}).items():
        with pytest.raises(CheckpointError) as error:
            EagleDrafter.from_single_file(tmp_path / name)
        one_clear_line(str(error.value).replace(str(tmp_path), ""), says)


def test_a_drafter_of_another_target_is_refused(tmp_path):
    lm = text_pipeline().transformer.lm
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 32}
    chameleon = SimpleNamespace(config=SimpleNamespace(model_type="chameleon", **sizes))
    cases = [
        (reference.drafter_state(width=32), {"num_attention_heads": 2}, lm, "width is 32, the target's 64"),
        (reference.drafter_state(heads=4), {"num_attention_heads": 4}, lm, "heads is 4, the target's 2"),
        (reference.drafter_state(vocab=16), LLAMA, lm, "16 ids, the target 32"),
        (chameleon_state(width=64, heads=2), None, lm, "kind is chameleon, the target's llama"),
        (reference.drafter_state(width=32, heads=4), None, chameleon, "kind is llama, the target's chameleon"),
    ]
    for i, (state, config, target, says) in enumerate(cases):
        with pytest.raises(CheckpointError) as error:
            EagleDrafter.from_single_file(published(tmp_path / str(i), state, config), lm=target)
        one_clear_line(str(error.value).replace(str(tmp_path), ""), says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 4}, "4 heads, the target 2"),
        ({"vocab": 16}, "16 ids, the target 32"),
        ({"width": 32}, "32 wide, the target 64"),
        ({"dtype": torch.float16}, "torch.float16, the target torch.float32"),
    ],
)
def test_a_drafter_that_was_never_checked_is_refused_by_the_call(tmp_path, options, says):
    dtype = options.pop("dtype", None)
    folder = published(tmp_path / "a", reference.drafter_state(**options), None)
    drafter = EagleDrafter.from_single_file(folder, num_heads=options.get("heads", 2), dtype=dtype)
    with pytest.raises(InputError) as error:
        drafting(text_pipeline(), drafter)("red apple", decoder="eagle")
    one_clear_line(error.value, says)
