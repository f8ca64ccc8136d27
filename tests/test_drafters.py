"""Draft models: EAGLE reads what it was trained on, small models what they were given, and neither shows in the picture."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_pipeline import hushed
from tiny_pipeline import TOKENS, class_pipeline, codes, one_clear_line, seeded, text_pipeline, tiny_transformer
from torch import Tensor
from torch.nn import functional as F

import arsd
from arsd import EagleDrafter
from arsd.decoding.types import DraftModel
from arsd.errors import ArsdError, DataError, InputError, StrategyError
from arsd.models.eagle_draft import EagleDraftModel
from arsd.training import drafter as training
from arsd.training.drafter import DrafterLoss, DrafterTask, run_mask

PROMPTS = ["red apple", "green pear dog face blue heart", "dog face", "blue heart"]  # the second fills its slots


def eagle(pipe: arsd.LlamaGenPipeline, seed: int = 3) -> EagleDrafter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EagleDrafter.for_transformer(pipe.transformer.lm).eval().to(pipe.transformer.dtype)


def drafting(pipe: arsd.LlamaGenPipeline, drafter: Any = None) -> arsd.LlamaGenPipeline:
    pipe.register_modules(drafter=drafter if drafter is not None else eagle(pipe))
    return hushed(pipe)


@pytest.fixture(scope="module", params=["text", "class"])
def pipe(request) -> arsd.LlamaGenPipeline:
    return drafting(text_pipeline() if request.param == "text" else class_pipeline())


def inputs(pipe: arsd.LlamaGenPipeline) -> dict[str, Any]:
    return {"prompt": PROMPTS} if pipe.text_encoder is not None else {"class_labels": [0, 1, 2, 3]}


# ---------------------------------------------------------------- EAGLE at work is EAGLE in training


@pytest.fixture(scope="module")
def double() -> arsd.LlamaGenPipeline:
    return drafting(text_pipeline().to(torch.float64))


def decoded(pipe: arsd.LlamaGenPipeline) -> tuple[Tensor, Tensor, Tensor, Any]:
    """(tokens, condition, padding, target that has read them all and kept its features)."""
    tokens = codes(pipe, PROMPTS)
    condition, padding, _ = pipe.encode_inputs(PROMPTS)
    target = pipe.target_maker(condition, padding)(4, len(PROMPTS))
    target.keep_features()
    with torch.inference_mode():
        target.prefill([-target.unread] * len(tokens), 4)
        for n in range(0, TOKENS, 4):
            lengths = torch.full((len(tokens),), n)
            target.rollback(lengths)
            fed = F.pad(tokens, (1, 0))[:, n : n + 4]
            target.forward(fed, lengths, lengths.tolist())
    return tokens, condition, padding, target


def draft_model(pipe: arsd.LlamaGenPipeline, condition: Tensor, padding: Tensor, window: int = 5) -> EagleDraftModel:
    lm = pipe.transformer.lm
    parts = (pipe.drafter, lm.model.rotary_emb, lm.lm_head, lm.model.embed_tokens)
    return EagleDraftModel(*parts, condition, TOKENS, window, padding)


def test_guess_number_j_reads_what_run_j_of_the_training_read(double):
    """Logits of every guess, in chains that begin at every position, against the training's runs over whole pictures."""
    tokens, condition, padding, target = decoded(double)
    task = DrafterTask(double, DrafterLoss(depth=4))
    embeds, features, bias = task.teach(PROMPTS, tokens)
    kept = target.features[:, : features.shape[1]]
    torch.testing.assert_close(kept[:, -TOKENS:], features[:, -TOKENS:], rtol=0, atol=1e-10)
    head = double.transformer.lm.lm_head
    with torch.inference_mode():
        runs = [head(guessed).unflatten(0, (2, -1)) for guessed in task.runs(double.drafter, embeds, features, bias)]
        model = draft_model(double, condition, padding)
        model.begin(target)
        first = features.shape[1] - TOKENS
        for n in (0, 1, 4, 5, 9, 12):
            read = max(0, n - 3)
            fed = F.pad(tokens, (1, 8))[:, read : read + 5]
            logits = model.catch_up(fed, [read] * len(tokens), [n - read] * len(tokens))
            for j in range(4):
                torch.testing.assert_close(logits, runs[j][:, :, first + n + j], rtol=0, atol=1e-9)
                if n + j < TOKENS - 1:
                    logits = model.extend(tokens[:, n + j])


