"""Reference pictures and what is made of them: archives, statistics, nearest pictures, hashes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import Colours
from tiny_pipeline import one_clear_line

from arsd.errors import DataError, InputError
from arsd.metrics.images import Pictures, Resizer
from arsd.metrics.judge import Judge, Seen, neighbours, read_reference, source_hash
from arsd.metrics.reference import Reference, find_reference, write_reference


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)


def archive(path, pictures):
    names = [f"thing {i // 2}" for i in range(len(pictures))]
    write_reference(path, pictures, [f"{name}, {i}" for i, name in enumerate(names)], names)
    return path


def test_archives_are_the_same_bytes_each_time(tmp_path, pictures):
    a, b = (archive(tmp_path / name, pictures).read_bytes() for name in ("a.zip", "b.zip"))
    assert a == b
    reference = Reference.open(tmp_path / "a.zip")
    assert len(reference.captions) == 12 == len(Pictures.open(tmp_path / "a.zip"))
    chosen = reference.draw_captions(6, seed=1)
    assert chosen == reference.draw_captions(6, seed=1) != reference.draw_captions(6, seed=2)
    assert len({caption.split(",")[0] for caption in chosen}) == 6
    with pytest.raises(DataError, match="has 6 concepts, not 7"):
        reference.draw_captions(7, 0)


def test_broken_archives_are_one_line(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    for path in (tmp_path / "a.zip", tmp_path / "nowhere.zip"):
        with pytest.raises(DataError) as caught:
            Reference.open(path)
        one_clear_line(caught.value, "no archive of reference pictures")


def test_what_ships_with_the_model_is_whole():
    training, unseen = find_reference("emoji-128"), find_reference("emoji-128", held_out=True)
    assert len(training.captions) == 3291 == len(Pictures.open(training.path))
    assert not set(training.concepts) & set(unseen.concepts)
    assert Pictures.open(unseen.path).size() == (128, 128)


def test_statistics_of_another_network_are_refused(tmp_path, pictures):
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(InputError, match="5 features, colours has 6"):
        read_reference(tmp_path / "s.npz", Colours(), Resizer())
    np.savez(tmp_path / "p.npz", pictures)
    features, about = read_reference(tmp_path / "p.npz", Colours(), Resizer.parse("box-4"))
    assert features.shape == (12, 6) and about["resizer"] == "box-4" and about["format"] == "npz"


def test_sources_have_hashes_that_follow_their_content(tmp_path, pictures):
    for i, picture in enumerate(pictures[:3]):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    before = source_hash(tmp_path)
    assert before == source_hash(tmp_path)
    (tmp_path / "2.png").unlink()
    assert source_hash(tmp_path) != before
    np.savez(tmp_path / "a.npz", pictures)
    first = source_hash(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", pictures[::-1])
    assert source_hash(tmp_path / "a.npz") != first


def test_copies_are_told_from_new_pictures():
    rng = torch.Generator().manual_seed(0)
    training, unseen = torch.randn(400, 8, generator=rng), torch.randn(60, 8, generator=rng)
    copies = training[:50] + 0.01 * torch.randn(50, 8, generator=rng)
    fresh = torch.randn(50, 8, generator=rng)
    assert neighbours(copies, training, unseen)["nearer than 95 % of unseen ones"] == 1.0
    assert neighbours(fresh, training, unseen)["nearer than 95 % of unseen ones"] < 0.2


def test_figures_leave_out_what_they_cannot_have(pictures):
    seen = Seen(torch.rand(12, 6))
    assert Judge(Colours()).figures(seen) == {}
    row = Judge(Colours(), reference=torch.rand(9, 6)).figures(seen)
    assert "FID (colours)" in row and not any("CLIP" in name or "IS" in name for name in row)
    logits = Judge(Colours()).figures(Seen(torch.rand(12, 6), logits=torch.randn(40, 3)))
    assert set(logits) == {"IS (colours)", "IS (colours) spread"}


def test_the_smaller_set_decides_whether_fid_is_biased():
    judge = Judge(Colours(), reference=torch.rand(5, 6))
    assert judge.figures(Seen(torch.rand(50, 6)))["FID biased"]
    assert not Judge(Colours(), reference=torch.rand(7, 6)).figures(Seen(torch.rand(50, 6)))["FID biased"]


def test_what_was_seen_is_kept_whole(tmp_path):
    seen = Seen(torch.rand(3, 6), torch.rand(3))
    seen.save(tmp_path / "a.npz")
    again = Seen.load(tmp_path / "a.npz")
    assert torch.equal(again.features, seen.features) and torch.equal(again.scores, seen.scores) and again.logits is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_another_prefix_is_another_judge():
    keys = {Judge(Colours(), Colours(), prefix=prefix).key for prefix in ("", "A photo of ")}
    keys |= {Judge(Colours()).key, Judge(Colours(), resizer=Resizer.parse("box-4")).key}
    assert len(keys) == 4
