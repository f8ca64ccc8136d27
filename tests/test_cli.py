"""The command line: pictures with provenance, JSON contracts, files that stay, and one line on stderr for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import SIDE, TOKENS, class_pipeline, one_clear_line, saved, seeded, text_pipeline

import arsd
from arsd.cli import main
from arsd.provenance import model_hash, read_png, tokens_sha256, unpack_tokens

ROOT = Path(__file__).resolve().parent.parent
FAST = ("--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(saved(text_pipeline(), tmp_path_factory.mktemp("cli") / "text"))


@pytest.fixture
def run(model, tmp_path, capsys, monkeypatch):
    """``run("generate", ...)`` in an empty folder gives (status, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command, *words, folder=model):
        if command in ("generate", "bench"):
            words = ("--model", folder, *FAST, *words)
        capsys.readouterr()
        try:
            status = main([command, *map(str, words)])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, [line for line in re.split(r"[\r\n]", err) if line.strip()]

    return call


def made(run, *words, **options):
    status, out, err = run("generate", *words, "--json", **options)
    assert (status, err) == (0, []), err
    return json.loads(out)


# ---------------------------------------------------------------- generate


def test_json_report_keeps_its_contract(run, model):
    report = made(run, "red apple", "dog face", "--n", 2, "--seed", 3, "--out", "o", "--decoder", "sjd:window=5")
    assert {"model", "decoder", "lossless", "seed", "images"} <= set(report)
    assert (report["model"], report["decoder"], report["lossless"], report["seed"]) == (model, "sjd:window=5", True, 3)
    assert [i["prompt"] for i in report["images"]] == ["red apple"] * 2 + ["dog face"] * 2
    for entry in report["images"]:
        kinds = {"path": str, "prompt": str, "tokens_sha256": str, "tokens": int, "forward_passes": int, "seconds": float}
        kinds |= {"tokens_per_pass": float, "pass_tokens": int, "expected_changed_tokens": float, "near_ties": int}
        assert {key: type(entry.get(key)) for key in kinds} == kinds
        assert entry["tokens"] == TOKENS and entry["pass_tokens"] == 5 and entry["expected_changed_tokens"] == 0
        assert entry["forward_passes"] < TOKENS and entry["seconds"] > 0
        assert entry["tokens_per_pass"] == pytest.approx(TOKENS / entry["forward_passes"])
        assert Image.open(entry["path"]).size == (SIDE, SIDE)
    assert len({i["path"] for i in report["images"]}) == len({i["tokens_sha256"] for i in report["images"]}) == 4


def test_pictures_carry_everything_that_made_them(run, model):
    [entry] = made(run, "red apple", "--seed", 9, "--top-k", 11, "--out", "o")["images"]
    record = read_png(entry["path"])
    wanted = {"prompt": "red apple", "seed": 9, "decoder": "sjd", "pass_tokens": 16, "lossless": True, "batch": 1}
    assert {key: record[key] for key in wanted} == wanted and record["model_hash"] == model_hash(model)
    assert record["sampling"]["top_k"] == 11 and record["dtype"] == "float32" and record["arsd"] == arsd.__version__
    tokens = torch.from_numpy(unpack_tokens(record["tokens"]))
    assert tokens_sha256(tokens) == record["tokens_sha256"] == entry["tokens_sha256"]
    pipe = arsd.AutoARPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    again = pipe(record["prompt"], decoder=record["decoder"], generator=seeded(record["seed"]), top_k=11)
    assert torch.equal(again.tokens[0], tokens) and again.seeds == [record["noise_seed"]]
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(Image.open(entry["path"])))


def test_the_same_command_twice_gives_the_same_bytes(run):
    a, b = (made(run, "red apple", "--n", 2, "--out", folder)["images"] for folder in "ab")
    assert [i["tokens_sha256"] for i in a] == [i["tokens_sha256"] for i in b]
    assert [Path(i["path"]).name for i in a] == [Path(i["path"]).name for i in b]
    assert [Path(i["path"]).read_bytes() for i in a] == [Path(i["path"]).read_bytes() for i in b]
    assert made(run, "red apple", "--seed", 1, "--out", "a")["images"][0]["tokens_sha256"] != a[0]["tokens_sha256"]


