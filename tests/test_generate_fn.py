"""``generate(custom_generate=arsd.generate_fn(...))`` gives what plain ``generate()`` gives, in fewer passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from scipy import stats
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process as hf

from arsd.decoding import SJD
from arsd.generation import GenerateFnOutput, generate_fn

VOCAB, NEW, IDS = 48, 24, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, **IDS}
VQ = {"ch": 32, "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8, "channel_multiplier": [1], "num_embeddings": 16}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama eager": ("Llama", SIZES | {"attn_implementation": "eager"}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 8}),
    "mistral": ("Mistral", SIZES | {"sliding_window": None}),
    "mistral in its window": ("Mistral", SIZES | {"sliding_window": 64}),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4}),
    "gpt-neox": ("GPTNeoX", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 31, **IDS}),
    "gemma2": ("Gemma2", SIZES | {"head_dim": 8, "sliding_window": 64, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", SIZES | {"head_dim": 8, "sliding_window": 64}),
    "cohere": ("Cohere", SIZES | {"logit_scale": 0.5}),
    "granite": ("Granite", SIZES | {"logits_scaling": 3.0}),
    "emu3": ("Emu3", SIZES),
    "chameleon": ("Chameleon", SIZES | {"num_key_value_heads": 4, "vq_config": VQ}),
}
SINGLE = {"llama eager", "gemma2", "mixtral"}  # transformers' own eager attention gives NaN for padded rows in float64
IMAGE_WORDS = {f"IMGIMG{chr(65 + n)}Z": 8 + n for n in range(16)}  # the ids 8 .. 23 are codes of pictures


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def peaked(model: Any) -> Any:
    """Random laws that are far from uniform and depend on the context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=1.5 / p[0].numel() ** 0.5)
    return model.eval()


def tiny(kind: str = "llama", **options: Any) -> Any:
    name, sizes = CAUSAL[kind]
    kinds = {"Gemma3": "Gemma3TextConfig", "Emu3": "Emu3TextConfig"}
    sizes = sizes | options
    if name == "Chameleon":
        sizes = sizes | {"vocabulary_map": {"<image>": 3, **IMAGE_WORDS}}
    config = getattr(transformers, kinds.get(name, f"{name}Config"))(**sizes)
    head = "LMHeadModel" if name == "GPT2" else "ForConditionalGeneration" if name == "Chameleon" else "ForCausalLM"
    return peaked(getattr(transformers, name + head)(config)).to(torch.float32 if kind in SINGLE else torch.float64)


@pytest.fixture(scope="module")
def llama():
    return tiny()


def prompts(
    rows: int = 3, length: int = 7, pads: tuple[int, ...] = (0, 3, 5), vocab: int = VOCAB
) -> dict[str, torch.Tensor]:
    """Prompts padded on the left."""
    ids = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) >= torch.tensor(pads[:rows])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(model: Any, inputs: dict[str, Any], strategy: str = "sjd:window=6", **options: Any) -> tuple[torch.Tensor, Any]:
    """(plain generate's ids, our output)."""
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    fn, own = generate_fn(strategy), {"cfg_scale", "negative_input_ids", "negative_attention_mask", "seed"}
    plain = model.generate(**inputs, **{k: v for k, v in options.items() if k not in own})
    ours = {
        k: v
        for k, v in options.items()
        if k not in ("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask")
    }
    return plain, model.generate(**inputs, **ours, custom_generate=fn, return_dict_in_generate=True)


def end_of(model: Any, inputs: dict[str, Any]) -> list[int]:
    """Ids that end the rows of plain greedy decoding at different lengths."""
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return sorted({int(row[6 + 5 * b]) for b, row in enumerate(plain)})


@pytest.mark.parametrize("kind", CAUSAL)
def test_greedy_tokens_are_plain_generates_for_every_kind_of_model(kind: str):
    model = tiny(kind)
    for rows in (1, 2, 3):
        inputs = prompts(rows)
        for ends in (None, end_of(model, inputs)):
            plain, ours = both(model, inputs, eos_token_id=ends)
            assert torch.equal(ours.sequences, plain), (rows, ends)
            assert ours.stats.forward_passes <= max(ours.stats.tokens) and ours.stats.prefill_passes == 1
            lengths = [
                NEW if ends is None else 1 + next((i for i, t in enumerate(row) if t in ends), NEW - 1)
                for row in plain[:, 7:].tolist()
            ]
            assert ours.stats.tokens == lengths


