"""Prompt lookup copies what followed the latest occurrence of the last tokens, and never shows in the text."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_generate_fn import NEW, both, end_of, prompts, tiny
from tiny_pipeline import one_clear_line
from torch import Tensor

import arsd
from arsd.decoding import DecodeResult, PromptLookup
from arsd.errors import StrategyError
from arsd.exactness.tables import HashTarget, run
from arsd.generation import generate_fn

pytestmark = pytest.mark.usefixtures("quiet_transformers")


class Says(HashTarget):
    """Says the rows of ``answer`` [B, N], whatever it reads."""

    def __init__(self, answer: Tensor, vocab: int) -> None:
        super().__init__(vocab, answer.shape[1], len(answer))
        self.answer = answer

    def forward(self, tokens, lengths, starts, tree=None) -> Tensor:
        slots = self.remember(tokens, lengths, starts).clamp_max(self.num_tokens - 1)
        return 100.0 * torch.nn.functional.one_hot(self.answer.gather(1, slots), self.vocab).double()[None]


def assert_plain(model: Any, strategy: str, rows: tuple[int, ...] = (1, 2, 3)) -> None:
    """Greedy: plain ``generate``'s tokens. Sampled: those of ``ar`` with the seed. Ragged rows, ends inside a window."""
    for count in rows:
        inputs = prompts(count)
        for ends, new in ((None, NEW), (end_of(model, inputs), NEW), (None, 3)):
            plain, ours = both(model, inputs, strategy, eos_token_id=ends, max_new_tokens=new)
            assert torch.equal(ours.sequences, plain), (count, ends, new)
            options = {"do_sample": True, "seed": 5, "eos_token_id": ends, "max_new_tokens": new, "top_k": 12}
            drawn = [model.generate(**inputs, custom_generate=generate_fn(s), **options) for s in ("ar", strategy)]
            assert torch.equal(*drawn), (count, ends, new)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])  # mixtral: float32
@pytest.mark.parametrize("options", ["draft_length=5", "draft_length=30,longest=2", "draft_length=2,pass_tokens=4"])
def test_a_text_is_plain_generates_whatever_is_copied(kind: str, options: str):
    assert_plain(tiny(kind), f"prompt-lookup:{options}")


def copied(text: list[int], longest: int, shortest: int, length: int, pick: Any = max) -> list[int]:
    """What should be guessed, in plain words; ``pick`` chooses among the ends of occurrences of as many tokens."""
    for size in range(longest, shortest - 1, -1):
        ends = [
            e for e in range(size, len(text)) if text[e - size : e] == text[len(text) - size :] and -1 not in text[-size:]
        ]
        if ends:
            period = text[pick(ends) :]
            break
    else:
        period = text[-1:]
    return [max(0, x) for x in itertools.islice(itertools.cycle(period or [0]), length)]


def looked_up(longest: int, shortest: int, vocab: int = 3, given: int = 0, prompt: bool = True) -> tuple[Any, ...]:
    """(result, text of each picture before its first decoded token): five pictures in two rows."""
    generator = torch.Generator().manual_seed(longest)
    ids = torch.randint(vocab, (5, 11), generator=generator)
    ids[1, :4] = ids[3, :9] = -1
    first = torch.randint(vocab, (5, given), generator=generator) if given else None
    strategy = PromptLookup(draft_length=6, longest=longest, shortest=shortest)
    target = HashTarget(vocab, 40, 2)
    target.first = given
    draft = {"prompt": ids if prompt else None, "given": first}
    result = run(target, strategy, seeds=[3] * 5, pictures=5, given=first, draft=draft, trace=True)
    return result, [(ids[b].tolist() if prompt else []) for b in range(5)]


def wrong_guesses(result: DecodeResult, before: list[list[int]], longest: int, shortest: int, pick: Any = max) -> int:
    """Passes whose guesses are others than :func:`copied` says, while a row is not finished."""
    wrong = 0
    for one in result.trace:
        for row, picture in enumerate(one.pictures):
            if one.counts[row]:
                text = before[picture] + result.tokens[picture, : int(one.positions[row, 0])].tolist()
                wrong += one.drafts[row].tolist() != copied(text, longest, shortest, 6, pick)
    return wrong