def test_a_row_that_begins_another_picture_forgets_the_one_before(double):
    tokens, condition, padding, target = decoded(double)
    swapped = [2, 0, 3, 1]
    with torch.inference_mode():
        fresh = draft_model(double, condition[:, swapped], padding[:, swapped])
        used = draft_model(double, condition, padding)
        used.begin(target)
        used.catch_up(tokens[:, :5], [0] * 4, [4] * 4)
        used.join([0, 1, 2, 3], swapped)
        order = torch.tensor([s * 4 + b for s in range(2) for b in swapped])
        target.features[:] = target.features[order]
        fresh.begin(target)
        fed = F.pad(tokens[swapped], (1, 0))[:, :5]
        results = [model.catch_up(fed, [0] * 4, [3, 0, 2, 1]) for model in (fresh, used)]
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_row_that_still_reads_its_condition_waits(double):
    """Junk passes of a waiting row leave no trace."""
    tokens, condition, padding, target = decoded(double)
    fed = F.pad(tokens, (1, 0))[:, :5]
    with torch.inference_mode():
        plain, waited = draft_model(double, condition, padding), draft_model(double, condition, padding)
        for model in (plain, waited):
            model.begin(target)
        waited.catch_up(fed, [0, -1, 0, -1], [2, 0, 1, 0])
        waited.extend(tokens[:, 3])
        results = [model.catch_up(fed, [0] * 4, [3, 2, 1, 0]) for model in (plain, waited)]
        torch.testing.assert_close(*results, rtol=0, atol=0)


# ---------------------------------------------------------------- the drafter does not show


@pytest.mark.parametrize("decoder", ["eagle", "eagle:draft_length=1", "eagle:draft_length=9", "hybrid:window=8"])
def test_plain_ars_tokens_whatever_the_drafter(pipe, decoder):
    plain = codes(pipe, **inputs(pipe), decoder="ar")
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoder), plain)
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoder, batch_size=3), plain)
    assert torch.equal(
        codes(pipe, **inputs(pipe), decoder=decoder, guidance_scale=1.0),
        codes(pipe, **inputs(pipe), decoder="ar", guidance_scale=1.0),
    )


def test_strategies_with_and_without_a_drafter_share_a_batch(pipe):
    decoders = ["eagle:draft_length=3", "ar", "hybrid:window=6", "sjd:window=4"]
    plain = codes(pipe, **inputs(pipe), decoder="ar")
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoders), plain)
    assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoders, batch_size=2), plain)


def test_a_drafter_that_knows_the_answer_is_always_right():
    """A small model that is the target itself: every pass takes all guesses, under either rule, and in a queue."""
    pipe = drafting(text_pipeline())
    pipe.drafter = pipe.transformer
    for decoder in ("eagle:draft_length=3", "eagle:draft_length=3,coupling=rejection"):
        for size in (None, 3):
            out = pipe(PROMPTS, generator=seeded(0), decoder=decoder, batch_size=size, output_type="latent")
            assert out.stats.tokens_per_pass == 4 and out.stats.row_passes == [4] * 4


def test_a_smaller_model_of_the_same_codes_drafts(pipe):
    other = tiny_transformer(pipe.transformer.config["condition"], seed=1)
    plain = codes(pipe, **inputs(pipe), decoder="ar")
    mine, pipe.drafter = pipe.drafter, other
    try:
        for decoder in ("eagle", "hybrid:window=8", "speculative:drafter=draft-model,rule=seed-exact,window=4"):
            assert torch.equal(codes(pipe, **inputs(pipe), decoder=decoder), plain)
    finally:
        pipe.drafter = mine