STRATEGIES = [
    *("ar", "ar:pass_tokens=5", "sjd:window=1", "sjd:window=9,pass_tokens=12", "speculative", "speculative:drafter=none"),
    *(f"sjd:window=5,coupling={coupling}" for coupling in ("maximal", "gumbel-rejection", "independent")),
    *(f"sjd:window=5,init={init}" for init in ("random", "left", "above")),
    *("speculative:drafter=jacobi,rule=rejection", "sjd:window=5,acceptance=cool-sd:delta=2"),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_greedy_tokens_are_the_same_under_every_strategy(llama, strategy: str):
    inputs = prompts()
    plain, ours = both(llama, inputs, strategy, eos_token_id=end_of(llama, inputs), repetition_penalty=1.2)
    assert torch.equal(ours.sequences, plain)


class Bigrams(LogitsProcessor):
    """Tokens that may follow one another; a text that breaks the rule is an error, as in a state machine."""

    def __init__(self, known: int, shift: int = 0) -> None:
        self.known, self.shift = known, shift

    def allowed(self, b: int, ids: torch.Tensor) -> list[int]:
        last, *rest = ids[self.known - 1 :].tolist()
        for token in rest:
            assert token in self.after(b, last), "a text that the rule forbids"
            last = token
        return self.after(b, last)

    def after(self, b: int, last: int) -> list[int]:
        return [(5 * last + self.shift * b + n) % VOCAB for n in range(1, 7)]

    def __call__(self, ids, scores):
        mask = torch.full_like(scores, -torch.inf)
        for b, row in enumerate(ids):
            mask[b, self.allowed(0, row)] = 0
        return scores + mask


class Ban(LogitsProcessor):
    """Bans the last token and, in place, one more; depends on nothing but the text."""

    def __call__(self, ids, scores):
        scores[:, 9] = -torch.inf
        return scores.scatter(1, ids[:, -1:], -torch.inf)


PROCESSED: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 2},
    "n-grams of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "penalty of the prompt": {"encoder_repetition_penalty": 1.5},
    "bad words": {"bad_words_ids": [[n] for n in range(10, 30)] + [[31, 32]]},
    "bias": {"sequence_bias": {(17,): 4.0, (33, 34): 9.0}},
    "suppressed": {"suppress_tokens": [*range(5, 30)]},
    "suppressed at first": {"begin_suppress_tokens": [*range(3, 40)]},
    "least new tokens": {"min_new_tokens": 15},
    "least length": {"min_length": 17},
    "forced end": {"forced_eos_token_id": 4},
    "decay": {"exponential_decay_length_penalty": (3, 1.3)},
    "no invalid values": {"remove_invalid_values": True, "repetition_penalty": 1.5},
    "renormalised": {"renormalize_logits": True, "repetition_penalty": 1.5},
    "watermark": {"watermarking_config": transformers.WatermarkingConfig(bias=3.0)},
    "user's own": {"logits_processor": LogitsProcessorList([Ban()])},
    "user's constraint": {"logits_processor": LogitsProcessorList([Bigrams(7)])},
    "prefix function": {"prefix_allowed_tokens_fn": Bigrams(7, shift=3).allowed},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "prefix_allowed_tokens_fn": Bigrams(7, 2).allowed},
}
NEED_END = {"least new tokens", "least length", "decay", "watermark"}


@pytest.mark.parametrize("name", PROCESSED)
@pytest.mark.parametrize("strategy", ["sjd:window=6", "sjd:window=4,coupling=independent"])
def test_every_processor_sees_the_text_before_its_slot(llama, name: str, strategy: str):
    inputs = prompts()
    options: dict[str, Any] = {"eos_token_id": end_of(llama, inputs)} if name in NEED_END else {}
    without, _ = both(llama, inputs, **options)
    plain, ours = both(llama, inputs, strategy, **options, **PROCESSED[name])
    assert torch.equal(ours.sequences, plain)
    assert not torch.equal(plain, without), "the processor changes nothing: the test shows nothing"


WARPED: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top-k, top-p": {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
    "min-p": {"min_p": 0.1, "top_k": 0},
    "typical": {"typical_p": 0.7, "top_k": 0},
    "cutoffs": {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "top_k": 0},
    "top-h": {"top_h": 0.5, "top_k": 0},
    "with the text": {"top_k": 9, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "constrained": {"top_p": 0.9, "prefix_allowed_tokens_fn": Bigrams(7, shift=1).allowed},
    "guided": {"top_k": 20, "cfg_scale": 1.7},
}


