"""Training the scorer: what it reads, runs that resume, the folder it leaves, and the one that ships."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, BertConfig, BertModel, CLIPModel

from arsd.errors import DataError
from arsd.training import scorer as training
from arsd.training import scorer_data
from arsd.training.data import EmojiData
from arsd.training.scorer import Batches, ScorerSize, features
from arsd.training.scorer_data import Material, blurred, build_tokenizer, moved_patches, word_vectors

SHIPPED = Path(__file__).parent.parent / "arsd" / "checkpoints" / "emoji-clip"
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("square", "disc", "bar")
TINY = ScorerSize(width=32, layers=1, text_width=32, text_layers=1, projection=16, patch=16)
OPTIONS = {"batch": 6, "damaged": 3, "size": TINY, "save_minutes": 60.0}


def drawn(colour: str, shape: str) -> np.ndarray:
    """A picture [128, 128, 3] of one shape on white."""
    picture = np.full((128, 128, 3), 255, dtype=np.uint8)
    y, x = np.mgrid[:128, :128] - 64
    inside = {"square": (abs(x) < 40) & (abs(y) < 40), "disc": x**2 + y**2 < 2000, "bar": abs(y) < 12}[shape]
    picture[inside] = COLOURS[colour]
    return picture


def world() -> tuple[EmojiData, Material]:
    """Twelve pictures, of which yellow ones are held out, and what is known beside them."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    names = [f"{colour} {shape}" for colour, shape in pairs]
    held_out = np.array([colour == "yellow" for colour, _ in pairs])
    data = EmojiData(np.stack([drawn(*pair) for pair in pairs]), [[n, f"a {n}"] for n in names], names, held_out)
    known = [name for name, out in zip(names, held_out, strict=True) if not out]
    words = [*COLOURS, *SHAPES, "a", "flat", "thing"]
    source = torch.Generator().manual_seed(0)
    vectors = word_vectors(torch.randn(len(words), 48, generator=source), TINY.text_width)
    meanings = F.normalize(torch.randn(len(known), 8, generator=source), dim=-1)
    drawings = torch.from_numpy(drawn("red", "disc"))[None]
    return data, Material(
        words, vectors, {name: ["flat", "thing"] for name in names}, known, meanings, drawings, ["red disc"]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a second or so."""
    out = tmp_path_factory.mktemp("scorer")
    torch.set_num_threads(1)
    training.train_scorer(*world(), out, minutes=0.02, **OPTIONS)
    return out


def test_a_stopped_run_goes_on_where_it_stopped(trained):
    """The step, the moments and the average come back; a spent budget changes nothing; a larger one adds steps."""
    before = torch.load(trained / "checkpoint.pt", weights_only=True)
    model = training.train_scorer(*world(), trained, minutes=0.01, **OPTIONS)
    after = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert after["step"] == before["step"] > 0
    assert all(torch.equal(value, before["model"][name]) for name, value in after["model"].items())
    assert all(torch.equal(value, before["average"]["values"][name]) for name, value in model.state_dict().items())
    training.train_scorer(*world(), trained, minutes=after["spent"] + 0.01, **OPTIONS)
    assert torch.load(trained / "checkpoint.pt", weights_only=True)["step"] > after["step"]


def of_steps(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Runs end at a step instead of a time, at a constant learning rate."""
    monkeypatch.setattr(training.Run, "begin_step", lambda run: run.step < count)
    monkeypatch.setattr(training.Run, "due", lambda run, minutes: run.step == count)


def test_a_stop_in_the_middle_shows_nowhere(tmp_path, monkeypatch):
    """Batches depend on seed and step alone."""
    weights = []
    for name, stop in (("whole", 4), ("parts", 2), ("parts", 4)):
        of_steps(monkeypatch, stop)
        weights.append(training.train_scorer(*world(), tmp_path / name, minutes=1, **OPTIONS).state_dict())
    assert all(torch.equal(value, weights[2][key]) for key, value in weights[0].items())
    assert not all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_run_learns_and_logs_its_recall(tmp_path, monkeypatch):
    """The loss of steps 41 to 60 is below that of the first 20."""
    of_steps(monkeypatch, 60)
    training.train_scorer(*world(), tmp_path, minutes=1, **OPTIONS)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0], losses
    assert all(0 <= share <= 1 for row in rows if "held_out" in row for share in row["held_out"].values())