def test_a_prompt_gives_the_same_picture_whatever_its_neighbours(run):
    alone = made(run, "dog face", "--out", "a")["images"][0]
    second = made(run, "red apple", "dog face", "--out", "b")["images"][1]
    assert second["tokens_sha256"] == alone["tokens_sha256"]


def test_compare_says_same_tokens_for_the_gumbel_coupling_and_counts_them_for_another(run):
    status, out, _ = run("generate", "red apple", "--compare", "--decoder", "sjd:coupling=gumbel", "--out", "a")
    assert status == 0 and "same tokens" in out and "1 picture in a/" in out
    status, out, _ = run("generate", "red apple", "--compare", "--decoder", "sjd:coupling=independent", "--out", "b")
    assert status == 0 and re.search(rf"[1-9]\d* of {TOKENS} tokens differ", out) and "same tokens" not in out


def test_compare_with_json_carries_the_figures_of_plain_ar(run):
    [entry] = made(run, "red apple", "--compare", "--out", "a")["images"]
    assert entry["ar"]["tokens_sha256"] == entry["tokens_sha256"] and entry["ar"]["changed_tokens"] == 0
    assert entry["ar"]["forward_passes"] == TOKENS > entry["forward_passes"]


def test_existing_files_stay_unless_asked_and_nothing_is_generated_for_them(run, monkeypatch):
    [entry] = made(run, "red apple", "--out", "o")["images"]
    path, before = Path(entry["path"]), Path(entry["path"]).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("arsd.cli.generate.load_pipeline", lambda arguments: pytest.fail("loaded a model for nothing"))
        status, out, err = run("generate", "dog face", "red apple", "--out", "o", "--guidance-scale", 1)
    assert (status, out, len(err)) == (2, "", 1) and f"{path} exists" in err[0]
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
    made(run, "red apple", "--out", "o", "--overwrite", "--guidance-scale", 1)
    assert path.read_bytes() != before


def test_two_prompts_with_one_slug_get_two_files(run):
    report = made(run, "red apple", "Red, apple!", "!?", "red apple", "--out", "o")
    names = [Path(i["path"]).name for i in report["images"]]
    assert names == ["red-apple-seed0-0.png", "red-apple.2-seed0-0.png", "picture-seed0-0.png", "red-apple.3-seed0-0.png"]
    assert sorted(p.name for p in Path("o").iterdir()) == sorted(names)
    assert [read_png(i["path"])["prompt"] for i in report["images"]] == [i["prompt"] for i in report["images"]]


def test_long_and_foreign_prompts_get_a_file_name_that_works(run):
    status, out, err = run("generate", "pear " * 80, "größe/../🍎", "--json", "--out", "o")
    assert status == 0 and all(line.startswith("arsd: warning: ") for line in err)
    assert all(Path(i["path"]).parent == Path("o") and Path(i["path"]).is_file() for i in json.loads(out)["images"])


def test_prompts_come_from_a_file_without_comments_and_blank_lines(run):
    Path("p.txt").write_text("# a comment\nred apple\n\n   \n  dog face  \r\n#pear\n", encoding="utf-8")
    report = made(run, "pear", "--prompts", "p.txt", "--out", "o")
    assert [i["prompt"] for i in report["images"]] == ["pear", "red apple", "dog face"]


def test_unknown_words_are_one_warning_line_and_the_picture_is_made(run):
    status, out, err = run("generate", "red zebra", "--json", "--out", "o")
    assert status == 0 and len(json.loads(out)["images"]) == 1
    assert err == ["arsd: warning: the text encoder does not know: zebra"]


# ---------------------------------------------------------------- bench, models, demo, version