@pytest.mark.parametrize("name", WARPED)
def test_every_window_draws_the_tokens_of_plain_ar_with_the_same_seed(llama, name: str):
    options = {"max_new_tokens": NEW, "do_sample": True, "eos_token_id": 7, **WARPED[name]}

    def draw(strategy: SJD | str, seed: int) -> torch.Tensor:
        return llama.generate(**prompts(), custom_generate=generate_fn(strategy), seed=seed, **options)

    alone = draw("ar", 5)
    for strategy in ("sjd:window=2", "sjd:window=7", SJD(window=16, pass_tokens=17, init="left")):
        assert torch.equal(draw(strategy, 5), alone), strategy
    assert not torch.equal(draw("ar", 6)[:, :12], alone[:, :12])


def test_without_a_seed_torchs_generator_decides_and_greedy_decoding_leaves_it_alone(llama):
    def drawn(seed: int | None) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return llama.generate(**prompts(), custom_generate=generate_fn(), do_sample=True, max_new_tokens=NEW)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(None))
    state = torch.get_rng_state()
    llama.generate(**prompts(), custom_generate=generate_fn(), do_sample=False, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), state)


def exact_law(model: Any, ids: torch.Tensor, processors: LogitsProcessorList, length: int) -> dict[tuple[int, ...], float]:
    """Probability of every continuation by transformers' own processors."""
    laws = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, weight in laws.items():
            seen = torch.cat([ids, torch.tensor([text], dtype=torch.int64)], dim=1)
            scores = processors(seen, model(seen).logits[:, -1].float())
            longer |= {(*text, x): weight * p for x, p in enumerate(scores.double().softmax(-1)[0].tolist())}
        laws = longer
    return laws


def fits(counts: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float], total: int) -> float:
    """p-value of a chi-square test; cells with an expectation below 5 are taken together."""
    if any(law.get(text, 0) == 0 for text in counts):
        return 0.0
    big = [text for text, p in law.items() if p * total >= 5]
    seen, expected = [counts.get(text, 0) for text in big], [law[text] * total for text in big]
    rest = total - sum(expected)
    if rest > 1e-6 * total:
        seen, expected = [*seen, total - sum(seen)], [*expected, rest]
    return float(stats.chisquare(seen, expected, sum_check=False).pvalue)


@pytest.mark.parametrize(
    "strategy", ["ar", "sjd:window=3", *STRATEGIES[6:9], "speculative:drafter=jacobi,rule=rejection,window=4"]
)
def test_sampled_sequences_have_the_law_of_transformers_own_processors(strategy: str):
    """6 ids, 3 tokens, 6,000 sequences. Power: the same counts refuse the law without the penalty, and that of top-p 0.9."""
    model, ids = tiny(vocab_size=6), torch.tensor([[3, 4, 5, 3]])
    for p in model.parameters():
        p.data *= 0.8  # flatter laws: more cells
    options = {
        "do_sample": True,
        "max_new_tokens": 3,
        "top_k": 0,
        "top_p": 0.8,
        "temperature": 0.9,
        "repetition_penalty": 1.5,
    }
    fn, total = generate_fn(strategy), 6000
    drawn = model.generate(ids, custom_generate=fn, num_return_sequences=total, seed=3, pad_token_id=0, **options)
    counts: dict[tuple[int, ...], int] = {}
    for row in drawn[:, ids.shape[1] :].tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1

    def law(penalty: float, top_p: float) -> dict[tuple[int, ...], float]:
        chain = [hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(0.9), hf.TopPLogitsWarper(top_p)]
        return exact_law(model, ids, LogitsProcessorList(chain), 3)

    assert fits(counts, law(1.5, 0.8), total) > 1e-3
    assert fits(counts, law(1.0, 0.8), total) < 1e-9 and fits(counts, law(1.5, 0.9), total) < 1e-9


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_is_that_of_transformers(llama, rows: int, scale: float):
    inputs, other = prompts(rows), prompts(rows, 9, (4, 0, 6))
    plain, ours = both(llama, inputs, guidance_scale=scale, cfg_scale=scale, repetition_penalty=1.3)
    assert torch.equal(ours.sequences, plain)  # without negative ids: the last token of the prompt
    theirs = {"negative_prompt_ids": other["input_ids"], "negative_prompt_attention_mask": other["attention_mask"]}
    mine = {"negative_input_ids": other["input_ids"], "negative_attention_mask": other["attention_mask"]}
    negative, ours = both(llama, inputs, guidance_scale=scale, cfg_scale=scale, **theirs, **mine)
    assert torch.equal(ours.sequences, negative) and not torch.equal(plain, negative)
    without, ours = both(llama, inputs, cfg_scale=1.0)
    assert torch.equal(ours.sequences, without) and not torch.equal(plain, without)


