"""LARP's transformer: published folders give the logits of an independent forward, and decode losslessly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_larp as reference
import torch
from reference_larp import CLASSES, CODES, TOKENS
from tiny_pipeline import one_clear_line, seeded
from torch import Tensor

from arsd.decoding import Grammar, LawConfig, parse_strategy
from arsd.errors import CheckpointError, InputError
from arsd.exactness.tables import run
from arsd.models.larp import LARPTransformer
from arsd.models.larp_files import find_kind, load_larp
from arsd.models.llamagen_files import llamagen_kind
from arsd.models.target import DecoderTarget

KINDS = ("larp", "larp-frames")
LABELS = [3, 0, CLASSES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("larp")
    for kind in KINDS:
        reference.write_transformer(root / kind, frames=kind == "larp-frames")
    return {kind: root / kind for kind in KINDS}


def codes(count: int, seed: int = 1) -> Tensor:
    return torch.randint(CODES, (count, TOKENS), generator=seeded(seed))


def conditions(model: LARPTransformer, kind: str, guided: bool = False) -> Tensor:
    """[S, 3, P, D]."""
    if kind == "larp-frames":
        return model.embed_clips(codes(3, 7))[None]
    null = torch.full((len(LABELS),), CLASSES)
    return torch.stack(
        [model.embed_classes(labels) for labels in ([torch.tensor(LABELS), null] if guided else [torch.tensor(LABELS)])]
    )


def prompts(state: dict[str, Tensor], kind: str) -> list[Tensor]:
    if kind == "larp-frames":
        return [reference.frames_prompt(state, row) for row in codes(3, 7).tolist()]
    return [reference.class_prompt(state, label) for label in LABELS]


def target_of(model: LARPTransformer, condition: Tensor, width: int, given: Tensor | None = None) -> DecoderTarget:
    lm = model.lm
    return DecoderTarget(lm.model, lm.lm_head, lm.model.embed_tokens, condition.detach(), TOKENS, width, given=given)


def forced_logits(target: DecoderTarget, tokens: Tensor, width: int, junk: bool = False) -> Tensor:
    """[S, B, N, V] of given clips, in passes of ``width`` tokens; with ``junk`` every pass is done twice, junk first."""
    count, total = tokens.shape
    found = []
    with torch.inference_mode():
        target.prefill([-target.unread] * count, width)
        for start in range(0, total, width):
            lengths = torch.full((count,), start)
            fed = torch.nn.functional.pad(tokens, (1, width))[:, start : start + width]
            if junk:
                target.rollback(lengths)
                target.forward((fed + 5) % CODES, lengths, lengths.tolist())
            target.rollback(lengths)
            found.append(target.forward(fed, lengths, lengths.tolist()))
    return torch.cat(found, dim=2)[:, :, :total]


def expected(folder: Path, kind: str, ids: Tensor) -> Tensor:
    state = reference.transformer_state(kind == "larp-frames")
    rows = zip(prompts(state, kind), ids.tolist(), strict=True)
    return torch.stack([reference.logits(state, prompt, row) for prompt, row in rows])


# -------------------------------------------------------------------------------------------------------------- the logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_published_ones_however_long_the_passes_are(folders, kind):
    model, want = load_larp(folders[kind]), expected(folders[kind], kind, codes(3))
    assert model.dtype == torch.float32 and not model.training and want.std() > 0.5
    with torch.no_grad():
        whole = model(conditions(model, kind)[0], codes(3))
    torch.testing.assert_close(whole.double(), want, atol=1e-5, rtol=0)
    for width in (1, 3, 8, TOKENS):
        found = forced_logits(target_of(model, conditions(model, kind), width), codes(3), width)[0]
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_fed_and_rolled_back_leaves_no_trace(folders, kind):
    model = load_larp(folders[kind])
    clean, after = (forced_logits(target_of(model, conditions(model, kind), 4), codes(3), 4, junk) for junk in (False, True))
    assert torch.equal(clean, after)


def test_the_second_stream_is_that_of_the_null_class(folders):
    model, state = load_larp(folders["larp"], dtype=torch.float64), reference.transformer_state()
    found = forced_logits(target_of(model, conditions(model, "larp", guided=True), 6), codes(3), 6)
    want = [reference.logits(state, reference.class_prompt(state, CLASSES), row) for row in codes(3).tolist()]
    torch.testing.assert_close(found[1], torch.stack(want), atol=1e-5, rtol=0)
    assert not torch.equal(found[0], found[1])


def test_grouped_key_and_value_heads_are_read_too(tmp_path):
    state = reference.transformer_state(kv_heads=1)
    reference.write_transformer(tmp_path, state=state, n_kv_head=1)
    model = load_larp(tmp_path)
    assert model.config["num_key_value_heads"] == 1
    want = [reference.logits(state, p, row) for p, row in zip(prompts(state, "larp"), codes(3).tolist(), strict=True)]
    found = forced_logits(target_of(model, conditions(model, "larp"), 8), codes(3), 8)[0]
    torch.testing.assert_close(found.double(), torch.stack(want), atol=1e-5, rtol=0)


def test_where_a_code_stands_is_all_that_tells_two_orders_apart(folders):
    """Nothing is rotated: without the table of positions, the last logits do not depend on the order of what is read."""
    model = load_larp(folders["larp"], dtype=torch.float64)
    ids, other = codes(1), codes(1)
    other[:, [0, 1]] = other[:, [1, 0]]
    assert ids[0, 0] != ids[0, 1]
    slots = conditions(model, "larp")[0][:1]
    with torch.no_grad():
        assert not torch.allclose(model(slots, ids)[:, -1], model(slots, other)[:, -1])
        model.lm.model.positions.weight.zero_()
        one = LARPTransformer.from_config({**model.config, "num_layers": 1}).double().eval()
        one.load_state_dict({k: v for k, v in model.state_dict().items() if ".layers.1." not in k})
        torch.testing.assert_close(one(slots, ids)[:, -1], one(slots, other)[:, -1])


# ---------------------------------------------------------------------------------------------------------------- decoding


def decoded(model: LARPTransformer, kind: str, strategy: str, guided: bool = False, **options: Any) -> Any:
    strategy_ = parse_strategy(strategy)
    scale = 1.25 if guided else 1.0
    width = 1 if strategy.startswith("ar") else 64
    target = target_of(model, conditions(model, kind, guided), width, options.get("given"))
    return run(target, strategy_, config=LawConfig(scale), grammar=Grammar(TOKENS, CODES), seeds=[4, 4, 4], **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [2, 5, 16, 64])
def test_sjd_gives_the_tokens_of_plain_ar(folders, kind, window):
    model = load_larp(folders[kind], dtype=torch.float64)
    guided = kind == "larp"
    plain = decoded(model, kind, "ar", guided)
    out = decoded(model, kind, f"sjd:window={window}", guided)
    assert torch.equal(plain.tokens, out.tokens) and out.stats.forward_passes < plain.stats.forward_passes == TOKENS
    assert not torch.equal(plain.tokens[0], plain.tokens[1])


@pytest.mark.parametrize(
    "decoder", ["sjd:window=6,coupling=maximal", "sjd:window=6,acceptance=cool-sd:delta=1", "prompt-lookup"]
)
def test_other_strategies_decode_whole_clips(folders, decoder):
    model = load_larp(folders["larp"], dtype=torch.float64)
    out = decoded(model, "larp", decoder, guided=True)
    assert out.tokens.shape == (3, TOKENS) and out.stats.tokens == [TOKENS] * 3
    if decoder == "prompt-lookup":
        assert torch.equal(out.tokens, decoded(model, "larp", "ar", guided=True).tokens)


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_tells_sizes_condition_and_published_sampling(folders, kind):
    model, config = load_larp(folders[kind]), load_larp(folders[kind]).config
    frames = kind == "larp-frames"
    assert find_kind(folders[kind]) == kind and model.num_tokens == TOKENS
    assert config["condition"] == ("frames" if frames else "class") and model.condition_tokens == (
        TOKENS + 1 if frames else 1
    )
    assert config["sampling"] == {"guidance_scale": 1.0 if frames else 1.25, "temperature": 1.0}
    assert config["num_classes"] == CLASSES or frames
    assert len(model.lm.model.embed_tokens.weight) == CODES + frames and model.lm.lm_head.out_features == CODES


def test_the_published_size_is_the_default():
    with torch.device("meta"):
        model = LARPTransformer()
    assert 630e6 < sum(p.numel() for p in model.parameters()) < 635e6  # README: 632M
    assert model.lm.model.positions.weight.shape == (1024, 1280) and model.class_embedding.num_embeddings == 102


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_model_of_diffusers(folders, kind, tmp_path):
    model = load_larp(folders[kind])
    model.save_pretrained(tmp_path)
    again = LARPTransformer.from_pretrained(tmp_path).eval()
    slots = conditions(model, kind)[0]
    with torch.no_grad():
        assert torch.equal(again(slots, codes(3)), model(slots, codes(3)))
    assert again.config["sampling"] == model.config["sampling"]


def test_dtype_is_the_files_unless_another_is_asked_for(tmp_path):
    state = {key: value.bfloat16() for key, value in reference.transformer_state().items()}
    reference.write_transformer(tmp_path, state=state)
    assert load_larp(tmp_path).dtype == torch.bfloat16
    model = load_larp(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_folder_of_llamagen_is_another(tmp_path):
    import reference_llamagen
    from published_files import write_weights

    write_weights(tmp_path / "c2i", reference_llamagen.transformer_state(), shards=1)
    assert find_kind(tmp_path / "c2i") is None and llamagen_kind(tmp_path / "c2i") == "transformer"
    assert find_kind(tmp_path) is None and find_kind(tmp_path / "nowhere") is None


def changed(key: str, value: Tensor | None, frames: bool = False) -> Any:
    def write(folder: Path) -> None:
        state = reference.transformer_state(frames)
        state.pop(key, None)
        reference.write_transformer(folder, frames, state | ({} if value is None else {key: value}))

    return write


def configured(frames: bool = False, **config: Any) -> Any:
    return lambda folder: reference.write_transformer(folder, frames, **config)


def cut(folder: Path) -> None:
    reference.write_transformer(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_config(folder: Path) -> None:
    reference.write_transformer(folder)
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    reference.write_transformer(folder)
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda folder: folder.mkdir(), "is no folder of LARP's autoregressive models"),
        (lambda folder: reference.write_tokenizer(folder), "is the video tokenizer of LARP"),
        (cut, "truncated, corrupt or no weight file"),
        (without_config, "config.json: n_head cannot be None"),
        (broken_config, "no readable JSON"),
        (changed("layers.1.ffn_norm.weight", None), "missing layers.1.ffn_norm.weight"),
        (changed("lora.weight", torch.zeros(2)), "unexpected lora.weight"),
        (changed("layers.0.attention.wo.weight", torch.zeros(7, 7)), "wo.weight has shape [7, 7], expected [32, 32]"),
        (changed("norm.weight", torch.zeros(32, dtype=torch.int8)), "norm.weight has dtype torch.int8"),
        (changed("abs_pe", torch.zeros(1, 9, 32)), "abs_pe has 9 slots, which 16 tokens per clip"),
        (changed("abs_pe", torch.zeros(9, 32)), "abs_pe has shape [9, 32], expected 3 axes"),
        (
            changed("tok_embeddings.weight", torch.zeros(CODES, 32), frames=True),
            "tok_embeddings.weight has shape [24, 32], expected [25",
        ),
        (configured(n_head=5), "n_head 5 does not fit"),
        (configured(n_head="two"), "n_head cannot be 'two'"),
        (configured(max_seq_len=0), "max_seq_len cannot be 0"),
        (configured(frames=True, max_seq_len=31), "abs_pe has 32 slots"),
        (configured(norm_eps=-1.0), "norm_eps cannot be -1.0"),
        (configured(num_classes=6), "num_classes 6 do not leave a null class among 6 rows"),
    ],
)
def test_bad_folders_are_one_clear_line(tmp_path, write, says):
    write(tmp_path / "a")
    with pytest.raises(CheckpointError) as error:
        load_larp(tmp_path / "a")
    one_clear_line(str(error.value).replace(str(tmp_path), ""), says)


@pytest.mark.parametrize(
    ("kind", "call", "says"),
    [
        ("larp", lambda m: m.embed_classes(torch.tensor([6])), "class labels must be whole numbers in 0..5"),
        ("larp", lambda m: m.embed_classes(torch.tensor([[1]])), "class labels must be whole numbers"),
        ("larp", lambda m: m.embed_clips(codes(1)), "this model has classes"),
        ("larp-frames", lambda m: m.embed_classes(torch.tensor([1])), "this model goes on from frames"),
        ("larp-frames", lambda m: m.embed_clips(codes(1)[:, 1:]), "must be [B, 16] below 24"),
        ("larp-frames", lambda m: m.embed_clips(codes(1) + CODES), "must be [B, 16] below 24"),
        ("larp", lambda m: LARPTransformer(condition="text"), "condition must be 'class' or 'frames'"),
        ("larp", lambda m: LARPTransformer(num_heads=7), "is no multiple of 2 * 7 heads"),
    ],
)
def test_bad_inputs_are_one_clear_line(folders, kind, call, says):
    with pytest.raises(InputError) as error:
        call(load_larp(folders[kind]))
    one_clear_line(error.value, says)
