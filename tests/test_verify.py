"""A picture that says what it was made of can be checked; a forged one is refuted; of others nothing is said."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tiny_pipeline import TOKENS, VOCAB, class_pipeline, hushed, saved, seeded, text_pipeline

from arsd import AutoARPipeline
from arsd.cli import main
from arsd.errors import InputError
from arsd.pipelines.outputs import to_output
from arsd.provenance import pack_tokens, read_png, save_png, tokens_sha256, unpack_tokens
from arsd.verification import ALLOWED, MARGINS

PROMPTS = ["red apple", "a pear", "dog face", "blue heart", "green pear"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"text": saved(text_pipeline(), root / "text"), "class": saved(class_pipeline(), root / "class")}


@pytest.fixture(scope="module")
def pipe(folders):
    return hushed(AutoARPipeline.from_pretrained(folders["text"]))


@pytest.fixture(scope="module")
def out(pipe):
    return pipe(PROMPTS, generator=seeded(3), decoder="sjd:window=6", batch_size=2, top_k=20)


def write(path, image, record):
    save_png(image, path, record, overwrite=True)
    return str(path)


def png(tmp_path, pipe, out, index, **changes):
    return write(tmp_path / f"{index}.png", out.images[index], {**pipe.record(out, index), **changes})


@pytest.mark.parametrize("decoder", ["ar", "ar:pass_tokens=4", "sjd:window=3", "sjd:window=3,pass_tokens=7", "sjd"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.9}])
def test_honest_pictures_are_verified_for_every_strategy_and_law(pipe, tmp_path, decoder, options):
    made = pipe(PROMPTS, generator=seeded(1), decoder=decoder, batch_size=3, **options)
    results = pipe.verify([png(tmp_path, pipe, made, i) for i in range(len(PROMPTS))])
    for result in results:
        assert (result.result, result.mismatches, result.near_ties) == ("verified", 0, 0), result
        assert result.same_arithmetic and result.pixels_match
        width = made.stats.pass_tokens
        prefill = 1 if width == 1 else -(-5 // width)  # six condition slots, the last one is fed with the first token
        assert result.forward_passes == -(-TOKENS // width) + prefill, "as many tokens per pass as the shape holds"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_verify_in_their_own(folders, tmp_path, dtype):
    pipe = hushed(AutoARPipeline.from_pretrained(folders["text"], dtype=dtype))
    made = pipe(PROMPTS[:2], generator=seeded(1), decoder="sjd:window=6")
    paths = [png(tmp_path, pipe, made, i) for i in range(2)]
    assert {r.result for r in pipe.verify(paths)} == {"verified"}
    other = hushed(AutoARPipeline.from_pretrained(folders["text"]))
    result = other.verify(paths[0])
    assert result.result == "unknown" and "load the model in that dtype" in result.reason


def test_class_pictures_verify_too(folders, tmp_path):
    pipe = hushed(AutoARPipeline.from_pretrained(folders["class"]))
    made = pipe(class_labels=[1, 4], generator=seeded(2), decoder="sjd:window=4", guidance_scale=3.0)
    good = [png(tmp_path, pipe, made, i) for i in range(2)]
    assert [r.result for r in pipe.verify(good)] == ["verified", "verified"]
    assert pipe.verify(png(tmp_path, pipe, made, 0, class_label=3)).result == "refuted"
    assert pipe.verify(png(tmp_path, pipe, made, 0, class_label=99)).result == "refuted"


def test_an_opened_image_is_as_good_as_its_path(pipe, out, tmp_path):
    with Image.open(png(tmp_path, pipe, out, 1)) as image:
        image.load()
        assert pipe.verify(image).result == "verified"
    assert pipe.verify(out.images[0]).result == "unknown", "a picture in memory has no record yet"


def forged_token(pipe, out, index, place, shift=1):
    """One token is another id, and everything that follows from the tokens is made to fit."""
    tokens = out.tokens[index].clone()
    tokens[place] = (tokens[place] + shift) % VOCAB
    image = to_output(pipe.decode_pixels(tokens[None]), "pil")[0]
    return image, {**pipe.record(out, index), "tokens": pack_tokens(tokens), "tokens_sha256": tokens_sha256(tokens)}


@pytest.mark.parametrize("place", range(TOKENS))
def test_one_flipped_token_is_refuted_wherever_it_stands(pipe, out, tmp_path, place):
    result = pipe.verify(write(tmp_path / "forged.png", *forged_token(pipe, out, place % 5, place, 1 + place)))
    assert result.result == "refuted" and result.mismatches >= 1 and result.pixels_match


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_seed": 12345},
        {"image_index": 7},
        {"prompt": "dog face"},
        {"sampling": {"guidance_scale": 3.0, "guidance_interval": -1, "temperature": 1.0, "top_k": 20, "top_p": 1.0}},
        {"sampling": {"guidance_scale": 2.0, "guidance_interval": -1, "temperature": 2.0, "top_k": 20, "top_p": 1.0}},
        {"tokens_sha256": "0" * 64},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_forged_record_is_refuted(pipe, out, tmp_path, changes):
    assert pipe.verify(png(tmp_path, pipe, out, 0, **changes)).result == "refuted"


def test_a_swapped_picture_and_one_wrong_pixel_are_refuted(pipe, out, tmp_path):
    record = pipe.record(out, 0)
    swapped = pipe.verify(write(tmp_path / "swapped.png", out.images[1], record))
    assert swapped.result == "refuted" and swapped.mismatches == 0 and not swapped.pixels_match
    touched = out.images[0].copy()
    value = touched.getpixel((3, 3))
    touched.putpixel((3, 3), ((value[0] + 1) % 256, *value[1:]))
    assert pipe.verify(write(tmp_path / "touched.png", touched, record)).result == "refuted"
    small = out.images[0].resize((4, 4))
    assert pipe.verify(write(tmp_path / "small.png", small, record)).result == "refuted"


@pytest.mark.parametrize("wrong", ["short", "large"])
def test_tokens_that_the_model_cannot_have_made_are_refuted(pipe, out, tmp_path, wrong):
    tokens = out.tokens[0, :-1] if wrong == "short" else out.tokens[0] + VOCAB
    changes = {"tokens": pack_tokens(tokens), "tokens_sha256": tokens_sha256(tokens)}
    assert pipe.verify(png(tmp_path, pipe, out, 0, **changes)).result == "refuted"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed_exact": False, "decoder": "sjd:coupling=maximal"}, "not seed-exact"),
        ({"model_hash": "f" * 64}, "another model"),
        ({"model_hash": None}, "another model"),
        ({"tokens": "nonsense"}, "cannot be read"),
        ({"sampling": {"guidance_scale": -1.0}}, "damaged"),
        ({"sampling": None}, "damaged"),
        ({"batch": 0}, "damaged"),
        ({"batch": "2"}, "damaged"),
        ({"pass_tokens": 10**9}, "damaged"),
        ({"dtype": "int8"}, "int8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_where_nothing_can_be_said_nothing_is_said(pipe, out, tmp_path, changes, says):
    result = pipe.verify(png(tmp_path, pipe, out, 0, **changes))
    assert result.result == "unknown" and says in result.reason and "\n" not in result.reason


def test_pictures_made_from_features_cannot_be_checked(pipe, tmp_path):
    embeds, mask = pipe.encode_prompt(PROMPTS[:1])
    made = pipe(prompt_embeds=embeds, prompt_attention_mask=mask, generator=seeded(0))
    result = pipe.verify(png(tmp_path, pipe, made, 0))
    assert result.result == "unknown" and "features" in result.reason


def test_a_pipeline_without_a_folder_has_no_hash_and_says_so(tmp_path):
    pipe = hushed(text_pipeline())
    made = pipe(PROMPTS[0], generator=seeded(0))
    assert pipe.model_hash is None and pipe.record(made, 0)["model_hash"] is None
    assert pipe.verify(png(tmp_path, pipe, made, 0)).result == "unknown"


def test_another_arithmetic_is_given_a_margin_and_no_more(pipe, out, tmp_path):
    """The probe in the record is another machine's: near-ties may change places, anything else may not."""
    foreign = pipe.verify(png(tmp_path, pipe, out, 0, probe="0" * 16))
    assert foreign.result == "verified" and foreign.same_arithmetic is False and "rounding" in foreign.reason
    image, record = forged_token(pipe, out, 0, TOKENS // 2)
    assert pipe.verify(write(tmp_path / "f.png", image, {**record, "probe": "0" * 16})).result == "refuted"
    assert MARGINS.keys() == ALLOWED.keys()


def test_near_ties_beyond_what_was_measured_refute(pipe, out, tmp_path, monkeypatch):
    monkeypatch.setitem(MARGINS, "float32", 1e9)  # every token counts as a near-tie
    tokens = (out.tokens[0] + 1) % VOCAB
    record = {
        **pipe.record(out, 0),
        "tokens": pack_tokens(tokens),
        "tokens_sha256": tokens_sha256(tokens),
        "probe": "0" * 16,
    }
    image = to_output(pipe.decode_pixels(tokens[None]), "pil")[0]
    result = pipe.verify(write(tmp_path / "many.png", image, record))
    assert result.result == "refuted" and result.near_ties > ALLOWED["float32"] and result.mismatches == 0


def test_an_accepted_token_at_the_border_of_top_k_may_be_dropped_by_another_rounding(pipe):
    """Scores within the margin of the k-th best are neither held against a token nor required of it."""
    from arsd.decoding import Law
    from arsd.decoding.replay import Replay

    replay = Replay(torch.tensor([[2]]), margin=0.1)
    raw = torch.tensor([[[5.0, 3.0, 2.95, 0.0]]])
    law = Law(raw.masked_fill(raw < 3.0, -torch.inf), raw)
    noise = torch.tensor([[[0.0, 0.0, 9.0, 0.0]]])
    assert float(replay._gaps(law, noise, torch.tensor([[2]]))[0, 0]) == 0
    assert float(replay._gaps(law, noise, torch.tensor([[3]]))[0, 0]) == float("inf")
    assert float(replay._gaps(law, noise, torch.tensor([[0]]))[0, 0]) == 0, "the id at the border does not count against it"
    strict = Replay(torch.tensor([[2]]))
    assert float(strict._gaps(law, noise, torch.tensor([[2]]))[0, 0]) == float("inf")


def test_the_probe_tells_arithmetics_apart_and_is_remembered(pipe, folders):
    again = hushed(AutoARPipeline.from_pretrained(folders["text"]))
    assert pipe.arithmetic_probe(2, 6, True) == again.arithmetic_probe(2, 6, True)
    double = hushed(AutoARPipeline.from_pretrained(folders["text"], dtype=torch.float64))
    probes = {pipe.arithmetic_probe(2, 6, True), pipe.arithmetic_probe(2, 6, False), double.arithmetic_probe(2, 6, True)}
    assert len(probes) == 3
    calls = []
    pipe.target_maker, kept = (lambda *a: calls.append(a)), pipe.target_maker
    try:
        pipe.arithmetic_probe(2, 6, True)
    finally:
        pipe.target_maker = kept
    assert not calls


def test_a_record_that_cannot_be_followed_does_not_speak_for_the_others(folders, tmp_path):
    pipe = hushed(AutoARPipeline.from_pretrained(folders["class"]))
    made = pipe(class_labels=[1, 4, 2], generator=seeded(2), decoder="sjd:window=4", guidance_scale=3.0)
    paths = [write(tmp_path / f"{i}.png", made.images[i], pipe.record(made, i)) for i in range(3)]
    without_label = {k: v for k, v in pipe.record(made, 1).items() if k != "class_label"}
    write(tmp_path / "1.png", made.images[1], {**without_label, "prompt": "red apple"})
    write(tmp_path / "2.png", made.images[2], {**pipe.record(made, 2), "class_label": 99})
    assert [r.result for r in pipe.verify(paths)] == ["verified", "refuted", "refuted"]


def test_exit_status_says_the_verdict(pipe, out, folders, tmp_path, capsys):
    good = png(tmp_path, pipe, out, 0)
    bad = write(tmp_path / "bad.png", *forged_token(pipe, out, 1, 3))
    strange = png(tmp_path, pipe, out, 2, model_hash="0" * 64)
    bare = tmp_path / "bare.png"
    out.images[0].save(bare)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    model = ["--model", str(folders["text"])]
    assert main(["verify", good, *model]) == 0
    assert main(["verify", good, bad, *model]) == 1
    assert main(["verify", good, strange, *model]) == 3
    assert main(["verify", str(bare), str(text), *model]) == 3
    assert main(["verify", bad, strange, *model]) == 1
    capsys.readouterr()
    assert main(["verify", strange, good, str(bare), bad, "--json", *model]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [row["result"] for row in report] == ["unknown", "verified", "unknown", "refuted"]
    assert [row["path"] for row in report] == [strange, good, str(bare), bad]
    assert {"path", "result", "mismatches", "near_ties", "pixels_match"} <= report[0].keys()
    assert main(["verify", str(tmp_path / "nowhere.png")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_generate_then_verify_on_the_command_line(folders, tmp_path, capsys):
    options = ["--model", str(folders["text"]), "--dtype", "float32"]
    assert main(["generate", "red apple", "dog face", "--n", "2", "--out", str(tmp_path), *options]) == 0
    files = [str(p) for p in sorted(tmp_path.glob("*.png"))]
    assert len(files) == 4 and main(["verify", *files]) == 0, "the model is found by the name in the picture"
    assert capsys.readouterr().out.count("verified") == 4
    record = read_png(files[0])
    assert record["batch"] == 2 and record["device_kind"].startswith("cpu") and len(record["probe"]) == 16
    assert len(unpack_tokens(record["tokens"])) == TOKENS


def test_a_model_that_is_not_here_leaves_the_question_open(pipe, out, tmp_path, capsys):
    assert main(["verify", png(tmp_path, pipe, out, 0, model="elsewhere")]) == 3
    assert "no model 'elsewhere'" in capsys.readouterr().out


def test_verify_takes_pictures_only(pipe):
    result = pipe.verify([3.5])[0]
    assert result.result == "unknown"
    with pytest.raises(InputError):
        read_png(__file__)
