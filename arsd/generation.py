"""``model.generate(**inputs, custom_generate=arsd.generate_fn(strategy))``: any strategy for transformers' causal models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from arsd.decoding import SJD, CounterNoise, DecodeRequest, DecodeStats, DecodingStrategy, Setting, decode, parse_strategy
from arsd.decoding.costs import PassCosts
from arsd.decoding.laws import Grammar
from arsd.decoding.options import number
from arsd.decoding.types import OnRound
from arsd.errors import InputError, StrategyError
from arsd.generation_checks import refuse_model, refuse_options
from arsd.generation_laws import OF_SCORES, DraftLaws, NoNoise, ProcessedLaws
from arsd.generation_parts import ModelTarget, Prompt, Text, layout_of
from arsd.models.attention import own_implementation
from arsd.models.visual import text_config

READ_HERE = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "inputs_embeds")


@dataclass
class GenerateFnOutput(GenerateDecoderOnlyOutput):
    """What ``generate(..., return_dict_in_generate=True)`` gives: ``sequences`` as without it, and the figures of the call.

    Args:
        stats: :class:`arsd.decoding.stats.DecodeStats`.
    """

    stats: DecodeStats | None = None


def generate_fn(
    strategy: DecodingStrategy | str | None = None,
    *,
    streamer: Any = None,
    recheck: float | None = None,
    on_round: OnRound | None = None,
) -> GenerateFn:
    """A callable for ``custom_generate=`` of transformers' ``generate()``, for decoder-only models.

    ``model.generate(**inputs, custom_generate=arsd.generate_fn("sjd:window=16"), max_new_tokens=100)`` gives what plain
    ``generate()`` gives: the same tokens greedily, tokens of the same law with ``do_sample=True`` (under a lossless
    strategy), with left-padded batches, pictures in prompts, logits processors, stopping criteria and end tokens. In
    reduced precision two tokens that are almost equally likely may change places, as they do in plain ``generate()``
    when the batch changes. Further options of that ``generate()`` call are

    - ``seed``: of the sampling noise; without it, one is drawn from torch's global generator. A seed-exact strategy (``ar``,
      ``sjd``) gives the same tokens as every other one with this seed.
    - ``cfg_scale``: guidance ``u + s (c - u)`` of log-probabilities, with an unconditional stream of its own that reads
      ``negative_input_ids`` (with ``negative_attention_mask``), or the last token of the prompt. It stands in the place of
      ``guidance_scale``, whose processor counts its calls.

    With ``return_dict_in_generate=True`` the result is a :class:`GenerateFnOutput`, which has the ``stats`` of the call.
    Logits processors must be functions of the text and the scores: the guesses of a pass are judged at once, and again.
    transformers keeps from such a callable what ``generate()`` is given as ``streamer``, ``assistant_model`` and
    ``tokenizer`` (for ``stop_strings``: pass a ``StopStringCriteria`` among ``stopping_criteria`` instead).

    Args:
        strategy: a decoding strategy without a draft model, or its text as on the command line; ``SJD()`` by default.
        streamer: gets the prompt and then every token as soon as it is committed, one by one (batches of one row only). It
            must be given here, not to ``generate()``.
        recheck: for reduced precision: tokens whose two best scores lie nearer than this are decided again in a pass of one
            token, as plain decoding decides them (:func:`arsd.decoding.recheck.recheck`); seed-exact strategies on chains
            only. 0.1 is far more than bfloat16 rounds; ``None``: near-ties are only counted.
        on_round: called (untimed) with the :class:`arsd.decoding.Round` of each pass; ``True`` stops the call,
            which returns the text so far (with stopping criteria of one's own: as far as they have been asked about it).

    Raises:
        StrategyError: for a strategy that there is not, or that ``recheck`` does not go with.
    """
    if isinstance(strategy, str):
        strategy = parse_strategy(strategy)
    if strategy is not None and not isinstance(strategy, DecodingStrategy):
        raise StrategyError(
            f"generate_fn takes a strategy such as arsd.SJD(window=16), or 'sjd:window=16', not {strategy!r}"
        )
    strategy = strategy or SJD()
    if recheck is not None:
        number("recheck", recheck, 0, otherwise=" or None")
        if not strategy.seed_exact:
            raise StrategyError(f"recheck goes with seed-exact strategies, which {str(strategy)!r} is not")
    return GenerateFn(strategy, streamer, recheck, on_round)


class GenerateFn:
    """See :func:`generate_fn`. It holds no state of a call."""

    def __init__(
        self,
        strategy: DecodingStrategy,
        streamer: Any = None,
        recheck: float | None = None,
        on_round: OnRound | None = None,
    ) -> None:
        self.strategy, self.streamer, self.recheck, self.on_round = strategy, streamer, recheck, on_round

    def __repr__(self) -> str:
        """As it is made."""
        return f"generate_fn({str(self.strategy)!r})"

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        seed: int | None = None,
        cfg_scale: float | None = None,
        negative_input_ids: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """What transformers calls; the options from ``seed`` on are passed on from ``generate()``.

        Returns:
            [M, K + n] prompt and new tokens, padded on the right; or :class:`GenerateFnOutput`.

        Raises:
            InputError: for a model, an option or an input that is not supported.
            StrategyError: for a strategy that needs a draft model.
            NonFiniteLogitsError: when the model returns NaN.
        """
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        num_tokens = min(limits or [generation_config.max_length]) - input_ids.shape[1]
        if num_tokens < 1:
            raise InputError("max_length leaves no room for a new token behind the prompt: set max_new_tokens")
        refuse_model(model, input_ids.shape[1] or model_kwargs["inputs_embeds"].shape[1], num_tokens)
        refuse_options(generation_config, logits_processor, model_kwargs)
        if self.streamer is not None and len(input_ids) > 1:
            raise InputError(f"a streamer takes batches of one row, not {len(input_ids)}")
        seed = _checked_seed(seed, bool(generation_config.do_sample))
        scale = _checked_scale(cfg_scale, negative_input_ids)
        with torch.inference_mode():
            prompt = _prompt_of(model, input_ids, model_kwargs)
            if scale != 1:
                several = generation_config.num_return_sequences or 1
                prompt = _guided(model, prompt, input_ids, negative_input_ids, negative_attention_mask, several)
            device = prompt.embeds.device
            if logits_processor and input_ids.device != device:
                raise InputError(f"the inputs are on {input_ids.device}: move them to the model's device, {device}")
            options = generation_config, logits_processor, stopping_criteria
            tokens, stats = self._decoded(model, prompt, input_ids.to(device).long(), num_tokens, seed, scale, *options)
        sequences = torch.cat([input_ids, tokens.to(input_ids.device)], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateFnOutput(sequences=cast(Any, sequences), stats=stats)

    def _decoded(
        self,
        model: Any,
        prompt: Prompt,
        ids: Tensor,
        num_tokens: int,
        seed: int,
        scale: float,
        config: Any,
        processors: Any,
        criteria: Any,
    ) -> tuple[Tensor, DecodeStats]:
        """New tokens [M, n] and figures."""
        layout, rows, device = layout_of(model, prompt), len(ids), ids.device
        grammar = Grammar(num_tokens, layout.vocab, device=device)
        noise = (CounterNoise if config.do_sample else NoNoise)([seed] * rows, range(rows), device)
        setting = Setting(
            rows,
            num_tokens,
            0,
            grammar,
            noise,
            device,
            laws=DraftLaws(processors, grammar, not config.do_sample, scale),
            draft_model=self._no_draft_model,
            prompt=_known_ids(ids, prompt),
            kernel=own_implementation(text_config(model)),
            chains_only=self.recheck is not None or any(type(p) not in OF_SCORES for p in processors),
            costs=PassCosts.of_model(model, rows * len(prompt.embeds), prompt.embeds.shape[2]),
        )
        parts = self.strategy.build(setting)
        text = Text(ids, num_tokens, parts.pass_tokens)
        laws = ProcessedLaws(processors, text, grammar, not config.do_sample, scale)
        if laws.reading and getattr(parts.drafter, "tree", None) is not None:
            raise StrategyError(f"logits processors that read the text go with chains of guesses, not with {self.strategy}")
        target = ModelTarget(model, layout, prompt, num_tokens, parts.pass_tokens, text)
        watch = self._watch(text, config, criteria)
        ends = {int(x) for c in criteria if type(c) is EosTokenCriteria for x in c.eos_token_id.flatten()}
        if self.recheck is not None and getattr(parts.drafter, "tree", None) is not None:
            raise StrategyError(f"recheck goes with chains of guesses, not with the trees of {self.strategy}")
        request = DecodeRequest(
            num_tokens, end_tokens=sorted(ends), recheck=self.recheck, on_commit=watch, on_round=self.on_round
        )
        result = decode(target, parts, laws, noise, request, rows)
        tokens, result.stats.tokens = watch.finished(result.tokens, result.stats.tokens)
        if config.do_sample and any(bool(laws.nothing[b, :n].any()) for b, n in enumerate(result.stats.tokens)):
            raise InputError("the logits processors left no token to draw from: loosen them, or decode greedily")
        if self.streamer is not None:
            self.streamer.end()
        return tokens, result.stats

    def _watch(self, text: Text, config: Any, criteria: Any) -> Watch:
        filler = None
        if any(hasattr(c, "eos_token_id") for c in criteria):
            filler = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        known = all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in criteria)
        return Watch(text, None if known else criteria, filler, self._put(text.ids[:, : text.known]))

    def _put(self, ids: Tensor) -> Callable[[int], None] | None:
        """What sends a token to the streamer, which has had the prompt then."""
        if self.streamer is None:
            return None

        def put(tokens: list[list[int]] | list[int]) -> None:
            with torch.inference_mode(False):
                self.streamer.put(torch.tensor(tokens))

        put(ids.tolist())
        return lambda token: put([token])

    def _no_draft_model(self, window: int) -> Any:
        raise StrategyError(f"{self.strategy} needs a draft model, and generate_fn has none: use sjd, speculative or ar")


class Watch:
    """Hears of every commit: tells the text, asks the stopping criteria, feeds the streamer.

    Criteria are asked exactly as transformers asks them: once for every length, in order, with the whole batch, finished
    rows padded. That a row ends there is known to the rest of the batch only when all are finished.

    Args:
        text: of the call.
        criteria: all of transformers' stopping criteria, or ``None`` when the loop itself knows of all of them.
        pad: id behind the end of a row; ``None``: rows go on until all are finished, as transformers' do without an EOS id.
        put: takes the tokens of row 0 one by one, or ``None``.
    """

    def __init__(self, text: Text, criteria: Any | None, pad: int | None, put: Callable[[int], None] | None = None) -> None:
        self.text, self.criteria, self.pad, self.put = text, criteria, pad, put
        self.seen, self.ends = 0, [0] * len(text.ids)  # lengths asked about; where rows ended, 0: not yet

    def __call__(self, new: int, tokens: Tensor) -> bool:
        """See ``on_commit`` of :class:`arsd.decoding.types.DecodeRequest`."""
        self.text.committed(tokens)
        if self.criteria is None and self.put is None:
            return False
        known, before = self.text.lengths.tolist(), self.seen
        if self.criteria is None:
            self.seen = known[0]
        while self.criteria is not None and self._ready(known):
            self.seen += 1
            done = self.criteria(self.asked(tokens), None).tolist()
            self.ends = [n or (self.seen if over else 0) for n, over in zip(self.ends, done, strict=True)]
        if self.put is not None:
            for token in tokens[0, before : self.seen].tolist():
                self.put(token)
        return self.criteria is not None and all(self.ends)

    def finished(self, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """What the call returns of the ``tokens`` [M, N] and ``lengths`` of the loop: [M, n], and tokens of each row."""
        if self.criteria is None:
            self.seen, self.ends = max(lengths), list(lengths)
        own = self.criteria is None or self.pad is not None  # whether rows end by themselves
        return self.asked(tokens)[:, self.text.known :], [n if own and n else self.seen for n in self.ends]

    def asked(self, tokens: Tensor) -> Tensor:
        """[M, K + n] prompt and the first n = ``seen`` of the ``tokens`` [M, N], padded where rows ended."""
        tokens = tokens[:, : self.seen].clone()
        if self.pad is not None:
            for b, n in enumerate(self.ends):
                if n:
                    tokens[b, n:] = self.pad
        return torch.cat([self.text.ids[:, : self.text.known], tokens], dim=1)

    def _ready(self, known: list[int]) -> bool:
        waiting = [n for n, end in zip(known, self.ends, strict=True) if self.pad is None or not end]
        return not all(self.ends) and min(waiting) > self.seen


def _prompt_of(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Prompt:
    """What ``generate()`` hands over as the model's input."""
    embeds, ids = model_kwargs.get("inputs_embeds"), None
    if embeds is None:
        ids = input_ids.to(model.device)
        embeds = model.get_input_embeddings()(ids)
    rows, length, mask = len(embeds), embeds.shape[1], model_kwargs.get("attention_mask")
    padding = torch.zeros(rows, length, dtype=torch.bool, device=embeds.device)
    if mask is not None:
        if tuple(mask.shape) != (rows, length):
            raise InputError(f"attention_mask must be [{rows}, {length}] as the prompt, not {list(mask.shape)}")
        padding = (mask == 0).to(embeds.device)
    positions = model_kwargs.get("position_ids")
    positions = _plain_positions(padding) if positions is None else positions.to(embeds.device)
    extras = {k: v for k, v in model_kwargs.items() if k not in READ_HERE and v is not None and not _is_nothing(v)}
    positions = positions.expand(*positions.shape[:-2], rows, length)
    return Prompt(embeds[None], _checked_padding(padding)[None], positions, None if ids is None else ids[None], extras)


def _known_ids(ids: Tensor, prompt: Prompt) -> Tensor:
    """[M, K] ids of the prompt, -1 where it is padded."""
    hidden = prompt.padding[0, :, prompt.padding.shape[2] - ids.shape[1] :] if ids.shape[1] else ids.bool()
    return ids.masked_fill(hidden, -1) if hidden.shape == ids.shape else ids


def _is_nothing(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple)) and not value or isinstance(value, bool)