class Stop(StoppingCriteria):
    """Ends rows behind some tokens, or all of them at the n-th call; remembers what it was asked."""

    def __init__(self, tokens: tuple[int, ...] = (), calls: int = 99) -> None:
        self.tokens, self.calls, self.asked = torch.tensor(tokens, dtype=torch.int64), calls, []

    def __call__(self, ids, scores, **kwargs):
        self.asked.append(ids.tolist())
        return torch.isin(ids[:, -1], self.tokens) | (len(self.asked) >= self.calls)


@pytest.mark.parametrize("ends", [None, "some"])
def test_stopping_criteria_are_asked_what_transformers_asks_them(llama, ends: str | None):
    inputs = prompts()
    words = end_of(llama, inputs)
    for tokens, calls in ((words, 99), (words[:1], 99), ((), 5), (words, 11)):
        asked, results = [], []
        for fn in ({}, {"custom_generate": generate_fn("sjd:window=6")}):
            stop = Stop(tuple(tokens), calls)
            options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": words[-1:] if ends else None}
            results.append(llama.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([stop]), **fn))
            asked.append(stop.asked)
        assert torch.equal(*results) and asked[0] == asked[1]
    options = {"custom_generate": generate_fn(), "max_new_tokens": NEW, "return_dict_in_generate": True, "do_sample": False}
    out = llama.generate(**inputs, **options, max_time=0.0)
    assert out.sequences.shape == (3, 8) and out.stats.tokens == [1] * 3


class Streamer:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("stop", [None, 9])
def test_a_streamer_hears_every_token_in_order_and_only_from_generate_fn(llama, stop: int | None):
    inputs, plain, ours, outer = prompts(1), Streamer(), Streamer(), Streamer()
    options = {"max_new_tokens": NEW, "do_sample": False}
    if stop:
        options["max_time"] = 1e9  # a criterion that the loop does not know
    llama.generate(**inputs, **options, streamer=plain)
    llama.generate(**inputs, **options, streamer=outer, custom_generate=generate_fn("sjd:window=6", streamer=ours))
    assert ours.heard == plain.heard and ours.heard[-1] == "end" and len(ours.heard) == NEW + 2
    assert outer.heard == plain.heard[:1]  # transformers gives it the prompt, and does not pass it on


def test_where_guesses_are_easy_passes_are_few_and_the_figures_come_along():
    model = tiny()
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[5]
    plain, ours = both(model, prompts(), "sjd:window=8", max_new_tokens=64)
    assert torch.equal(ours.sequences, plain) and isinstance(ours, GenerateFnOutput)
    assert ours.stats.forward_passes <= 16 and ours.stats.tokens == [64] * 3 and ours.stats.pass_tokens == 8
    tokens = model.generate(**prompts(), custom_generate=generate_fn(), max_new_tokens=4)
    assert isinstance(tokens, torch.Tensor)
    tokens[0, 0] = 3  # a plain tensor, which may be written to


def test_prompts_as_embeddings_with_holes_in_the_mask_several_times_or_under_other_caches(llama):
    inputs = prompts()
    holes = inputs["attention_mask"].clone()
    holes[0, 2:4] = 0
    embeds = {"inputs_embeds": llama.model.embed_tokens(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    places = {**inputs, "position_ids": torch.arange(20, 27).expand(3, -1)}
    short = {"input_ids": inputs["input_ids"][:, -1:].int()}
    caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    for given in (inputs | {"attention_mask": holes}, embeds, inputs | embeds, places, short):
        for more in (*caches, {"max_length": 40, "max_new_tokens": None}):
            if more.get("use_cache", True) or "inputs_embeds" not in given:
                plain, ours = both(llama, given, **more)
                assert torch.equal(ours.sequences, plain), (given.keys(), more)
    options = {"max_new_tokens": 9, "do_sample": True, "seed": 4, "custom_generate": generate_fn()}
    several = llama.generate(**inputs, num_return_sequences=2, **options)
    twice = {name: x.repeat_interleave(2, 0) for name, x in inputs.items()}
    assert torch.equal(several, llama.generate(**twice, **options)) and not torch.equal(several[0], several[1])
