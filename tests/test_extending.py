"""A method of somebody else's works from one file, and check-rule tells a lossless one from every kind of wrong one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_pipeline import TOKENS, codes, hushed, one_clear_line, saved, text_pipeline

import arsd
from arsd.decoding import STRATEGIES, CounterNoise, Grammar, Setting
from arsd.decoding import registry as registry_module
from arsd.decoding.drafters import NoDraft
from arsd.decoding.rules import RejectionSampling, SeedExact
from arsd.errors import CheckpointError, StrategyError
from arsd.exactness.worlds import picture, plain_picture

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = str(ROOT / "docs" / "examples" / "copy_above.py")


pytestmark = pytest.mark.usefixtures("own_registry")


# ---------------------------------------------------------------- names


def test_a_registered_class_stays_itself_and_is_found_by_its_name():
    @arsd.register_rule("mine", lossless=False)
    class Mine(SeedExact):
        pass

    @arsd.register_drafter("silent")
    def silent(setting):
        return NoDraft()

    assert isinstance(Mine(), SeedExact) and silent(None).needs_law is False
    strategy = arsd.parse_strategy("speculative:drafter=silent,rule=mine,window=4")
    assert not strategy.lossless and not strategy.seed_exact
    assert torch.equal(picture(strategy.build), plain_picture())


def test_a_name_belongs_to_one_definition_which_may_be_run_again():
    def define(base):
        @arsd.register_rule("mine")
        class Mine(base):
            pass

        return Mine

    define(SeedExact)
    again = define(RejectionSampling)  # as a notebook cell does
    assert registry_module.RULES["mine"].factory is again
    with pytest.raises(StrategyError, match="there is a rule 'mine' already .*define.*Mine"):
        arsd.register_rule("mine")(SeedExact)
    arsd.register_drafter("mine")(NoDraft)  # drafters and rules have names of their own


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a,b", "a=b", "1st", 3, None])
def test_names_that_a_strategy_could_not_spell_are_refused(name):
    for register in (arsd.register_drafter, arsd.register_rule):
        with pytest.raises(StrategyError, match="cannot be called"):
            register(name)(SeedExact)


def test_a_rule_cannot_promise_plain_ars_tokens_and_not_its_law():
    with pytest.raises(StrategyError, match="cannot be seed-exact and not lossless"):
        arsd.register_rule("odd", lossless=False, seed_exact=True)


# ---------------------------------------------------------------- the strategy

TEXTS = {
    "speculative": (True, True),
    "speculative:drafter=none": (True, True),
    "speculative:drafter=jacobi:init=left:redraft=gumbel,window=5": (True, True),
    "speculative:rule=rejection": (True, False),
    "speculative:rule=rejection:every_slot=true,window=4,pass_tokens=8": (True, False),
}


@pytest.mark.parametrize("text", TEXTS)
def test_speculative_goes_through_text_json_and_a_pipeline_and_promises_what_its_rule_does(text: str, tmp_path: Path):
    strategy = arsd.parse_strategy(text)
    assert str(strategy) == text and (strategy.lossless, strategy.seed_exact) == TEXTS[text]
    assert STRATEGIES["speculative"] is type(strategy) is arsd.Speculative
    again = arsd.AutoARPipeline.from_pretrained(saved(text_pipeline(strategy), tmp_path)).decoder
    assert (
        str(again) == text
        and json.loads((tmp_path / "decoder" / "decoder_config.json").read_text())["rule"] in text + "seed-exact"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_speculative_gives_plain_ars_tokens_exactly_when_it_promises_them(text: str):
    assert torch.equal(picture(arsd.parse_strategy(text).build), plain_picture()) == TEXTS[text][1]


def test_jacobi_under_a_registered_rule_is_sjd():
    for ours, theirs in {
        "speculative:window=6": "sjd:window=6",
        "speculative:rule=rejection,window=6": "sjd:coupling=independent,window=6",
        "speculative:rule=rejection:every_slot=true,window=6": "sjd:coupling=maximal,window=6",
        "speculative:drafter=jacobi:redraft=gumbel,rule=rejection,window=6": "sjd:coupling=gumbel-rejection,window=6",
    }.items():
        assert torch.equal(picture(arsd.parse_strategy(ours).build), picture(arsd.parse_strategy(theirs).build)), ours


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("drafter=warp", "unknown drafter 'warp': choose from"),
        ("rule=warp", "unknown rule 'warp': choose from seed-exact, rejection"),
        ("drafter=3", "unknown drafter 3"),
        ("rule=none", "unknown rule None"),
        ("drafter=jacobi:speed=9", "unexpected keyword argument 'speed'; its options are: init, redraft"),
        ("drafter=jacobi:init", "'init' in 'jacobi:init' is no option"),
        ("rule=seed-exact:x=1", "its options are: none"),
        (
            "drafter=none,rule=rejection",
            "rule 'rejection' needs the law q of the guesses, which drafter 'none' does not give",
        ),
        ("window=0", "window must be a whole number >= 1"),
        ("pass_tokens=8", "pass_tokens (8) must be at least window (16)"),
    ],
)
def test_a_strategy_that_cannot_work_is_refused_in_one_line(text: str, says: str):
    with pytest.raises(StrategyError) as error:
        arsd.parse_strategy("speculative:" + text)
    one_clear_line(error.value, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("drafter=jacobi:init=below", "unknown init 'below'"),
        ("drafter=jacobi:redraft=never", "unknown redraft 'never'"),
        ("drafter=jacobi:redraft=rule,rule=rejection", "redraft=rule needs a rule that judges every slot"),
    ],
)
def test_a_value_that_only_the_drafter_can_judge_is_refused_before_the_first_pass(text: str, says: str):
    setting = Setting(1, 4, 2, Grammar(4, 3), CounterNoise([0], [0]), torch.device("cpu"))
    with pytest.raises(StrategyError) as error:
        arsd.parse_strategy("speculative:" + text).build(setting)
    one_clear_line(error.value, says)


# ---------------------------------------------------------------- the example file


def test_the_guide_shows_the_file_that_is_tested():
    guide, code = (ROOT / "docs" / "extending.md").read_text(), Path(EXAMPLE).read_text()
    parts = code.split("\n\n\n")[1:]
    assert len(parts) == 2 and all(part.strip() in guide for part in parts)
    assert all(len(part.splitlines()) <= 30 for part in parts)


def test_the_example_drafter_is_lossless(command):
    status, out, err = command("check-rule", f"{EXAMPLE}:CopyAbove", "--quick")
    assert (status, err) == (0, []), out
    assert out.splitlines()[-1].startswith("lossless: 12 checks pass") and "FAIL" not in out


def test_the_example_rule_is_lossless(command, small_suite):
    status, out, err = command("check-rule", "take-or-leave", "--import", EXAMPLE, "--quick", "--json")
    report = json.loads(out)
    assert (status, err, report["verdict"], report["kind"]) == (0, [], "proven", "rule")
    assert {check["verdict"] for check in report["checks"]} == {"pass"}
    assert all({"check", "figure", "bar", "seconds", "exact"} <= set(check) for check in report["checks"])


def test_bench_and_generate_run_the_example_and_its_tokens_are_plain_ars(command, tmp_path: Path):
    model = saved(text_pipeline(), tmp_path / "tiny")
    options = ("--import", EXAMPLE, "--model", model, "--dtype", "float32", "--device", "cpu", "--json")
    decoders = [
        "ar",
        "speculative:drafter=copy-above,window=6",
        "speculative:drafter=copy-above,rule=take-or-leave,window=6",
    ]
    status, out, _ = command("bench", *options, "--prompt", "red apple", "dog face", "--batch", 2, "--decoders", *decoders)
    rows = json.loads(out)["rows"]
    assert status == 0 and [row["decoder"] for row in rows] == decoders
    assert [(row["identical_to_ar_at_w"], row["lossless"]) for row in rows] == [(True, True), (True, True), (None, True)]
    words = ("red apple", "--compare", "--out", tmp_path / "o", "--decoder", decoders[1])
    status, out, _ = command("generate", *options, *words)
    assert status == 0 and json.loads(out)["images"][0]["ar"]["changed_tokens"] == 0


def test_a_pipeline_keeps_the_name_and_asks_for_the_file_that_registers_it(tmp_path: Path):
    arsd.register_rule("kept", seed_exact=True)(SeedExact)
    folder = saved(text_pipeline(arsd.Speculative(rule="kept", window=5)), tmp_path)
    pipe = hushed(arsd.AutoARPipeline.from_pretrained(folder))
    assert torch.equal(codes(pipe, "red apple"), codes(pipe, "red apple", decoder="ar"))
    assert codes(pipe, "red apple").shape == (1, TOKENS)
    del registry_module.RULES["kept"]
    with pytest.raises(CheckpointError) as error:
        arsd.AutoARPipeline.from_pretrained(folder)
    one_clear_line(error.value, "unknown rule 'kept': choose from seed-exact, rejection")
    one_clear_line(error.value, ", or import the file that registers it")


# ---------------------------------------------------------------- mistakes: status 2 and one line

FILES = {
    "broken.py": "import arsd\nthis is no Python\n",
    "raising.py": "raise ValueError('not\\ntoday')\n",
    "leaving.py": "import sys\nsys.exit(3)\n",
    "taken.py": "import arsd\n\n@arsd.register_rule('seed-exact')\nclass Other: ...\n",
    "odd.py": "class Empty: ...\n\nclass Both:\n    def verify(self): ...\n    def propose(self): ...\n\nx = 1\n",
}
MISTAKES = {
    "no file": (("seed-exact", "--import", "none.py"), "cannot import none.py: there is no such file"),
    "no module": (
        ("seed-exact", "--import", "no_such_module_here"),
        "cannot import no_such_module_here: ModuleNotFoundError",
    ),
    "syntax": (("seed-exact", "--import", "broken.py"), "cannot import broken.py: SyntaxError"),
    "raises": (("seed-exact", "--import", "raising.py"), "cannot import raising.py: ValueError: not today"),
    "exits": (("seed-exact", "--import", "leaving.py"), "cannot import leaving.py: SystemExit: 3"),
    "name taken": (("seed-exact", "--import", "taken.py"), "there is a rule 'seed-exact' already"),
    "unknown target": (("warp",), "no rule or drafter is called 'warp': choose from seed-exact, rejection"),
    "no class": (("odd.py:Nothing",), "odd.py has no 'Nothing'"),
    "no file of the class": (("none.py:Class",), "cannot import none.py"),
    "neither": (("odd.py:Empty",), "must be a class with either verify (a rule) or propose (a drafter)"),
    "both": (("odd.py:Both",), "must be a class with either verify"),
    "no type": (("odd.py:x",), "must be a class with either verify"),
    "option": (("rejection:speed=1",), "rule 'rejection': got an unexpected keyword argument 'speed'"),
    "value": (("jacobi:init=below",), "unknown init 'below'"),
    "no target": ((), "target"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(command, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    words, says = MISTAKES[case]
    status, out, err = command("check-rule", *words)
    assert (status, out, len(err)) == (2, "", 1), err
    one_clear_line(err[0], says)


def test_bench_and_generate_import_before_they_read_strategies_and_load_no_model_for_a_mistake(command, monkeypatch):
    for name, patched in (("bench", "arsd.cli.bench"), ("generate", "arsd.cli.generate")):
        monkeypatch.setattr(f"{patched}.load_pipeline", lambda arguments: pytest.fail("loaded a model for nothing"))
        status, out, err = command(name, "--import", "none.py")
        assert (status, out) == (2, "") and "cannot import none.py" in err[0] and len(err) == 1


def test_a_module_of_the_working_directory_can_be_imported_and_a_file_runs_once(command, tmp_path, monkeypatch, small_suite):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = "import arsd\nfrom arsd.decoding.rules import SeedExact\n\n@arsd.register_rule('here', seed_exact=True)\n"
    Path("my_rules_for_this_test.py").write_text(text + "class Here(SeedExact):\n    pass\n")
    for target in ("here", "my_rules_for_this_test:Here"):
        words = ("--import", "my_rules_for_this_test", "--import", "my_rules_for_this_test", "--quick")
        status, out, err = command("check-rule", target, *words)
        assert (status, err) == (0, []) and "claims plain AR's own tokens" in out
    del sys.modules["my_rules_for_this_test"]
