"""Training: a clean split, captions and tokenizer, corrupted inputs, optimiser and codebook, runs that resume."""

from __future__ import annotations

import json
import re
import tarfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from arsd import LlamaGenPipeline, VQTokenizer
from arsd.cli import main
from arsd.errors import DataError
from arsd.models.captions import left_align, tokenize_captions, unknown_words
from arsd.training import common, data, target, vq
from arsd.training.common import Average, Clock, Muon, learning_rate_factor, load_checkpoint, orthogonalise, save_atomically
from arsd.training.data import MAX_HASH_DISTANCE, EmojiData, base_concept, build_emoji_data, caption_of
from arsd.training.target import build_tokenizer, train_target
from arsd.training.vq import EMOJI_VQ, Codebook, shifted, to_tensor, train_vq


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Pictures [count, 128, 128, 3] of 8 x 8 random tiles, whose perceptual hashes have nothing to do with one another."""
    tiles = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return tiles.repeat(16, 1).repeat(16, 2)


# ---------------------------------------------------------------- captions and split


def test_captions_are_the_unicode_names_in_words():
    assert caption_of(":woman_firefighter_medium-light_skin_tone:") == "woman firefighter medium-light skin tone"
    assert caption_of(":man’s_shoe:") == "man's shoe" and caption_of(":red_apple:") == "red apple"


@pytest.mark.parametrize(
    "captions",
    [
        ("woman firefighter medium-light skin tone", "man firefighter", "firefighter dark skin tone", "firefighter"),
        ("waving hand", "waving hand light skin tone", "waving hand medium-dark skin tone"),
        ("person", "woman", "man dark skin tone", "child medium skin tone", "girl"),
        ("Man Running", "woman running", "person running"),
    ],
)
def test_skin_tones_and_genders_are_one_concept(captions):
    assert len({base_concept(caption) for caption in captions}) == 1


def test_different_things_are_different_concepts():
    names = ["red apple", "green apple", "firefighter", "pilot", "waving hand", "raised hand", "person"]
    assert len({base_concept(name) for name in names}) == len(names)


def test_no_emoji_has_skin_tones_or_genders_on_both_sides():
    """Over every emoji of the Unicode list, told by code points: tone modifiers, gender signs, man/woman."""
    pytest.importorskip("emoji")
    captions = {code: names[0] for code, names in data._captions_by_code().items()}
    names = sorted({base_concept(caption) for caption in captions.values()})
    side = dict(zip(names, data._split(pictures(len(names)), names), strict=True))
    groups = defaultdict(set)
    for code, caption in captions.items():
        plain = re.sub(r"-200d-264[02]|-1f3f[b-f]", "", code)
        groups[re.sub("1f46[89]", "1f9d1", plain)].add(bool(side[base_concept(caption)]))
    assert len(groups) > 1000 and 0.02 < np.mean(list(side.values())) < 0.08
    assert [code for code, sides in groups.items() if len(sides) > 1] == []


def test_the_split_never_puts_one_concept_on_both_sides():
    concepts = [f"thing {i // 3}" for i in range(600)]
    held_out = data._split(pictures(600), concepts)
    assert not {c for c, out in zip(concepts, held_out, strict=True) if out} & {
        c for c, out in zip(concepts, held_out, strict=True) if not out
    }
    assert 3 <= held_out.sum() <= 60
    order = np.random.default_rng(1).permutation(600)
    again = data._split(pictures(600)[order], [concepts[i] for i in order])
    assert (again == held_out[order]).all()


def test_held_out_pictures_with_a_twin_in_training_move_there_with_their_whole_concept():
    concepts, images = [f"thing {i // 2}" for i in range(600)], pictures(600)
    before = data._split(images, concepts)
    out, kept = np.flatnonzero(before)[0], np.flatnonzero(~before)[0]
    images[kept] = images[out]
    images[kept, :3, :3] ^= 1  # a look-alike, not a copy
    after = data._split(images, concepts)
    moved = {concepts[i] for i in np.flatnonzero(before & ~after)}
    assert moved == {concepts[out]} and not (after & ~before).any()
    hashes = [data._difference_hash(image) for image in images]
    far = [(hashes[i] ^ hashes[j]).bit_count() for i in np.flatnonzero(after) for j in np.flatnonzero(~after)]
    assert min(far) > MAX_HASH_DISTANCE


def test_weights_let_a_concept_with_n_pictures_count_like_the_root_of_n():
    some = EmojiData(pictures(5), [["x"]] * 5, ["a", "a", "a", "a", "b"], np.zeros(5, dtype=bool))
    np.testing.assert_allclose(some.weights, [0.5, 0.5, 0.5, 0.5, 1.0])


def test_a_saved_data_set_comes_back(tmp_path):
    made = EmojiData(pictures(4), [["ä"], ["b", "c"], ["d"], ["e"]], list("abcd"), np.array([False, True, False, True]))
    made.save(tmp_path / "data")
    back = EmojiData.load(tmp_path / "data")
    assert (back.images == made.images).all() and (back.captions, back.concepts) == (made.captions, made.concepts)
    test = back.subset(True)
    assert (test.images == made.images[[1, 3]]).all() and test.captions == [["b", "c"], ["e"]] and test.held_out.all()
    with pytest.raises(DataError, match="arsd train data"):
        EmojiData.load(tmp_path / "none")


def test_an_archive_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="is not a file: give the .tgz"):
        build_emoji_data(tmp_path / "none.tgz")


def test_an_archive_becomes_pictures_on_white_with_their_names(tmp_path):
    pytest.importorskip("emoji")
    for code, colour in (("1f34e", (255, 0, 0, 255)), ("1f44b-1f3fd", (0, 0, 255, 0)), ("no-emoji", (0, 255, 0, 255))):
        Image.new("RGBA", (16, 16), colour).save(tmp_path / f"{code}.webp", lossless=True)
    with tarfile.open(tmp_path / "pack.tgz", "w:gz") as archive:
        for path in sorted(tmp_path.glob("*.webp")):
            archive.add(path, f"package/assets/{path.name}")
    made = build_emoji_data(tmp_path / "pack.tgz")
    assert made.images.shape == (2, 128, 128, 3) and made.concepts == ["red apple", "waving hand"]
    assert [names[0] for names in made.captions] == ["red apple", "waving hand medium skin tone"]
    assert made.images[0, 5, 5].tolist() == [255, 0, 0] and made.images[1, 5, 5].tolist() == [255, 255, 255]


# ---------------------------------------------------------------- words and tokens


def test_the_tokenizer_knows_its_words_and_nothing_else():
    tokenizer = build_tokenizer([["Red apple", "a man's hat"], ["café: 1st place"]], rows=0)
    words, mask = tokenize_captions(tokenizer, ["RED, Cafe!", "red banana apple"], 6, "cpu")
    named = [tokenizer.convert_ids_to_tokens(row) for row in words]
    assert named[0] == ["red", "cafe", "</s>", "<pad>", "<pad>", "<pad>"] and mask[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert named[1][:4] == ["red", "<unk>", "apple", "</s>"]
    assert unknown_words(tokenizer, "Red banana man's apple") == ["banana"]
    assert len(tokenizer) == 3 + len({"red", "apple", "a", "man's", "hat", "cafe", "1st", "place"})


def test_a_saved_tokenizer_reads_captions_alike(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer([["Red apple", "naïve dog"]], rows=2)
    tokenizer.save_pretrained(tmp_path)
    captions = ["Naive RED dog", "a cat", "apple" * 9, " ".join(["red"] * 40)]
    a, b = (tokenize_captions(t, captions, 8, "cpu") for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_left_align_moves_valid_features_to_the_end_in_order_and_clears_the_rest():
    features, lengths = torch.randn(5, 7, 3, generator=rng()), [0, 1, 4, 6, 7]
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    out, kept = left_align(features, mask)
    for b, n in enumerate(lengths):
        assert kept[b].tolist() == [0] * (7 - n) + [1] * n
        assert torch.equal(out[b, 7 - n :], features[b, :n]) and not out[b, : 7 - n].any()


# ---------------------------------------------------------------- parts of a run


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_orthogonalise_brings_singular_values_near_1_and_keeps_directions(shape):
    matrix = torch.randn(shape, generator=rng()) * 7
    out = orthogonalise(matrix)
    values = torch.linalg.svdvals(out)
    floor = 0.6 if shape[0] != shape[1] else 0.0  # a square Gaussian matrix is nearly singular
    assert out.shape == matrix.shape and floor < float(values.min()) and float(values.median()) > 0.6 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert F.cosine_similarity(out.flatten(), (u @ vh).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("shape", [(16, 24), (16, 3, 3, 3)])
def test_muon_minimises_and_leaves_parameters_without_gradient_alone(shape):
    weight, other = nn.Parameter(torch.randn(shape, generator=rng())), nn.Parameter(torch.ones(4, 4))
    goal = torch.randn(shape, generator=rng(1))
    optimizer = Muon([weight, other], lr=0.2, weight_decay=0.0)
    start = (weight.detach() - goal).square().mean()
    for _ in range(120):
        optimizer.zero_grad()
        (weight - goal).square().mean().backward()
        optimizer.step()
    assert (weight.detach() - goal).square().mean() < 0.1 * start and bool((other == 1).all())


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_its_floor():
    assert learning_rate_factor(0, 0.0) == pytest.approx(0.01) and learning_rate_factor(99, 0.0) == 1
    assert learning_rate_factor(1000, 1.0) == pytest.approx(0.01) and learning_rate_factor(1000, 0.5) == pytest.approx(0.505)
    curve = [learning_rate_factor(1000, share) for share in np.linspace(0, 1, 50)]
    assert curve == sorted(curve, reverse=True) and min(curve) > 0


def test_the_clock_counts_minutes_over_runs_and_stops_at_the_budget(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(minutes=2.0, spent=0.5, _mark=100.0)
    now[0] += 30
    assert clock.tick() == pytest.approx(0.5) and clock.spent == pytest.approx(1.0)
    assert clock.tick() == pytest.approx(0.5)
    now[0] += 600
    assert clock.tick() == 1.0 and clock.spent == pytest.approx(11.0)


def test_the_average_starts_warm_and_survives_a_checkpoint(tmp_path):
    module = nn.Linear(3, 3)
    average = Average(module, 0.998)
    with torch.no_grad():
        module.weight.add_(1)
    for _ in range(200):
        average.update()
    torch.testing.assert_close(average.values["weight"], module.weight.detach(), atol=1e-3, rtol=0)
    save_atomically({"average": average.state_dict()}, tmp_path / "a" / "checkpoint.pt")
    other = Average(nn.Linear(3, 3), 0.998)
    other.load_state_dict(torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["average"])
    assert other.updates == 200 and torch.equal(other.values["weight"], average.values["weight"])


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_atomically({"step": 1}, path)

    def half(state, target):
        Path(target).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(common.torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_atomically({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_one_clear_line(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_atomically({"model": nn.Linear(3, 3).state_dict(), "step": 7}, path)
    model = nn.Linear(3, 3)
    assert load_checkpoint(path, model)["step"] == 7
    assert torch.equal(model.weight, torch.load(path, weights_only=True)["model"]["weight"])
    whole = path.read_bytes()
    for data_of_file, reader in ((whole, nn.Linear(3, 4)), (whole[:300], model), (b"", model)):
        path.write_bytes(data_of_file)
        with pytest.raises(DataError, match=r"cannot resume .*checkpoint.pt .*use a new --out") as error:
            load_checkpoint(path, reader)
        assert "\n" not in str(error.value)


def test_a_tokenizer_with_pixel_patches_folds_them_and_unfolds_them_again():
    folded = VQTokenizer(**EMOJI_VQ).eval()
    image = to_tensor(pictures(1))
    ids = folded.encode(image)
    assert folded.downsample_factor == 8 and ids.shape == (1, 16, 16) and folded.decode(ids).shape == image.shape
    assert folded.decode(ids[:, :2, :3]).shape == (1, 3, 16, 24)


def test_dead_codes_restart_at_latents_of_the_batch_and_used_ones_follow_theirs():
    book = Codebook(VQTokenizer(**{**EMOJI_VQ, "codebook_size": 16}))
    z = F.normalize(torch.randn(64, 8, generator=rng()), dim=-1)
    book.start(z)
    torch.testing.assert_close(book.weight.norm(dim=-1), torch.ones(16))
    alive = z[:4]
    for _ in range(300):  # only codes 0..3 are ever used, each by one latent
        book.update(alive.repeat(4, 1), torch.arange(4).repeat(4))
    torch.testing.assert_close(book.weight[:4], alive, atol=1e-3, rtol=0)
    nearest = (book.weight @ alive.T).amax(-1)
    torch.testing.assert_close(nearest, torch.ones(16), atol=1e-3, rtol=0)  # the others sit on latents that were seen
    assert not book.weight.requires_grad or book.weight.grad is None


def test_shifts_move_the_picture_over_white_and_mirror_it():
    image = torch.rand(1, 3, 8, 8, generator=rng()) * 2 - 1
    assert torch.equal(shifted(image, 0, 0, False), image) and torch.equal(shifted(image, 0, 0, True), image.flip(-1))
    moved = shifted(image, 2, 0, False)
    assert torch.equal(moved[..., :6], image[..., 2:]) and bool((moved[..., 6:] == 1).all())
    assert to_tensor(np.array([[[[0, 255, 0]]]], dtype=np.uint8)).flatten().tolist() == [-1, 1, -1]


# ---------------------------------------------------------------- whole runs, on 40 pictures


@pytest.fixture
def small_data(tmp_path, monkeypatch) -> Path:
    """A data set of 40 pictures (30 to train on); no compilation, which would take longer than the run."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    words = ["red", "green", "blue", "apple", "dog", "pear", "heart", "face"]
    captions = [[f"{words[i % 3]} {words[3 + i % 5]}", words[3 + i % 5]] for i in range(40)]
    made = EmojiData(pictures(40), captions, [f"thing {i}" for i in range(40)], np.arange(40) >= 30)
    made.save(tmp_path / "data")
    return tmp_path / "data"