def test_bench_json_keeps_its_contract(run, model):
    words = ("--prompt", "red apple", "dog face", "pear", "--batch", 2, "--repeats", 2, "--guidance-scale", 1.5)
    decoders = ("--decoders", "sjd", "sjd:window=4,coupling=maximal", "ar:pass_tokens=4")
    status, out, _ = run("bench", *words, *decoders, "--json")
    report = json.loads(out)
    figures = {key: report[key] for key in ("model", "dtype", "device", "batch", "guidance_scale", "threads")}
    threads = torch.get_num_threads()
    wanted = {"model": model, "dtype": "float32", "device": "cpu", "batch": 2, "guidance_scale": 1.5, "threads": threads}
    assert status == 0 and figures == wanted
    keys = {"decoder", "lossless", "tokens", "forward_passes", "tokens_per_pass", "seconds", "seconds_median", "speedup"}
    keys |= {"outside_forward_share", "identical_to_ar_at_w", "pass_tokens", "peak_memory"}
    assert all(keys <= set(row) for row in report["rows"])
    assert [row["decoder"] for row in report["rows"]] == ["ar", *decoders[1:]]
    assert [row["identical_to_ar_at_w"] for row in report["rows"]] == [True, True, None, True]


def test_bench_for_people_is_a_table_with_a_line_for_each_decoder(run):
    status, out, _ = run("bench", "--prompt", "red apple", "--no-check")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 5 and lines[1].startswith("decoder") and lines[3].startswith("ar ")
    assert "float32, cpu" in lines[0] and lines[4].startswith("sjd ")


def test_models_lists_what_ships(run, model, tmp_path, monkeypatch):
    (tmp_path / "ship").mkdir()
    (tmp_path / "ship" / "tiny").symlink_to(model)
    video = next(row for row in json.loads(run("models", "--json")[1]) if row["name"] == "emoji-video-chat")
    folder = str(ROOT / "arsd" / "checkpoints" / "emoji-video-chat")
    told = json.loads(run("models", "emoji-video-chat", folder, str(model), "--json")[1])
    assert [row["kind"] for row in told[:2]] == ["video-llm"] * 2 and told[2]["pipeline"] == "LlamaGenPipeline"
    for module in ("auto", "video_parts"):
        monkeypatch.setattr(f"arsd.pipelines.{module}.CHECKPOINTS", tmp_path / "ship")
    status, out, err = run("models", "--json")
    [row] = [row for row in json.loads(out) if row["shipped"]]
    assert (status, err) == (0, []) and row["name"] == "tiny" and row["pipeline"] == "LlamaGenPipeline"
    assert video["pipeline"] == "VideoLLMPipeline" and video["megabytes"] < 9
    assert row["model_hash"] == model_hash(model)
    assert "tiny" in run("models")[1]
    assert made(run, "red apple", "--out", "o", folder="tiny")["model"] == "tiny"


def test_demo_writes_a_sheet_of_the_pictures(run, model, monkeypatch):
    monkeypatch.setattr("arsd.cli.demo.DEFAULT_MODEL", model)
    status, out, _ = run("demo", "--out", "d")
    assert status == 0 and Path("d/sheet.png").is_file() and len(list(Path("d").glob("*-seed7-0.png"))) == 4
    assert out.count("same tokens") == 4


def test_python_dash_m_tells_the_version():
    command = [sys.executable, "-m", "arsd", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"arsd {arsd.__version__}", "")


# ---------------------------------------------------------------- mistakes: status 2 and one line


