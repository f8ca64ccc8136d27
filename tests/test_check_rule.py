"""check-rule tells a lossless rule or drafter from every kind of wrong one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pipeline import one_clear_line

from arsd.decoding import Draft, Outcome, Purpose, Verdict
from arsd.decoding.relaxed import CoolSDRule
from arsd.decoding.rules import RejectionSampling, SeedExact
from arsd.decoding.siblings import SiblingSampling
from arsd.exactness.suite import check_drafter, check_rule

EXAMPLE = str(Path(__file__).resolve().parent.parent / "docs" / "examples" / "copy_above.py")
pytestmark = pytest.mark.usefixtures("own_registry")


def check(make, kind: str = "rule", sequences: int = 4_000, **claims):
    judge = check_rule if kind == "rule" else check_drafter
    return judge(make, sequences=sequences, **claims)


def failed(report) -> dict[str, str]:
    return {check.check: check.figure for check in report.checks if check.verdict == "FAIL"}


# ---------------------------------------------------------------- rules that are wrong


class RefusedFromP(RejectionSampling):
    """Accepts with min(1, p / q), but replaces a refused guess by a draw from p instead of the residual."""

    def verify(self, step, law, draft):
        verdict = super().verify(step, law, draft)
        drawn = step.noise.categorical(law.probs, Purpose.REDRAFT, step.positions, step.iteration, step.active)
        refused = verdict.outcome == int(Outcome.RESAMPLED)
        verdict.tokens = torch.where(refused, drawn, verdict.tokens)
        return verdict


class OneUniformForBoth(RejectionSampling):
    """The residual is drawn with the uniform that refused the guess: every path looks right, the samples do not."""

    def verify(self, step, law, draft):
        real, self.noise = step.noise, step.noise
        step.noise = self
        try:
            return super().verify(step, law, draft)
        finally:
            step.noise = real

    def bernoulli(self, *args):
        return self.noise.bernoulli(*args)

    def categorical(self, weights, purpose, *args):
        return self.noise.categorical(weights, Purpose.ACCEPT, *args)


class NeverEnds(SeedExact):
    def verify(self, step, law, draft):
        verdict = super().verify(step, law, draft)
        verdict.count = torch.zeros_like(verdict.count)
        return verdict


class BeyondTheEnd(SeedExact):
    def verify(self, step, law, draft):
        verdict = super().verify(step, law, draft)
        verdict.count = verdict.count + (step.width > 0)
        return verdict


class Misshapen(SeedExact):
    def verify(self, step, law, draft):
        verdict = super().verify(step, law, draft)
        verdict.tokens = verdict.tokens[:, :-1]
        return verdict


class Raises(SeedExact):
    def verify(self, step, law, draft):
        raise RuntimeError("the law\nis broken")


class ForgotNeedsLaw(RejectionSampling):
    needs_law = False

    def verify(self, step, law, draft):
        return Verdict(draft.law.argmax(-1), step.positions, step.positions)


class GlobalGenerator(RejectionSampling):
    """Takes its uniforms from torch: the law is right, but a seed does not fix the picture."""

    def verify(self, step, law, draft):
        verdict = super().verify(step, law, draft)
        verdict.count = torch.where(torch.rand(()) < 0.5, verdict.count.clamp_max(1), verdict.count)
        return verdict


class Typical(SeedExact):
    """Relaxed: takes every guess that the law gives one in three."""

    lossless = False

    def verify(self, step, law, draft):
        fresh = step.noise.categorical(law.probs, Purpose.RESIDUAL, step.positions, step.iteration, step.active)
        taken = law.probs[:, :-1].gather(-1, draft.tokens[..., None])[..., 0] > 1 / 3
        tokens = torch.cat([torch.where(taken, draft.tokens, fresh[:, :-1]), fresh[:, -1:]], 1)
        count = torch.minimum(taken.long().cumprod(1).sum(1) + 1, step.width)
        return Verdict(count, tokens, torch.zeros_like(tokens))


def test_a_biased_rule_is_refuted_by_every_path_and_by_samples(small_suite):
    report = check(RefusedFromP)
    wrong = failed(report)
    assert report.verdict == "refuted" and len(wrong) == 3
    assert all(float(wrong[name].split()[1].rstrip(",")) > 1e-3 for name in wrong if name.startswith("every path"))


def test_a_uniform_that_decides_twice_is_refuted_by_samples_alone(small_suite):
    report = check(OneUniformForBoth, sequences=20_000)
    assert report.refuted and all(name.startswith("20,000 samples") for name in failed(report))


PROTOCOL = {
    NeverEnds: "at least 1 in every row that is not finished, or decoding never ends",
    BeyondTheEnd: "must not exceed step.width",
    Misshapen: "Verdict.tokens must have the shape [B, W] = [5, 8], not [5, 7]",
    Raises: "RuntimeError: the law is broken",
    ForgotNeedsLaw: "a rule that reads Draft.law must say needs_law = True",
}


@pytest.mark.parametrize("rule", PROTOCOL, ids=lambda rule: rule.__name__)
def test_a_rule_that_breaks_the_protocol_or_raises_fails_in_one_line_and_the_rest_is_left_out(rule: type):
    report = check(rule)
    [failure] = report.checks
    assert failure.verdict == "FAIL" and report.refuted
    one_clear_line(failure.figure, PROTOCOL[rule])


def test_a_rule_with_randomness_of_its_own_is_refuted_although_its_law_is_right(small_suite):
    assert next(iter(failed(check(GlobalGenerator)))) == "a picture depends on its seed only"


def test_a_rule_that_claims_plain_ars_tokens_is_held_to_them(small_suite):
    report = check(RejectionSampling, seed_exact=True)
    assert report.refuted and all(name.startswith("plain AR's tokens") for name in failed(report))
    assert check(RejectionSampling).verdict == "proven"


def test_a_relaxed_rule_is_measured_and_refuted_under_its_own_name(command, small_suite):
    status, out, _ = command("check-rule", f"{__file__}:Typical", "--quick")
    lines = out.splitlines()
    assert status == 1 and lines[0].endswith("by no more than it reports") and lines[-1].startswith("refuted by")
    assert any("TV" in line and "FAIL" in line for line in lines)


class Understates(CoolSDRule):
    """Reports half of what it costs."""

    def local_tv(self, slots):
        return super().local_tv(slots) / 2


class AnotherResidual(CoolSDRule):
    """Costs more than its acceptance says, and has not the law that its residual says."""

    def verify(self, step, law, draft):
        verdict = super().verify(step, law, draft)
        drawn = step.noise.categorical(law.probs, Purpose.REDRAFT, step.positions, step.iteration, step.active)
        verdict.tokens = torch.where(verdict.outcome == int(Outcome.RESAMPLED), drawn, verdict.tokens)
        return verdict


@pytest.mark.parametrize("rule", [Understates, AnotherResidual])
def test_a_relaxed_rule_whose_report_lies_is_refuted(rule: type, small_suite):
    report = check(rule, lossless=False)
    assert report.verdict == "refuted" and "one slot, every path" in failed(report)


@pytest.mark.parametrize(
    "target",
    [
        "cool-sd:delta=2",
        "cool-sd-published",
        "cool-sd:budget=0.3",
        "lantern:k=1:delta=0.3",
        "lantern-plus-plus:k=1",
        "grouped",
        "margin",
    ],
)
def test_relaxed_rules_of_this_package_cost_what_they_report(command, target: str, small_suite):
    status, out, err = command("check-rule", target, "--quick")
    assert (status, err) == (0, []), out
    last = out.splitlines()[-1]
    assert last.startswith("not refuted" if target == "margin" else "relaxed, and it reports what it costs")


@pytest.mark.parametrize("target", ["siblings", "seed-exact-tree", "tree:shape=2x1", "draft-model", "hybrid"])
def test_rules_and_drafters_of_trees_and_draft_models_are_proven(command, target: str, small_suite):
    status, out, err = command("check-rule", target, "--quick")
    assert (status, err) == (0, []), out
    assert out.splitlines()[-1].startswith("not refuted" if target == "hybrid" else "lossless")  # Gumbel noise only
    assert target not in ("siblings", "seed-exact-tree") or "trees" in out


class TakesTheLastSibling(SiblingSampling):
    """Tests the children of a node in the wrong order against laws for the right one."""

    def verify(self, step, law, draft):
        if draft.tree is not None and draft.law is not None:
            draft = replace(draft, tokens=draft.tokens.flip(1))
        return super().verify(step, law, draft)


def test_a_rule_that_is_wrong_on_trees_only_is_refuted(small_suite):
    report = check(TakesTheLastSibling)
    assert report.verdict == "refuted" and all("trees" in name for name in failed(report))


def test_a_rule_that_cannot_work_in_the_small_worlds_is_one_clear_line(command):
    status, out, err = command("check-rule", "lantern", "--quick")
    assert (status, out, len(err)) == (2, "", 1)
    one_clear_line(err[0], "k must be less than the 12 codes, not 1000")


def test_gumbel_noise_cannot_be_enumerated_and_the_report_says_so(small_suite):
    report = check(SeedExact)
    skipped = [check for check in report.checks if check.verdict == "skipped"]
    assert len(skipped) == 1 and all("infinitely many" in check.figure for check in skipped)
    assert report.verdict == "not refuted"  # without its claim of plain AR's tokens nothing exact applies
    assert check(SeedExact, seed_exact=True).verdict == "proven"


# ---------------------------------------------------------------- drafters that are wrong


class Lies:
    """Always guesses id 0, and says that it draws uniformly."""

    needs_law = True

    def __init__(self, setting):
        self.vocab = setting.grammar.vocab

    def propose(self, step):
        tokens = torch.zeros_like(step.positions[:, :-1])
        return Draft(tokens, torch.full((*tokens.shape, self.vocab), 1 / self.vocab, dtype=torch.float64))

    def observe(self, step, law, verdict, lengths):
        pass

    def join(self, rows, pictures):
        pass


class Honest(Lies):
    def propose(self, step):
        q, slots = super().propose(step).law, step.positions[:, :-1]
        return Draft(step.noise.categorical(q, Purpose.REDRAFT, slots, step.iteration, step.active[:, :-1]), q)


class DrawsOnce(Lies):
    """Draws uniformly, once per position. That is the truth too: a guess that is refused never comes back."""

    def propose(self, step):
        slots = step.positions[:, :-1]
        tokens = step.noise.integers(torch.full_like(slots, self.vocab), Purpose.INITIAL, slots)
        return Draft(tokens, super().propose(step).law)


class ForTheNeighbour(Lies):
    """Guesses something else in another batch, which no law shows."""

    needs_law = False

    def propose(self, step):
        return Draft((step.positions[:, :-1] + len(step.starts)) % self.vocab)


class Remembers(Lies):
    """Does not begin anew in a row that takes another picture."""

    needs_law = False
    passes = 0

    def propose(self, step):
        self.passes += 1
        return Draft((step.positions[:, :-1] + self.passes) % self.vocab)


class OneTooMany(Lies):
    needs_law = False

    def propose(self, step):
        return Draft(torch.zeros_like(step.positions))


class OutsideTheVocabulary(Lies):
    needs_law = False

    def propose(self, step):
        return Draft(step.positions[:, :-1] + self.vocab)


class HalfALaw(Lies):
    def propose(self, step):
        draft = super().propose(step)
        return Draft(draft.tokens, draft.law / 2)


def test_a_drafter_that_lies_about_its_law_is_refuted(small_suite):
    wrong = failed(check(Lies, "drafter"))
    assert len(wrong) == 4 and all("its own q" in name for name in wrong)  # as fixed tokens its guesses are harmless


@pytest.mark.parametrize("drafter", [Honest, DrawsOnce])
def test_a_drafter_that_tells_the_law_of_its_draws_is_lossless(drafter: type, small_suite):
    report = check(drafter, "drafter")
    assert report.verdict == "proven", failed(report)


def test_a_drafter_that_looks_at_other_rows_is_refuted(small_suite):
    assert "guesses as fixed tokens: a picture depends on its seed only" in failed(check(ForTheNeighbour, "drafter"))


def test_a_drafter_that_keeps_the_picture_before_is_refuted_by_the_queue_alone(small_suite):
    [(name, figure)] = failed(check(Remembers, "drafter")).items()
    assert name == "guesses as fixed tokens: a picture depends on its seed only"
    assert figure.startswith("0 on a second run, 0 in rows alone") and not figure.endswith(" 0 in a queue")


@pytest.mark.parametrize(
    ("drafter", "says"),
    [
        (OneTooMany, "Draft.tokens must have the shape [B, W - 1] = [5, 7], not [5, 8]"),
        (OutsideTheVocabulary, "Draft.tokens must be ids in 0..11"),
        (HalfALaw, "Draft.law must be probabilities that sum to 1"),
    ],
)
def test_a_drafter_that_breaks_the_protocol_fails_in_one_line(drafter: type, says: str):
    [failure] = check(drafter, "drafter").checks
    one_clear_line(failure.figure, says)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["seed-exact", "rejection", "rejection:every_slot=true", "none", "jacobi", "copy-above"])
def test_everything_registered_passes_the_whole_suite(command, target: str):
    status, out, err = command("check-rule", target, "--import", EXAMPLE)
    assert (status, err) == (0, []), out