def _plain_positions(padding: Tensor) -> Tensor:
    return ((~padding).long().cumsum(-1) - 1).clamp_min(0)


def _checked_padding(padding: Tensor) -> Tensor:
    if bool(padding[:, -1].any()):
        raise InputError("the last token of a prompt is masked: pad on the left (padding_side='left')")
    return padding


def _guided(model: Any, prompt: Prompt, input_ids: Tensor, ids: Tensor | None, mask: Tensor | None, several: int) -> Prompt:
    """The prompt with the unconditional stream behind it, both padded to the longer one; ``several`` rows per prompt."""
    rows, device = prompt.embeds.shape[1], prompt.embeds.device
    if ids is None and not input_ids.shape[1]:
        raise InputError("cfg_scale with inputs_embeds alone needs negative_input_ids")
    ids = input_ids[:, -1:] if ids is None else ids
    mask = torch.ones_like(ids) if mask is None else mask
    if ids.ndim != 2 or not ids.numel() or len(ids) not in (1, rows // several, rows) or mask.shape != ids.shape:
        raise InputError(
            f"negative_input_ids must be [{rows // several}, length] (or one row for all), and its mask as well, not "
            f"{list(ids.shape)} and {list(mask.shape)}"
        )
    ids, hidden = (x.repeat_interleave(rows // len(x), 0).to(device) for x in (ids, mask == 0))
    told = _plain_positions(_checked_padding(hidden)).expand(*prompt.positions.shape[:-1], -1)
    other = Prompt(model.get_input_embeddings()(ids)[None], hidden[None], told, ids[None])
    longest = max(prompt.embeds.shape[2], ids.shape[1])
    c, u = (_padded(one, longest - one.embeds.shape[2]) for one in (prompt, other))
    both = None if c.ids is None or u.ids is None else torch.cat([c.ids, u.ids])
    embeds = torch.cat([c.embeds, u.embeds.to(c.embeds.dtype)])
    return Prompt(embeds, torch.cat([c.padding, u.padding]), torch.cat([c.positions, u.positions], -2), both, c.extras)


def _padded(prompt: Prompt, more: int) -> Prompt:
    """The prompt with ``more`` slots of padding on its left."""
    ids = None if prompt.ids is None else pad(prompt.ids, (more, 0))
    embeds, padding = pad(prompt.embeds, (0, 0, more, 0)), pad(prompt.padding, (more, 0), value=True)
    return Prompt(embeds, padding, pad(prompt.positions, (more, 0)), ids, prompt.extras)


def _checked_seed(seed: int | None, sampling: bool) -> int:
    """The seed of the noise. Greedy decoding needs none, and leaves torch's generator alone."""
    if seed is None:
        return int(torch.randint(2**63 - 1, ())) if sampling else 0
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be a whole number, not {seed!r}")
    return seed


def _checked_scale(cfg_scale: float | None, negative_input_ids: Tensor | None) -> float:
    if cfg_scale is None and negative_input_ids is not None:
        raise InputError("negative_input_ids are for guidance: pass cfg_scale, too")
    scale = 1 if cfg_scale is None else cfg_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise InputError(f"cfg_scale must be a number, not {cfg_scale!r}")
    return float(scale)