MISTAKES = {
    "no data set": (("vq", "--data", "none"), "no data set in none"),
    "no data set for the target": (("target", "--data", "none", "--vq", "vq"), "none"),
    "no tokenizer": (("target", "--data", "data", "--vq", "none"), "none"),
    "no archive": (("data", "--source", "none.tgz"), "none.tgz is not a file"),
    "an archive that is none": (("data", "--source", "data/captions.json"), "captions.json"),
    "no time": (("vq", "--data", "data", "--minutes", "0"), "minutes"),
    "time below 0": (("vq", "--data", "data", "--minutes", "-1"), "minutes"),
    "a width that does not divide": (("target", "--data", "data", "--vq", "vq", "--width", "100"), "width"),
    "no layers": (("target", "--data", "data", "--vq", "vq", "--layers", "0"), "layers"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_train_is_one_line_and_status_2(small_data, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    VQTokenizer(**{**EMOJI_VQ, "codebook_size": 64}).save_pretrained("vq")
    monkeypatch.setattr(target, "encode_pictures", lambda *args: pytest.fail("started to work"))
    monkeypatch.setattr(vq, "Codebook", lambda *args: pytest.fail("started to work"))
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    words, says = MISTAKES[case]
    assert main(["train", *words, "--out", "out"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0] and not (tmp_path / "out").exists()


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_tokenizer_training_resumes_where_it_stopped(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(vq, "WARMUP_STEPS", 2)
    out = tmp_path / "vq"
    train_vq(small_data, out, minutes=0.15, batch=2)
    first = torch.load(out / "checkpoint.pt", weights_only=True)
    assert first["step"] > 3 and not list(out.glob("*.part"))
    train_vq(small_data, out, minutes=0.25, batch=2)
    second = torch.load(out / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"] and second["spent"] > first["spent"] >= 0.15
    assert [line["step"] for line in log(out)] == sorted(line["step"] for line in log(out))
    done = train_vq(small_data, out, minutes=0.25, batch=2)  # the budget is spent: nothing is trained any more
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == second["step"]
    image = to_tensor(pictures(1))
    loaded = VQTokenizer.from_pretrained(out / "vq")
    assert torch.equal(loaded.encode(image), done.encode(image)) and loaded.encode(image).shape == (1, 16, 16)
    torch.testing.assert_close(loaded.net.quantize.embedding.weight.norm(dim=-1), torch.ones(1024))


@pytest.mark.slow
def test_target_training_resumes_and_writes_a_pipeline(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "SHEET_PROMPTS", ("red apple", "zebra"))
    VQTokenizer(**{**EMOJI_VQ, "codebook_size": 64}).save_pretrained(tmp_path / "vq")
    out, sizes = tmp_path / "target", {"batch": 4, "layers": 1, "width": 64, "caption_steps": 5}
    train_target(small_data, tmp_path / "vq", out, minutes=0.05, **sizes)
    first = torch.load(out / "checkpoint.pt", weights_only=True)
    train_target(small_data, tmp_path / "vq", out, minutes=0.1, **sizes)
    second = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 0 < first["step"] < second["step"] and second["spent"] > first["spent"]
    assert second["average"]["updates"] == second["step"] and len(second["optimizers"]) == 2
    losses = [line["held_out_loss"] for line in log(out) if "held_out_loss" in line]
    assert len(losses) == 2 and all(0 < loss < 6 for loss in losses)
    assert sum({"probe_right", "probe_null", "probe_other", "probe_strange"} <= set(line) for line in log(out)) == 2
    assert len(list((out / "sheets").glob("*.png"))) == 2 and Image.open(next((out / "sheets").glob("*.png"))).width > 128
    pipe = LlamaGenPipeline.from_pretrained(out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    result = pipe("green pear", generator=rng(), output_type="np")
    assert result.images.shape == (1, 128, 128, 3) and result.stats.tokens == [256]
    again = train_target(small_data, tmp_path / "vq", out, minutes=0.1, **sizes)  # the budget is spent
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("green pear", generator=rng(), output_type="np").tokens, result.tokens)