@pytest.mark.parametrize(("longest", "shortest"), [(1, 1), (2, 1), (3, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("given", [0, 4])
@pytest.mark.parametrize("prompt", [True, False])
def test_guesses_follow_the_latest_occurrence_of_the_most_tokens(longest: int, shortest: int, given: int, prompt: bool):
    """Padded prompts, given tokens, rows that begin other pictures; a lookup that takes the earliest is seen."""
    result, before = looked_up(longest, shortest, given=given, prompt=prompt)
    assert len(result.trace) > 50 and wrong_guesses(result, before, longest, shortest) == 0
    assert wrong_guesses(result, before, longest, shortest, min) > 10
    if longest > shortest:
        assert wrong_guesses(result, before, shortest, shortest) > 10


def test_a_quoted_passage_is_taken_in_runs_of_the_full_length():
    """The answer is a passage of the prompt and a new end: one token to find the place, then runs of draft_length + 1."""
    passage = torch.arange(10, 31)
    prompt = torch.cat([torch.tensor([1, 2]), passage, torch.tensor([3, 4, 5])])[None]
    answer = torch.cat([passage, torch.tensor([6, 7])])[None]
    for longest, counts in ((1, [1, 5, 5, 5, 5, 1, 1]), (3, [1, 1, 1, 5, 5, 5, 4, 1])):
        strategy = PromptLookup(draft_length=4, longest=longest, shortest=longest)
        out = run(Says(answer, 40), strategy, draft={"prompt": prompt}, trace=True)
        assert torch.equal(out.tokens, answer) and [one.counts[0] for one in out.trace] == counts
    out = run(Says(answer, 40), PromptLookup(draft_length=4), draft={"prompt": None}, trace=True)
    assert out.stats.tokens_per_pass == 1  # nothing to find


def test_a_text_that_goes_round_is_continued_beyond_what_is_known():
    answer = (torch.arange(60) % 3 + 7)[None]
    out = run(Says(answer, 12), PromptLookup(draft_length=9), trace=True)
    assert [one.counts[0] for one in out.trace] == [1, 1, 1, 1, 10, 10, 10, 10, 10, 6]


def test_generate_fn_shows_the_prompt_to_the_lookup():
    """Nothing but the tokens of the prompt can make the first guesses right."""
    model = tiny(num_hidden_layers=1)
    inputs = prompts(1, 12, (0,))
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    again = {"input_ids": torch.cat([plain, inputs["input_ids"]], 1)}
    fn = generate_fn("prompt-lookup:draft_length=4,longest=1")
    out = model.generate(**again, custom_generate=fn, max_new_tokens=1, do_sample=False)
    assert torch.equal(out, model.generate(**again, max_new_tokens=1, do_sample=False))
    seen: list[Tensor] = []
    original = PromptLookup.build

    def build(self, setting):
        seen.append(setting.prompt)
        return original(self, setting)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptLookup, "build", build)
        padded = prompts(3)
        model.generate(**padded, custom_generate=fn, max_new_tokens=2, do_sample=False)
    assert torch.equal(seen[0], padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -1))


def test_lookup_is_lossless_under_every_rule(command, small_suite):
    status, out, err = command("check-rule", "prompt-lookup:longest=2", "--quick")
    assert (status, err) == (0, []), out
    assert out.splitlines()[-1].startswith("lossless")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt-lookup:draft_length=0", "draft_length"),
        ("prompt-lookup:longest=2,shortest=3", "shortest (3) must be at most longest (2)"),
        ("prompt-lookup:shortest=0", "shortest must be a whole number"),
        ("prompt-lookup:longest=none", "longest must be a whole number"),
        ("prompt-lookup:draft_length=8,pass_tokens=8", "pass_tokens"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(text: str, says: str):
    with pytest.raises(StrategyError) as error:
        arsd.parse_strategy(text)
    one_clear_line(error.value, says)


@pytest.mark.slow
def test_the_whole_suite(command):
    status, out, err = command("check-rule", "prompt-lookup")
    assert (status, err) == (0, []), out