MISTAKES = {
    "no prompt": ((), "the prompt is empty"),
    "empty prompt": (("red apple", " "), "the prompt is empty"),
    "no such file": (("--prompts", "none.txt"), "cannot read prompts from none.txt"),
    "empty file": (("--prompts", "empty.txt"), "the prompt is empty"),
    "only comments": (("--prompts", "comments.txt"), "the prompt is empty"),
    "file of bytes": (("--prompts", "bytes.txt"), "cannot read prompts from bytes.txt"),
    "prompts are a folder": (("--prompts", "."), "cannot read prompts from ."),
    "no pictures": (("pear", "--n", "0"), "--n must be at least 1, not 0"),
    "seed below 0": (("pear", "--seed", "-1"), "--seed must lie in 0..2^63-1"),
    "seed too high": (("pear", "--seed", str(2**63)), "--seed must lie in 0..2^63-1"),
    "decoder": (("pear", "--decoder", "warp"), "unknown decoder 'warp': choose from ar, sjd"),
    "empty decoder": (("pear", "--decoder", ""), "unknown decoder ''"),
    "decoder option": (("pear", "--decoder", "sjd:window"), "sjd has no option 'window'"),
    "window": (("pear", "--decoder", "sjd:window=-1"), "window must be a whole number >= 1 or auto, not -1"),
    "temperature": (("pear", "--temperature", "-1"), "temperature must be >= 0"),
    "top-k": (("pear", "--top-k", "-1"), "top_k must be a whole number >= 0"),
    "top-p": (("pear", "--top-p", "0"), "top_p must lie in (0, 1]"),
    "guidance": (("pear", "--guidance-scale", "nan"), "guidance_scale must be >= 0"),
    "threads": (("pear", "--threads", "0"), "--threads must be at least 1, not 0"),
    "dtype": (("pear", "--dtype", "float12"), "unknown dtype 'float12'"),
    "device": (("pear", "--device", "toaster"), "device 'toaster' cannot be used here"),
    "out is a file": (("pear", "--out", "empty.txt"), "empty.txt"),
    "out in a file": (("pear", "--out", "empty.txt/deep"), "empty.txt"),
    "not a number": (("pear", "--seed", "one"), "--seed"),
    "unknown option": (("pear", "--colour", "red"), "--colour"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(run, case, tmp_path):
    for name, data in (("empty.txt", b""), ("comments.txt", b"# one\n\n# two\n"), ("bytes.txt", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(data)
    words, says = MISTAKES[case]
    status, out, err = run("generate", *words)
    assert (status, out, len(err)) == (2, "", 1), err
    one_clear_line(err[0].removeprefix("arsd: "), says)
    assert not list(tmp_path.rglob("*.p*g*"))


BENCH_MISTAKES = {
    "no prompt": ((), "the prompt is empty"),
    "decoder": (("--prompt", "pear", "--decoders", "ar", "warp"), "unknown decoder 'warp'"),
    "batch": (("--prompt", "pear", "--batch", "2"), "1 prompts cannot fill a batch of 2"),
    "no batch": (("--prompt", "pear", "--batch", "0"), "batch of 0"),
    "repeats": (("--prompt", "pear", "--repeats", "0"), "repeats (0) is below 1"),
    "seed": (("--prompt", "pear", "--seed", str(2**80)), "seed"),
    "top-p": (("--prompt", "pear", "--top-p", "2"), "top_p must lie in (0, 1]"),
}


@pytest.mark.parametrize("case", BENCH_MISTAKES)
def test_a_mistake_in_bench_is_one_line_and_status_2(run, case):
    words, says = BENCH_MISTAKES[case]
    status, out, err = run("bench", *words)
    assert (status, out, len(err)) == (2, "", 1), err
    one_clear_line(err[0], says)


@pytest.mark.parametrize("words", [[], ["paint"]])
def test_an_unknown_command_is_one_line_and_status_2(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_models_that_cannot_be_used_are_one_line_and_status_2(run, tmp_path, model):
    (tmp_path / "bare").mkdir()
    labels = saved(class_pipeline(), tmp_path / "labels")
    broken, nan = (saved(text_pipeline(), tmp_path / name) for name in ("broken", "nan"))
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    pipe = text_pipeline()
    torch.nn.init.constant_(pipe.transformer.lm.lm_head.weight, torch.nan)
    pipe.save_pretrained(nan)
    cases = {
        "nowhere": "no model 'nowhere'",
        str(tmp_path / "bare"): "has no model_index.json",
        str(labels): "this model needs class_labels",
        str(broken): "could not load",
        str(nan): "NaN or infinite logits",
    }
    for folder, says in cases.items():
        status, out, err = run("generate", "pear", "--json", "--out", "o", folder=folder)
        assert (status, out, len(err)) == (2, "", 1), err
        one_clear_line(err[0], says)
