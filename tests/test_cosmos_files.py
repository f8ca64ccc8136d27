"""Cosmos-Predict1's published files load, compute what was published, and are written back bit for bit."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference_cosmos_ar as reference
import torch
from published_files import State, write_json
from safetensors.torch import save_file
from tiny_pipeline import one_clear_line, seeded
from torch import Tensor

from arsd.decoding import Grammar, LawConfig, Parts, Setting, parse_strategy
from arsd.errors import CheckpointError, InputError
from arsd.exactness.tables import run
from arsd.models.cosmos import CosmosTransformer
from arsd.models.cosmos_files import GRID, PUBLISHED_YARN, cosmos_kind, load_transformer, transformer_config
from arsd.models.rotary import VolumeRotaryTable, volume_rotary_angles
from arsd.models.target import DecoderTarget
from arsd.models.weight_files import read_state_dict

TOKENS, FRAME = math.prod(reference.GRID), math.prod(reference.GRID[1:])


def ids_for(batch: int) -> Tensor:
    return torch.randint(reference.VOCAB, (batch, TOKENS), generator=seeded(1))


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and left[k].equal(right[k]) for k in left)


def target_of(model: CosmosTransformer, given: Tensor, max_pass_tokens: int, batch: int | None = None) -> DecoderTarget:
    """Clips that begin with given tokens, behind one hidden slot: there is nothing else that the model could read."""
    inner = model.lm.model
    condition = torch.zeros(1, len(given), 1, inner.config.hidden_size, dtype=model.dtype)
    padding = torch.ones(condition.shape[:3], dtype=torch.bool)
    rest = (TOKENS, max_pass_tokens, padding, batch, given)
    return DecoderTarget(inner, model.lm.lm_head, inner.embed_tokens, condition, *rest, count_padding=False)


@torch.no_grad()
def forced_logits(model: CosmosTransformer, ids: Tensor, width: int, first: int = 1, junk: bool = False) -> Tensor:
    """[B, T - first, V] of the codes first, ..., T - 1 of clips, in passes of ``width`` tokens."""
    target, found = target_of(model, ids[:, :first], width), []
    target.prefill([-target.unread] * len(ids), width)
    for start in range(first, TOKENS, width):
        lengths = torch.full((len(ids),), start)
        fed = torch.nn.functional.pad(ids, (0, width))[:, start - 1 : start - 1 + width]
        if junk:
            target.rollback(lengths)
            target.forward((fed + 5) % reference.VOCAB, lengths, lengths.tolist())
        target.rollback(lengths)
        found.append(target.forward(fed, lengths, lengths.tolist())[0])
    return torch.cat(found, dim=1)[:, : TOKENS - first]


# ------------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("yarn", [False, True])
@torch.no_grad()
def test_logits_are_the_published_ones_however_long_the_passes_are(tmp_path, yarn):
    """float32 within 1e-5 of an independent forward in float64; with and without stretched positions."""
    state = reference.write_cosmos_ar(tmp_path, yarn)
    model, ids = load_transformer(tmp_path), ids_for(2)
    expected = torch.stack([reference.logits(state, row, yarn) for row in ids])
    assert expected.std() > 0.5 and model.dtype == torch.float32
    torch.testing.assert_close(model(ids).double(), expected, atol=1e-5, rtol=0)
    for first in (1, FRAME):
        for width in (1, 3, 8, TOKENS):
            found = forced_logits(model, ids, width, first)
            torch.testing.assert_close(found.double(), expected[:, first - 1 : -1], atol=1e-5, rtol=0)
    other = torch.stack([reference.logits(state, row, not yarn) for row in ids])
    assert (other - expected).abs().max() > 1e-2  # the positions matter, so the parity above says something


def test_what_was_fed_and_rolled_back_leaves_no_trace(tmp_path):
    reference.write_cosmos_ar(tmp_path, True)
    model, ids = load_transformer(tmp_path, dtype=torch.float64), ids_for(3)
    for width in (1, 5):
        assert torch.equal(forced_logits(model, ids, width), forced_logits(model, ids, width, junk=True))


@pytest.mark.parametrize("yarn", [None, reference.YARN])
def test_angles_of_the_published_head_width_are_the_formulas(yarn):
    """128 channels: 44 of them for time, 42 each for rows and columns."""
    grid, stretched = (3, 4, 5), {}
    if yarn:
        stretched = {"yarn_scale": 2.0, "yarn_betas": (4, 1), "yarn_lengths": (2, 3)}
    found = volume_rotary_angles(*grid, 128, 500000.0, **stretched)
    expected = reference.angles(grid, 128, 500000.0, yarn)
    assert found.shape == (60, 64) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert bool((found[:20, :22] == 0).all()) and bool((found[5, 22:43] == found[20 + 5, 22:43]).all())
    table = VolumeRotaryTable(0, found)
    for part, wanted in zip(table(torch.zeros(1), torch.arange(60)[None]), (expected.cos(), expected.sin()), strict=True):
        torch.testing.assert_close(part[0].double(), torch.cat([wanted, wanted], -1), atol=1e-7, rtol=0)
    junk = table(torch.zeros(1), torch.tensor([[59, 60, 1000]]))[0]
    assert torch.equal(junk[0, 0], junk[0, 1]) and torch.equal(junk[0, 0], junk[0, 2])  # slots behind a clip


# --------------------------------------------------------------------------------------------------------------- decoding


def decoded(model: CosmosTransformer, given: Tensor, strategy: str, batch: int | None = None, **request: Any) -> Any:
    target, count = target_of(model, given, 64, batch), len(given)
    rows = {"row_length": reference.GRID[2], "frame_length": FRAME, "pictures": count, "given": given}
    keys = {"seeds": [7] * count, "images": list(range(count)), "config": LawConfig(top_p=0.8)}

    def build(setting: Setting) -> Parts:
        return parse_strategy(strategy).build(replace(setting, given=given))

    return run(target, parts=build, grammar=Grammar(TOKENS, reference.VOCAB), **keys, **rows, **request)


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("frames", [1, 2])
def test_sjd_gives_the_tokens_of_plain_ar_behind_given_frames(tmp_path, frames, yarn):
    """Float64, windows of 2 to 64; the first frame or two are given, as NVIDIA's programs do it, and come back untouched."""
    reference.write_cosmos_ar(tmp_path, yarn)
    model = load_transformer(tmp_path, dtype=torch.float64)
    given = ids_for(3)[:, : frames * FRAME]
    plain = decoded(model, given, "ar")
    assert torch.equal(plain.tokens[:, : frames * FRAME], given) and plain.stats.tokens == [TOKENS - frames * FRAME] * 3
    assert len({tuple(row.tolist()) for row in plain.tokens}) == 3
    for window in (2, 3, 5, 8, 16, 33, 64):
        for init in ("uniform", "above", "previous-frame"):
            out = decoded(model, given, f"sjd:window={window},init={init}")
            assert torch.equal(out.tokens, plain.tokens), (window, init)
            assert out.stats.forward_passes <= plain.stats.forward_passes
    assert torch.equal(decoded(model, given, "sjd:window=8", batch=2).tokens, plain.tokens)
    assert torch.equal(decoded(model, given, "frame-copy", batch=1).tokens, plain.tokens)


