"""Training a drafter: what it reads, what it is held to, runs that resume, mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from drafting import PROMPTS, decoded, drafting, eagle
from tiny_pipeline import TOKENS, codes, hushed, one_clear_line, text_pipeline

import arsd
from arsd import EagleDrafter
from arsd.errors import DataError
from arsd.training import drafter as training
from arsd.training.drafter import DrafterLoss, DrafterTask, run_mask


@pytest.fixture(scope="module")
def double() -> arsd.LlamaGenPipeline:
    return drafting(text_pipeline().to(torch.float64))


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
    monkeypatch.setattr(training, "GENERATION_CHUNK", 32)


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


def test_every_caption_has_its_turn_before_any_comes_again(tmp_path, captions):
    """And a run that was stopped between two saves draws what one in a single go draws."""
    pipe = hushed(text_pipeline())
    names, tokens = training.draw_pictures(pipe, PROMPTS, 70, tmp_path / "whole.pt", seed=3)
    laps = [names[i : i + len(PROMPTS)] for i in range(0, 70, len(PROMPTS))]
    assert all(sorted(lap) == sorted(PROMPTS) for lap in laps[:-1]) and len({tuple(lap) for lap in laps[:-1]}) > 1
    training.draw_pictures(pipe, PROMPTS, 32, tmp_path / "parts.pt", seed=3)
    again, other = training.draw_pictures(pipe, PROMPTS, 70, tmp_path / "parts.pt", seed=3)
    assert again == names and torch.equal(other, tokens)
    assert pipe.dtype == torch.float32, "only a copy is drawn with in another dtype"


def test_a_drafter_is_added_to_a_pipeline_folder(tmp_path):
    pipe = text_pipeline()
    pipe.save_pretrained(tmp_path)
    training.add_drafter(eagle(pipe), tmp_path)
    assert isinstance(arsd.AutoARPipeline.from_pretrained(tmp_path).drafter, EagleDrafter)
    with pytest.raises(DataError, match=r"model_index\.json"):
        training.add_drafter(eagle(pipe), tmp_path / "elsewhere")


def test_a_run_folder_belongs_to_one_model_and_one_loss(tmp_path, captions):
    options = {"minutes": 0.02, "pictures": 4, "batch": 2}
    pipe = hushed(text_pipeline())
    training.train_drafter(pipe, tmp_path, **options)
    other = hushed(text_pipeline())
    with torch.no_grad():
        other.transformer.lm.lm_head.weight[0, 0] += 1
    for model, changed, says in (
        (other, {}, "transformer"),
        (pipe, {"loss": DrafterLoss(depth=2)}, "loss"),
        (pipe, {"captions": [*PROMPTS, "pear"]}, "captions"),
        (pipe, {"batch": 3}, "batch"),
    ):
        with pytest.raises(DataError) as error:
            training.train_drafter(model, tmp_path, **{**options, **changed})
        one_clear_line(error.value, f"another {says}")
    (tmp_path / "run.json").unlink()
    with pytest.raises(DataError, match=r"samples\.pt, checkpoint\.pt of an unknown run"):
        training.train_drafter(pipe, tmp_path, **options)
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(DataError, match="damaged"):
        training.train_drafter(pipe, tmp_path, **options)


def test_captions_of_ones_own_are_split(tmp_path):
    words = [f"pear {i}" for i in range(45)]
    trained, held = training.split_captions(words)
    assert held == ["pear 0", "pear 20", "pear 40"] and sorted(trained + held) == sorted(words)
    training.train_drafter(hushed(text_pipeline()), tmp_path, minutes=0.01, pictures=4, batch=2, captions=["red", "blue"])
    assert set(torch.load(tmp_path / "samples.pt", weights_only=True)["captions"]) == {"blue"}
    with pytest.raises(DataError, match="too few"):
        training.split_captions(["pear"])


def test_a_drafter_goes_into_a_folder_of_its_own_model_only(tmp_path):
    pipe = text_pipeline()
    pipe.save_pretrained(tmp_path / "own")
    own = arsd.AutoARPipeline.from_pretrained(tmp_path / "own")
    training.check_folder(tmp_path / "own", own)
    with torch.no_grad():
        pipe.transformer.lm.lm_head.weight[0, 0] += 1
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="another model"):
        training.check_folder(tmp_path / "other", own)


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
        training.draw_pictures(pipe, PROMPTS, 4, tmp_path / "samples.pt", seed=0)
    one_clear_line(error.value, "cannot go on with")