# ---------------------------------------------------------------- saving, mistakes


def test_a_pipeline_saves_and_loads_its_drafter(tmp_path):
    pipe = drafting(text_pipeline())
    without = text_pipeline()
    without.save_pretrained(tmp_path / "without")
    pipe.save_pretrained(tmp_path / "with")
    loaded = hushed(arsd.AutoARPipeline.from_pretrained(tmp_path / "with"))
    assert isinstance(loaded.drafter, EagleDrafter)
    for key, value in pipe.drafter.state_dict().items():
        assert torch.equal(loaded.drafter.state_dict()[key], value)
    outs = [p(PROMPTS, generator=seeded(0), decoder="eagle") for p in (pipe, loaded)]
    assert outs[0].stats.forward_passes == outs[1].stats.forward_passes
    bare = hushed(arsd.AutoARPipeline.from_pretrained(tmp_path / "without"))
    assert bare.drafter is None and bare.model_hash == loaded.model_hash  # a drafter is no part of the model


def test_a_small_model_is_saved_as_a_drafter_too(tmp_path):
    pipe = drafting(text_pipeline(), tiny_transformer("text", seed=1))
    pipe.save_pretrained(tmp_path)
    loaded = arsd.AutoARPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.drafter, arsd.LlamaGenTransformer)


@pytest.mark.parametrize("decoder", ["eagle", "hybrid:window=8", "speculative:drafter=draft-model,window=4"])
def test_without_a_drafter_there_is_one_clear_error(decoder):
    with pytest.raises(StrategyError) as error:
        hushed(text_pipeline())("red apple", decoder=decoder)
    one_clear_line(error.value, "no drafter")


def test_a_drafter_of_another_model_is_refused():
    pipe = text_pipeline()
    wrong = [EagleDrafter(hidden_size=32, num_heads=2, intermediate_size=64), "eagle"]
    for drafter in wrong[:1]:
        with pytest.raises(InputError) as error:
            drafting(pipe, drafter)("red apple", decoder="eagle")
        one_clear_line(error.value, "another model")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("eagle:draft_length=0", "draft_length"),
        ("eagle:draft_length=4,pass_tokens=4", "pass_tokens"),
        ("eagle:coupling=none", "coupling"),
        ("hybrid:draft_length=8,window=8", "window"),
        ("hybrid:init=middle", "init"),
        ("hybrid:window=8,pass_tokens=4", "pass_tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(text, says):
    with pytest.raises(StrategyError) as error:
        arsd.parse_strategy(text)
    one_clear_line(error.value, says)


def test_blocks_and_inputs_that_do_not_exist_are_refused():
    for options in ({"block": "mamba"}, {"condition_inputs": "none"}):
        with pytest.raises(ArsdError):
            EagleDrafter(hidden_size=64, num_heads=2, intermediate_size=64, **options)


def test_the_protocol_is_kept(double):
    _, condition, padding, _ = decoded(double)
    model: DraftModel = draft_model(double, condition, padding)
    assert all(callable(getattr(model, name)) for name in ("begin", "catch_up", "extend", "join"))


# ---------------------------------------------------------------- training


def test_each_run_reads_true_features_as_far_as_a_chain_has_them():
    """The mask of run 2 at slot 4: true features of slots 0..2, then slot 3 of run 1 and slot 4 of run 2."""
    bias = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    seen = (run_mask(bias, 2)[0, 0] == 0).unflatten(1, (3, 5))
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[0, :3] = expected[1, 3] = expected[2, 4] = True
    assert torch.equal(seen[4], expected)
    assert torch.equal(run_mask(bias, 0), bias)


def test_the_guided_loss_uses_the_guidance_formula_of_decoding(double):
    """u + s (c - u), on the very logits that decoding sees."""
    tokens, _, _, _ = decoded(double)
    task = DrafterTask(double, DrafterLoss(depth=1))
    embeds, features, _ = task.teach(PROMPTS, tokens)
    first = embeds.shape[1] - TOKENS
    logits = double.transformer.lm.lm_head(features[:, first:]).unflatten(0, (2, -1))
    law = task.laws(logits, torch.arange(TOKENS).expand(len(PROMPTS), -1))
    torch.testing.assert_close(task._law(features[:, first:]), law.log_probs.float(), rtol=0, atol=1e-5)


def test_acceptance_is_that_of_speculative_sampling(double):
    """1 - TV(p, q), by hand; unguided laws are those of each stream."""
    tokens, _, _, _ = decoded(double)
    lesson = DrafterTask(double, DrafterLoss(depth=1)).teach(PROMPTS, tokens)
    head, first = double.transformer.lm.lm_head, lesson[0].shape[1] - TOKENS
    task = DrafterTask(double, DrafterLoss(depth=1, guided=False))
    _, accepted = task(double.drafter, *lesson)
    guessed = next(task.runs(double.drafter, *lesson))
    p, q = (torch.softmax(head(h[:, first:]).float(), -1) for h in (lesson[1], guessed))
    torch.testing.assert_close(accepted[0], 1 - (p - q).abs().sum(-1).mean() / 2, rtol=0, atol=1e-5)


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "training_captions", lambda: PROMPTS)
    monkeypatch.setattr(training, "held_out_captions", lambda: PROMPTS[:2])
    monkeypatch.setattr(training, "HELD_OUT_PICTURES", 4)