def test_the_law_of_the_first_code_behind_a_given_one_does_not_see_the_hidden_slot(tmp_path):
    """Whatever stands in the slot, the tokens are the same."""
    reference.write_cosmos_ar(tmp_path)
    model, ids = load_transformer(tmp_path, dtype=torch.float64), ids_for(2)
    clean = forced_logits(model, ids, 4)
    target = target_of(model, ids[:, :1], 4)
    target.condition[:, :, 0] = 1e3
    with torch.no_grad():
        target.prefill([-target.unread] * 2, 4)
        target.rollback(torch.ones(2, dtype=torch.int64))
        found = target.forward(ids[:, :4], torch.ones(2, dtype=torch.int64), [1, 1])[0]
    assert torch.equal(found[:, :4], clean[:, :4])


# ------------------------------------------------------------------------------------------------------------- containers


def _containers(state: State) -> dict[str, Any]:
    prefixed = {f"model.{key}": value for key, value in state.items()}
    extra = {f"layers.0.attention.{name}._extra_state": torch.zeros(0, dtype=torch.uint8) for name in ("wq", "core")}
    return {
        "wrapped, with the prefix": {"model": prefixed},
        "wrapped": {"model": state},
        "flat": state,
        "flat, with the prefix": prefixed,
        "extra states": {"model": state | extra | {"layers.1.ffn_norm._extra_state": None}},
        "training": {"model": state, "iteration": 7, "optim": {"state": {}, "param_groups": []}},
    }


