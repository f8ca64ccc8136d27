"""Windows come from stored measurements: the same call takes the same one tomorrow, and none that does not pay."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_pipeline import class_pipeline, hushed, one_clear_line, saved, seeded, text_pipeline

from arsd import SJD, AutoARPipeline, Autoregressive
from arsd import profile as profile_module
from arsd.cli import main
from arsd.decoding.strategies import FALLBACK_WINDOW
from arsd.devices import device_kind
from arsd.errors import InputError
from arsd.profile import Profile, find_profile, known_profiles, read_profile
from arsd.profiling import make_profile, with_window

KIND = "cpu AVX2 4 threads"
COSTS = {
    1: {1: 1.0, 4: 1.2, 8: 1.5, 16: 3.0},
    4: {1: 2.0, 4: 3.0, 8: 6.0, 16: 12.0},
    16: {1: 4.0, 4: 30.0, 8: 60.0, 16: 99.0},
}
PASSES = {4: [40, 44, 36, 40], 8: [25, 30, 20, 25], 16: [15, 30, 12, 15]}
PROFILE = Profile("m", "a" * 64, KIND, "float32", 100, COSTS, PASSES, {})


@pytest.fixture(autouse=True)
def no_profiles_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("ARSD_PROFILES", str(tmp_path / "profiles"))
    profile_module._profiles_in.cache_clear()
    yield
    profile_module._profiles_in.cache_clear()


def test_window_is_the_fastest_one_by_batch_and_plain_ar_where_none_pays():
    assert PROFILE.seconds(1, 1) == 100 and PROFILE.seconds(1, 8) == 25 * 1.5
    assert [PROFILE.window(batch) for batch in (1, 4, 16)] == [8, 4, 1]


def test_the_slowest_row_of_a_call_decides():
    assert PROFILE.seconds(4, 16) == 30 * 12.0
    assert PROFILE.seconds(2, 4) == pytest.approx(0.5 * (44 + 40) * (2 / 3 * 1.2 + 1 / 3 * 3.0))


def test_batches_between_and_beyond_the_measured_ones_are_filled_in():
    assert PROFILE.seconds(2, 1) == pytest.approx(100 * (2 / 3 * 1.0 + 1 / 3 * 2.0))
    assert PROFILE.seconds(32, 1) == 100 * 8.0 and PROFILE.window(64) == 1


def test_a_gain_too_small_to_trust_is_left():
    slim = replace(PROFILE, costs={1: {1: 1.0, 4: 2.45, 8: 3.95, 16: 9.0}})
    assert slim.seconds(1, 4) < slim.seconds(1, 1) and slim.window(1) == 1


def test_a_profile_comes_back_from_its_file_as_it_went_in(tmp_path):
    PROFILE.save(tmp_path / PROFILE.file_name)
    assert read_profile(tmp_path / PROFILE.file_name) == PROFILE
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [PROFILE.file_name] and " " not in PROFILE.file_name


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"model": 3}', "half"])
def test_a_damaged_profile_is_one_clear_line_and_stops_nothing(tmp_path, damage):
    path = tmp_path / "profiles" / "bad.json"
    PROFILE.save(path)
    path.write_text(path.read_text()[:200] if damage == "half" else damage)
    with pytest.raises(InputError) as error:
        read_profile(path)
    one_clear_line(error.value, "is damaged")
    with pytest.warns(UserWarning, match="arsd profile"):
        assert find_profile(PROFILE.model_hash, KIND, "float32") is None


def test_the_exact_device_is_taken_before_the_nearest_one_and_another_dtype_or_type_never():
    other = replace(PROFILE, device_kind="cpu AVX512 2 threads")
    known = [other, PROFILE, replace(PROFILE, dtype="bfloat16"), replace(PROFILE, device_kind="NVIDIA H200")]

    def found(kind: str, dtype: str = "float32") -> Profile | None:
        return find_profile(PROFILE.model_hash, kind, dtype, known)

    assert found(KIND) is PROFILE and found("cpu AVX2 64 threads") is other
    assert found("NVIDIA A100") is known[3] and found(KIND, "float64") is None
    assert find_profile("b" * 64, KIND, "float32", known) is None and find_profile(None, KIND, "float32", known) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(text_pipeline(), tmp_path_factory.mktemp("model") / "text")


def test_an_automatic_window_follows_the_profile_of_the_model_on_this_device(folder, tmp_path):
    pipe = hushed(AutoARPipeline.from_pretrained(folder))
    call = {"generator": seeded(0), "output_type": "latent"}
    assert pipe("red apple", **call).stats.pass_tokens == FALLBACK_WINDOW
    mine = replace(PROFILE, model_hash=pipe.model_hash, device_kind=device_kind("cpu"))
    mine.save(tmp_path / "profiles" / "mine.json")
    profile_module._profiles_in.cache_clear()
    for batch, window in ((1, 8), (4, 4), (16, 1)):
        prompts, sources = ["red apple"] * batch, [seeded(i) for i in range(batch)]
        out = pipe(prompts, decoder="sjd", generator=sources, output_type="latent")
        assert out.stats.pass_tokens == window, "the decoder of the call is the window of its batch"
        assert torch.equal(out.tokens, pipe(prompts, decoder="ar", generator=[seeded(i) for i in range(batch)]).tokens)
    queued = pipe(["red apple"] * 6, decoder="sjd", generator=seeded(0), batch_size=4, output_type="latent")
    assert queued.stats.pass_tokens == 4, "rows count, not pictures"


def test_a_given_pass_is_filled_by_an_automatic_window(folder):
    pipe = hushed(AutoARPipeline.from_pretrained(folder))
    out = pipe("red apple", decoder=SJD(pass_tokens=5), generator=seeded(0), output_type="latent", trace=True)
    assert out.stats.pass_tokens == 5 and out.trace[0].positions.shape[1] == 5


def test_profile_command_measures_writes_and_shows(folder, tmp_path, capsys):
    options = ["--model", str(folder), "--dtype", "float32"]
    assert main(["profile", "--show", *options]) == 2
    assert "nothing is known" in capsys.readouterr().err
    small = ["--batches", "1", "2", "--windows", "2", "4", "--repeats", "1", "--prompt", "red apple", "pear"]
    assert main(["profile", *small, *options]) == 0
    assert "against plain AR" in capsys.readouterr().out
    (path,) = (tmp_path / "profiles").glob("*.json")
    measured = read_profile(path)
    assert sorted(measured.costs) == [1, 2] and sorted(measured.costs[1]) == [1, 2, 4] and len(measured.passes[2]) == 2
    assert all(8 <= passes <= 16 for passes in measured.passes[2]) and min(measured.costs[1].values()) > 0
    profile_module._profiles_in.cache_clear()
    assert main(["profile", "--show", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["device_kind"] == device_kind("cpu")
    assert main(["profile", "--out", str(tmp_path / "my.json"), *small, *options]) == 0
    assert read_profile(tmp_path / "my.json").model_hash == measured.model_hash


def test_a_profile_counts_passes_with_the_guesses_that_the_model_begins_with():
    assert with_window(SJD(init="above", coupling="maximal"), 6).config["init"] == "above"
    assert str(with_window(Autoregressive(), 6)) == "sjd:window=6"


@pytest.mark.parametrize("wrong", [["--windows", "1"], ["--batches", "0"], ["--repeats", "0"]])
def test_a_profile_of_nothing_is_one_clear_line(folder, capsys, wrong):
    assert main(["profile", "--model", str(folder), "--prompt", "pear", *wrong]) == 2
    one_clear_line(capsys.readouterr().err.strip(), "a profile needs")


def test_a_model_in_memory_cannot_have_a_profile():
    with pytest.raises(InputError, match="save_pretrained it first"):
        make_profile(hushed(class_pipeline()), "tiny", [0])


def test_shipped_profiles_can_be_read_and_belong_to_the_shipped_model():
    shipped = [p for p in known_profiles([profile_module.SHIPPED]) if p.model == "emoji-128"]
    assert shipped, "window=auto has something to go by"
    weights = AutoARPipeline.from_pretrained("emoji-128").model_hash
    for profile in shipped:
        assert profile.model_hash == weights and {1, 8, 16} <= profile.costs.keys()
        assert profile.window(1) > 1