def test_training_draws_pictures_learns_and_resumes(tmp_path, captions, capsys):
    pipe = hushed(text_pipeline())
    options = {"pictures": 40, "batch": 4, "loss": DrafterLoss(depth=2), "save_minutes": 0.02}
    training.train_drafter(pipe, tmp_path, minutes=0.1, **options)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    drafter = training.train_drafter(pipe, tmp_path, minutes=0.25, **options)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] > state["step"] > 0
    assert capsys.readouterr().out.count("of 40 pictures drawn") == 2  # once: they are kept
    held_out = [json.loads(line)["held_out"] for line in (tmp_path / "log.jsonl").open() if "held_out" in line]
    assert held_out[-1][0] > held_out[0][0]
    training.ship_drafter(drafter, tmp_path / "drafter")
    size = (tmp_path / "drafter/diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 2.1 * drafter.num_parameters() and isinstance(
        EagleDrafter.from_pretrained(tmp_path / "drafter"), EagleDrafter
    )
    plain = codes(pipe, PROMPTS, decoder="ar")
    assert torch.equal(codes(drafting(pipe, drafter), PROMPTS, decoder="eagle"), plain)


def test_a_drafter_is_added_to_a_pipeline_folder(tmp_path):
    pipe = text_pipeline()
    pipe.save_pretrained(tmp_path)
    training.add_drafter(eagle(pipe), tmp_path)
    assert isinstance(arsd.AutoARPipeline.from_pretrained(tmp_path).drafter, EagleDrafter)
    with pytest.raises(DataError, match=r"model_index\.json"):
        training.add_drafter(eagle(pipe), tmp_path / "elsewhere")


def test_mistakes_in_training_are_one_clear_error(tmp_path, captions):
    pipe = hushed(text_pipeline())
    for options, says in (({"minutes": 0}, "minutes"), ({"pictures": 0}, "pictures"), ({"batch": 0}, "batch")):
        with pytest.raises(DataError) as error:
            training.train_drafter(pipe, tmp_path, **{"minutes": 0.01, "pictures": 4, **options})
        one_clear_line(error.value, says)
    for weights in ({"depth": 0}, {"feature": -1.0}, {"feature": 0.0, "cross_entropy": 0.0, "acceptance": 0.0}):
        with pytest.raises(DataError):
            DrafterLoss(**weights)
    (tmp_path / "samples.pt").write_bytes(b"no archive")
    with pytest.raises(DataError) as error:
        training.train_drafter(pipe, tmp_path, minutes=0.01, pictures=4)
    one_clear_line(error.value, "samples.pt")