@pytest.mark.parametrize("name", list(_containers({})))
def test_every_container_gives_the_same_model_and_is_written_back_bit_for_bit(tmp_path, name):
    state = {key: value.bfloat16() for key, value in reference.cosmos_state().items()}
    reference.write_cosmos_ar(tmp_path)
    torch.save(_containers(state)[name], tmp_path / "model.pt")
    model = CosmosTransformer.from_single_file(tmp_path)
    assert model.dtype == torch.bfloat16 and not model.training and cosmos_kind(tmp_path) == "cosmos"
    for file in ("b.pt", "c.safetensors"):
        model.save_single_file(tmp_path / file)
        assert same(read_state_dict(tmp_path / file), state)
    again = CosmosTransformer.from_single_file(tmp_path / "b.pt", grid=reference.GRID, yarn_scale=1)
    assert torch.equal(again(ids_for(1)), model(ids_for(1)))


def test_safetensors_and_a_file_by_its_own_name_load_too(tmp_path):
    state = reference.write_cosmos_ar(tmp_path)
    expected = load_transformer(tmp_path)(ids_for(1))
    (tmp_path / "model.pt").rename(tmp_path / "other.pt")
    found = load_transformer(tmp_path / "other.pt", grid=reference.GRID, yarn_scale=1)
    assert torch.equal(found(ids_for(1)), expected)
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(load_transformer(tmp_path)(ids_for(1)), expected)
    assert torch.equal(load_transformer(tmp_path / "model.safetensors")(ids_for(1)), expected)


def test_what_is_loaded_is_a_component_of_diffusers(tmp_path):
    reference.write_cosmos_ar(tmp_path, True)
    model = load_transformer(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    again = CosmosTransformer.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids_for(2)), model(ids_for(2)))
    assert again.config["sampling"] == {"top_p": 0.8, "temperature": 1.0} and tuple(again.config["yarn_lengths"]) == (2, 3)