def loaded(folder: Path) -> tuple[CLIPModel, AutoTokenizer, AutoImageProcessor]:
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("folder", ["trained", "shipped"])
def test_the_folder_loads_as_any_clip(folder, trained):
    """Features are finite unit vectors, half precision is on disk, and there is no pipeline in it."""
    place = trained / "scorer" if folder == "trained" else SHIPPED
    model, tokenizer, processor = loaded(place)
    pixels = processor(images=[Image.fromarray(drawn("red", s)) for s in SHAPES], return_tensors="pt")["pixel_values"]
    words = tokenizer(["red disc", "green bar"], padding=True, truncation=True, return_tensors="pt")
    assert pixels.shape[1:] == (3, 64, 64) and tokenizer.model_max_length == model.config.text_config.max_position_embeddings
    with torch.no_grad():
        pictures, texts = features(model, pixels), features(model, **{k: words[k] for k in ("input_ids", "attention_mask")})
    for some in (pictures, texts):
        assert torch.isfinite(some).all() and some.shape[1] == model.config.projection_dim <= 256
        assert len(torch.unique(some, dim=0)) == len(some)
    assert not (place / "model_index.json").exists()
    assert json.loads((place / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("folder", ["trained", "shipped"])
def test_padding_changes_no_text_feature(folder, trained):
    """Pooling reads the end token, wherever it is, with the attention mask and without; so does a cut text."""
    model, tokenizer, _ = loaded(trained / "scorer" if folder == "trained" else SHIPPED)
    alone = tokenizer(["red disc"], return_tensors="pt")["input_ids"]
    padded = tokenizer(["red disc", "a flat red thing"], padding="max_length", return_tensors="pt")
    assert alone[0, -1] == model.config.text_config.eos_token_id != 2
    cut = tokenizer([" ".join(["red"] * 90)], truncation=True, return_tensors="pt")["input_ids"]
    assert cut.shape[1] == tokenizer.model_max_length and cut[0, -1] == alone[0, -1]
    with torch.no_grad():
        first = features(model, input_ids=alone)[0]
        for extra in ({}, {"attention_mask": padded["attention_mask"]}):
            same = features(model, input_ids=padded["input_ids"], **extra)[0]
            torch.testing.assert_close(first, same, rtol=0, atol=1e-5)


def test_an_unknown_word_is_unknown(trained):
    """It gets the id of <unk>, whose vector is zero; case, accents and hyphens do not matter."""
    model, tokenizer, _ = loaded(SHIPPED)
    ids = tokenizer(["Red-Äpple xqzzy", "red apple xqzzy"])["input_ids"]
    assert ids[0] == ids[1] and ids[0][3] == tokenizer.unk_token_id and tokenizer.unk_token_id not in ids[0][:3]
    assert not model.text_model.get_input_embeddings().weight[tokenizer.unk_token_id].any()


def test_the_shipped_scorer_is_small_and_sees_damage():
    """At most 5 MB; a heart is redder than it is blue, and a shuffled or blurred picture scores lower."""
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 5_000_000
    model, tokenizer, processor = loaded(SHIPPED)
    clean = drawn("red", "square")
    source = np.random.default_rng(0)
    versions = [clean, blurred(clean, 8), moved_patches(clean, 1, source), drawn("blue", "square")]
    words = tokenizer(["red square", "blue square"], padding=True, return_tensors="pt")
    with torch.no_grad():
        pictures = features(
            model, processor(images=[Image.fromarray(v) for v in versions], return_tensors="pt")["pixel_values"]
        )
        scores = features(model, input_ids=words["input_ids"], attention_mask=words["attention_mask"]) @ pictures.T
    red, blue = scores
    assert red[0] > red[1] and red[0] > red[2] and red[0] > red[3]
    assert blue[3] > blue[0] and blue[3] > red[3] and red[0] > blue[0]


def test_moved_patches_keep_the_picture_or_take_anothers():
    """A permutation keeps the pixels, a share of 0 the picture; a full share of another picture is that picture."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    source = np.random.default_rng(1)
    moved = moved_patches(noise[0], 1, source)
    assert not np.array_equal(moved, noise[0]) and np.array_equal(np.sort(moved, None), np.sort(noise[0], None))
    assert np.array_equal(moved_patches(noise[0], 0, source), noise[0])
    assert np.array_equal(moved_patches(noise[0], 1, source, noise[1]), noise[1])
    half = moved_patches(noise[0], 0.5, source, noise[1]).reshape(8, 16, 8, 16, 3).swapaxes(1, 2)
    same = (half == noise[0].reshape(8, 16, 8, 16, 3).swapaxes(1, 2)).all((2, 3, 4))
    assert same.sum() == 32


def test_texts_that_fit_another_picture_are_no_negatives():
    """The same name fits, a keyword fits all tones of a concept, a full name fits its own tone only."""
    data, material = world()
    known = data.subset(False)
    known.captions[:2] = [["hand light skin tone"], ["hand dark skin tone"]]
    known.concepts[:2] = ["hand", "hand"]
    material.names[:2] = ["hand light skin tone", "hand dark skin tone"]
    material.drawn[0] = "green disc"
    batches = Batches(known, material, build_tokenizer(material.words), 3, 0, 0)
    texts = ["hand light skin tone", "wave", "red bar"]
    assert batches.fitting([0, 1, 2], texts, [True, False, True]).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]


def test_targets_are_soft_and_skip_what_fits():
    """Row by row: other columns that fit take part in nothing, a damaged copy is a negative and no target."""
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=source, dtype=torch.float64)
    meanings = F.normalize(torch.randn(3, 4, generator=source, dtype=torch.float64), dim=-1)
    fits = torch.eye(3, dtype=torch.bool)
    fits[0, 2] = True
    expected = []
    for row in range(3):
        kept = [column for column in range(3) if column == row or not fits[row, column]]
        law = logits[row, [*kept, 3, 4]].softmax(0)
        likeness = (meanings[row] @ meanings[kept].T / training.SOFT_TEMPERATURE).softmax(0)
        own = torch.tensor([float(column == row) for column in kept])
        target = training.SOFT_SHARE * likeness + (1 - training.SOFT_SHARE) * own
        expected.append(-(target * law[: len(kept)].log()).sum())
    torch.testing.assert_close(training.soft_cross_entropy(logits, fits, meanings), torch.stack(expected).mean())


def archive(path: Path, files: dict[str, bytes]) -> Path:
    """An npm archive."""
    with tarfile.open(path, "w:gz") as made:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return path


def sentence_encoder(folder: Path) -> Path:
    """A BERT of random weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "fruit", "green", "the"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    from transformers import BertTokenizer

    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_material_is_made_of_three_packages_and_kept(tmp_path):
    """Held-out concepts give words and no picture; a second call reads the file."""
    png = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(png, "PNG")
    sources = {
        "words": sentence_encoder(tmp_path / "words"),
        "keywords": archive(
            tmp_path / "k.tgz", {"package/dist/emoji-en-US.json": json.dumps({"🍎": ["red_apple", "fruit"]}).encode()}
        ),
        "drawings": archive(
            tmp_path / "d.tgz", {f"package/img/google/64/{code}.png": png.getvalue() for code in ("1f34e", "1f34f", "zz")}
        ),
    }
    pictures = np.stack([drawn("red", "disc"), drawn("green", "disc")])
    held = np.array([False, True])
    data = EmojiData(pictures, [["red apple"], ["green apple"]], ["red apple", "green apple"], held)
    made = scorer_data.prepare_material(data, tmp_path / "material.pt", 16, **sources)
    assert made.drawn == ["red apple"] and made.drawings.shape == (1, 128, 128, 3) and made.names == ["red apple"]
    assert {"green", "fruit", "the"} <= set(made.words) and made.vectors.shape == (4 + len(made.words), 16)
    assert made.keywords == {"red apple": ["fruit"]}
    again = scorer_data.prepare_material(data, tmp_path / "material.pt", 16)
    assert again.words == made.words and torch.equal(again.vectors, made.vectors)
    (tmp_path / "material.pt").write_bytes(b"x")
    with pytest.raises(DataError, match="delete it"):
        scorer_data.prepare_material(data, tmp_path / "material.pt", 16)


def test_mistakes_get_one_clear_line(tmp_path, trained, monkeypatch):
    """A source that is not there or another thing, sizes without sense, another run's folder, no npm."""
    bad = tmp_path / "bad.tgz"
    bad.write_bytes(b"no archive")
    data, material = world()
    mistakes = {
        "does not exist": lambda: scorer_data.fetched("p@1", tmp_path / "none", str(tmp_path), "--keywords"),
        "not the npm archive": lambda: scorer_data.read_keywords(bad),
        "emoji-datasource": lambda: scorer_data.read_drawings(bad, set()),
        "is no wheel": lambda: scorer_data.SentenceEncoder.from_source(bad, str(tmp_path)),
        "no sentence encoder": lambda: scorer_data.SentenceEncoder(tmp_path),
        "must be positive": lambda: training.train_scorer(data, material, tmp_path / "run", minutes=0),
        "as many training pictures": lambda: training.train_scorer(data, material, tmp_path / "run"),
        "another batch": lambda: training.train_scorer(data, material, trained, minutes=0.01, **{**OPTIONS, "batch": 5}),
    }
    monkeypatch.setenv("PATH", str(tmp_path))
    mistakes["give --keywords a copy"] = lambda: scorer_data.fetched("p@1", None, str(tmp_path), "--keywords")
    for says, mistake in mistakes.items():
        with pytest.raises(DataError, match=says) as error:
            mistake()
        assert "\n" not in str(error.value)