def test_weights_are_copies_in_one_piece_and_not_windows_into_the_file(tmp_path):
    reference.write_cosmos_ar(tmp_path)
    model = load_transformer(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    assert all(p.requires_grad and p.is_contiguous() and p.device.type == "cpu" for p in model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    assert model(ids_for(1)).isfinite().all()


def test_weights_are_never_held_twice(tmp_path):
    """Resident memory beside tensors that fill the file: it is mapped, copied and dropped one by one."""
    state = reference.cosmos_state(layers=1)
    width = 1 << 19
    state["tok_embeddings.weight"], state["output.weight"] = (torch.zeros(width, reference.WIDTH) for _ in range(2))
    reference.write_cosmos_ar(tmp_path, state=state)
    write_json(tmp_path / "config.json", {"video_latent_shape": list(reference.GRID), "apply_yarn": False})
    del state
    anonymous, most, stop = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], _anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_transformer(tmp_path)
    stop.set()
    watcher.join()
    size = sum(p.nbytes for p in model.parameters())
    assert size > 150 << 20 and most[0] - anonymous < 1.1 * size


def _anonymous() -> int:
    """Bytes of memory that are no file's."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:")) * 1024


# --------------------------------------------------------------------------------- what shapes do not tell, config.json does


def published(size: str) -> State:
    """The shapes of a published model, without the memory."""
    width, layers = {"4B": (4096, 16), "12B": (5120, 40)}[size]
    shapes = {"tok_embeddings.weight": (64000, width), "output.weight": (64000, width), "norm.weight": (width,)}
    for i in range(layers):
        name = f"layers.{i}."
        shapes |= {f"{name}attention.wq.weight": (4096, width), f"{name}attention.wo.weight": (width, 4096)}
        shapes |= {f"{name}attention.{part}.weight": (1024, width) for part in ("wk", "wv")}
        shapes |= {f"{name}attention.{part}.weight": (128,) for part in ("q_norm", "k_norm")}
        shapes |= {f"{name}feed_forward.{part}.weight": (14336, width) for part in ("w1", "w3")}
        shapes |= {f"{name}{part}_norm.weight": (width,) for part in ("attention", "ffn")}
        shapes |= {f"{name}feed_forward.w2.weight": (width, 14336)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("size", ["4B", "12B"])
def test_the_published_sizes_are_those_of_nvidias_code(size):
    config = transformer_config(published(size), "model.pt")
    with torch.device("meta"):
        model = CosmosTransformer(**config)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sorted(map(str, ours.values())) == sorted(str(tuple(value.shape)) for value in published(size).values())
    assert (config["num_heads"], config["num_key_value_heads"], config["head_dim"]) == (32, 8, 128)
    assert (config["frames"], config["rows"], config["columns"]) == GRID and model.num_tokens == 12800
    assert config["yarn_scale"] == {"4B": None, "12B": 2.0}[size]
    assert (config["yarn_betas"], config["yarn_lengths"]) == ((4.0, 1.0), (3, 40))
    assert (model.config["rope_base"], model.config["norm_eps"]) == (500000.0, 1e-5)
    assert set(PUBLISHED_YARN) == {(4096, 16), (5120, 40)}


def test_config_json_goes_before_what_is_known_of_a_size_and_arguments_before_both(tmp_path):
    shapes = published("12B")
    told = reference.YARN | {"rope_theta": 10000, "norm_eps": 1e-6, "video_latent_shape": [2, 3, 4], "yarn_scale": 4}
    config = transformer_config(shapes, "model.pt", told)
    assert (config["yarn_scale"], config["rope_base"], config["norm_eps"]) == (4, 10000, 1e-6)
    assert (config["frames"], config["rows"], config["columns"], config["yarn_lengths"]) == (2, 3, 4, (2, 3))
    options = {"grid": (9, 8, 7), "rope_base": 77.0, "yarn_scale": 1}
    config = transformer_config(shapes, "model.pt", told, **options)
    assert (config["yarn_scale"], config["rope_base"], config["frames"], config["columns"]) == (None, 77.0, 9, 7)
    assert transformer_config(shapes, "model.pt", {"apply_yarn": False})["yarn_scale"] is None
    assert transformer_config(shapes, "model.pt", {"yarn_scale": 8})["yarn_scale"] == 2.0  # apply_yarn does not say so


def test_a_json_file_beside_a_file_of_another_name_is_not_read(tmp_path):
    reference.write_cosmos_ar(tmp_path)
    (tmp_path / "model.pt").rename(tmp_path / "a.pt")
    (tmp_path / "config.json").write_text("{")
    assert load_transformer(tmp_path / "a.pt", grid=reference.GRID, yarn_scale=1).num_tokens == TOKENS


# ------------------------------------------------------------------------------------------------------------------ errors


def _without(key: str) -> Any:
    return lambda state: state.pop(key)


def _cut(key: str) -> Any:
    def change(state: State) -> None:
        state[key] = state[key][:-1]

    return change


def _with(**more: Tensor) -> Any:
    return lambda state: state.update({key.replace("__", "."): value for key, value in more.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without("norm.weight"), "missing norm.weight"),
        (_without("layers.1.attention.k_norm.weight"), "missing layers.1.attention.k_norm.weight"),
        (_without("tok_embeddings.weight"), "tok_embeddings.weight is missing"),
        (_without("layers.0.attention.q_norm.weight"), "layers.0.attention.q_norm.weight is missing"),
        (_cut("layers.1.feed_forward.w2.weight"), "layers.1.feed_forward.w2.weight has shape [39, 56], expected [40, 56]"),
        (_cut("layers.0.attention.wk.weight"), "queries of 48 and keys of 23 channels in heads of 12"),
        (_cut("layers.0.attention.q_norm.weight"), "in heads of 11"),
        (_with(medusa_head__weight=torch.zeros(2)), "unexpected medusa_head.weight"),
        (_with(layers__2__attention__wq__weight=torch.zeros(2, 2)), "n_layers is 2 in config.json, but 3 in the weights"),
        (_with(tok_embeddings__weight=torch.zeros(4)), "tok_embeddings.weight has shape [4], expected 2 axes"),
        (_with(norm__weight=torch.zeros(40, dtype=torch.int8)), "norm.weight has dtype torch.int8"),
        (_with(layers__0__cross_attention__wq__weight=torch.zeros(2)), "is a Video2World model (5B or 13B)"),
    ],
)
def test_other_weights_are_one_clear_line(tmp_path, change, says):
    state = reference.cosmos_state()
    change(state)
    reference.write_cosmos_ar(tmp_path, state=state)
    with pytest.raises(CheckpointError) as error:
        load_transformer(tmp_path)
    one_clear_line(error.value, says)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "model.pt").unlink(), "holds no model.pt or model.safetensors: give a folder of Cosmos-Predict1"),
        (lambda f: (f / "model.pt").write_bytes((f / "model.pt").read_bytes()[:-3000]), "model.pt is truncated, corrupt"),
        (lambda f: (f / "model.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1"), "is truncated, corrupt"),
        (lambda f: torch.save({"model": {}}, f / "model.pt"), "has no tensors"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no readable JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no JSON object"),
        (lambda f: (f / "config.json").unlink(), "width 40 with 2 layers is no published size: say yarn_scale=..."),
    ],
)
def test_missing_and_damaged_files_are_one_clear_line(tmp_path, damage, says):
    reference.write_cosmos_ar(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_transformer(tmp_path)
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"dim": 41}, "dim is 41 in config.json, but 40 in the weights"),
        ({"n_heads": 8}, "n_heads is 8 in config.json, but 4"),
        ({"rope_theta": "high"}, "rope_theta in config.json cannot be 'high'"),
        ({"norm_eps": -1}, "norm_eps in config.json cannot be -1"),
        ({"rope_theta": math.inf}, "rope_theta in config.json cannot be inf"),
        ({"video_latent_shape": [3, 4]}, "video_latent_shape in config.json cannot be [3, 4]"),
        ({"video_latent_shape": [3, 0, 4]}, "video_latent_shape in config.json cannot be [3, 0, 4]"),
        ({"original_latent_shape": 3}, "original_latent_shape in config.json cannot be 3"),
        ({"apply_yarn": "yes"}, "apply_yarn in config.json cannot be 'yes'"),
        ({"apply_yarn": True}, "yarn_scale in config.json cannot be None"),
        ({"rope_dim": "1D"}, "rope_dim in config.json cannot be '1D'"),
        ({"apply_abs_pos_emb": True}, "apply_abs_pos_emb in config.json cannot be True"),
        ({"insert_cross_attn": True}, "is a Video2World model (5B or 13B)"),
    ],
)
def test_a_config_json_of_another_model_is_one_clear_line(tmp_path, content, says):
    reference.write_cosmos_ar(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(reference.config_of(**content)))
    with pytest.raises(CheckpointError) as error:
        load_transformer(tmp_path)
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"grid": (3, 4)}, "grid must be (latent frames, rows, columns), not (3, 4)"),
        ({"grid": (3, 0, 4)}, "grid must be"),
        ({"grid": (3, 4.0, 4)}, "grid must be"),
        ({"rope_base": 0}, "rope_base must be a positive number"),
        ({"yarn_scale": -2}, "yarn_scale must be a positive number"),
        ({"yarn_scale": True}, "yarn_scale must be a positive number"),
    ],
)
def test_bad_arguments_are_one_clear_line(tmp_path, options, says):
    reference.write_cosmos_ar(tmp_path)
    with pytest.raises(InputError) as error:
        load_transformer(tmp_path, **options)
    one_clear_line(error.value, says)


def test_only_what_upstream_has_can_be_written_in_its_layout(tmp_path):
    sizes = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 8, "frames": 1, "rows": 2}
    small: dict[str, Any] = {"vocab_size": 9, "hidden_size": 8, "num_layers": 1, "columns": 2} | sizes
    with pytest.raises(InputError, match="use save_pretrained"):
        CosmosTransformer(**small, condition_tokens=2, caption_dim=4).save_single_file(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_files_of_other_models_are_told_apart_by_their_keys(tmp_path):
    state = reference.write_cosmos_ar(tmp_path)
    assert cosmos_kind(tmp_path) == cosmos_kind(tmp_path / "model.pt") == "cosmos"
    torch.save({"model": state | {"layers.0.cross_attention.wq.weight": torch.zeros(2)}}, tmp_path / "model.pt")
    assert cosmos_kind(tmp_path) == "cosmos-video2world"
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(2, 2)}}, tmp_path / "model.pt")
    assert cosmos_kind(tmp_path) is None and cosmos_kind(tmp_path / "nothing") is None
