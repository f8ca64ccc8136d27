"""Decoders of others on this library's models: transformers' ``generate``, and SJD as its authors released it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import now
from torch import Tensor
from torch.nn import functional as F
from transformers import CompileConfig, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

import arsd
from arsd.decoding import LawConfig
from arsd.decoding.stats import Stopwatch


def scores_of(logits: Tensor, config: LawConfig) -> Tensor:
    """Guidance, temperature and top-k: logits [S, ..., V] of the streams to one set of scores [..., V], -inf where cut.

    Raises:
        ValueError: for options that the rivals do not know.
    """
    if config.guidance_interval >= 0 or config.top_p < 1 or config.temperature == 0:
        raise ValueError("the rivals know guidance, temperature > 0 and top-k only")
    scores = logits[0] if len(logits) == 1 else torch.lerp(logits[1], logits[0], config.guidance_scale)
    if config.temperature != 1:
        scores = scores / config.temperature
    if 0 < config.top_k < scores.shape[-1]:
        least = scores.topk(config.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


# -- transformers' generate


class SharedDraw(LogitsProcessor):
    """Guidance and sampling of both streams in one processor, so that ``generate`` runs one batched pass per token.

    Left to itself ``do_sample`` draws a token for each of the 2B rows, and the two streams of a picture would part. Here the
    B guided laws race: argmax(scores + Gumbel noise) is a draw from their softmax. Both halves of the batch get the same
    noisy scores, and ``generate``'s greedy arg-max takes the same token twice. Of the honest ways this is the cheapest: no
    softmax, no multinomial, no mask to force the token, and the filters run on B rows, not 2B.

    Args:
        config: guidance, temperature, top-k.
        streams: 1 or 2.
        generator: of the noise.
        gumbel: position -> noise [B, V] in place of the generator's, for tests.
    """

    def __init__(
        self,
        config: LawConfig,
        streams: int,
        generator: torch.Generator,
        gumbel: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.config, self.streams, self.generator, self.gumbel = config, streams, generator, gumbel

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [S * B, V] of the next token; ``input_ids`` are the tokens so far."""
        kept = scores_of(scores.unflatten(0, (self.streams, -1)), self.config)
        if self.gumbel is not None:
            noisy = kept + self.gumbel(input_ids.shape[1])
        else:
            noisy = kept - torch.empty_like(kept).exponential_(generator=self.generator).log_()
        return noisy.repeat(self.streams, 1)


def without_shared_padding(condition: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [S * B, P, D], mask [S * B, P] and position ids of the condition, less the slots that are padding in every row.

    ``generate`` counts positions from the first real token; the model wants absolute slots, so they are always given.
    """
    rows = condition.flatten(0, 1)
    keep = torch.ones(rows.shape[:2], dtype=torch.int64, device=rows.device)
    if padding is not None:
        keep = (~padding).flatten(0, 1).long()
    first = int(keep.amax(0).argmax())
    positions = torch.arange(first, rows.shape[1], device=rows.device).expand(len(rows), -1)
    return rows[:, first:], keep[:, first:], positions


@torch.inference_mode()
def hf_generate(
    transformer: arsd.LlamaGenTransformer,
    condition: Tensor,
    padding: Tensor | None,
    num_tokens: int,
    config: LawConfig,
    cache: str = "dynamic",
    seed: int = 0,
    compiled: bool = False,
    cache_slots: int | None = None,
    gumbel: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor, float]:
    """Stock ``LlamaForCausalLM.generate`` as an expert would run it: tokens [B, N] and the seconds of the call.

    Args:
        transformer: the model.
        condition: [S, B, P, D] embedded condition; stream 1 (if any) is the unconditional one.
        padding: [S, B, P], True at padded slots, which come first.
        num_tokens: N.
        config: guidance, temperature, top-k.
        cache: ``dynamic`` or ``static``.
        seed: of the sampling noise.
        compiled: let ``generate`` compile the decoding pass (static cache only; it does so by default on an accelerator).
        cache_slots: image tokens that a static cache has room for; N when ``None``.
        gumbel: see :class:`SharedDraw`.
    """
    streams, batch = condition.shape[:2]
    start = now(condition.device)
    rows, mask, positions = without_shared_padding(condition, padding)
    generator = torch.Generator(rows.device).manual_seed(seed)
    draw = SharedDraw(config, streams, generator, gumbel)
    compiling = CompileConfig()
    compiling._compile_all_devices = True
    settings = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=False,
        cache_implementation="static" if cache == "static" else None,
        max_cache_len=rows.shape[1] + (cache_slots or num_tokens) if cache == "static" else None,
        disable_compile=not compiled,
        compile_config=compiling if compiled else None,
    )
    tokens = transformer.lm.generate(
        inputs_embeds=rows,
        attention_mask=mask,
        position_ids=positions,
        generation_config=settings,
        logits_processor=LogitsProcessorList([draw]),
    )
    seconds = now(rows.device) - start
    return tokens[:batch].clone(), seconds


# -- SJD as released


def walk(p: Tensor, q: Tensor, guesses: Tensor, drawn: Tensor) -> tuple[int, Tensor]:
    """How many guesses are taken and the token behind them [1]: left to right, one read of the device per slot.

    ``p`` [W, V] are the target laws, ``q`` [W - 1, V] the stored draft laws, ``drawn`` [W] fresh draws from ``p``. A uniform
    number is drawn for every token of the vocabulary, where one per slot would do.
    """
    uniform = torch.rand_like(q)
    for slot, guess in enumerate(guesses):
        if bool(uniform[slot, guess] >= p[slot, guess] / q[slot, guess]):
            residual = (p[slot] - q[slot]).clamp(min=0)
            return slot, torch.multinomial(residual / residual.sum(), 1)
    return len(guesses), drawn[-1:]


def dense_mask(rows: int, past: int, new: int, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [rows, 1, new, past + new], built from nothing in every pass; ``hidden`` [rows, P] are padded slots."""
    lowest = torch.finfo(dtype).min
    mask = torch.full((new, past + new), lowest, dtype=dtype, device=hidden.device).triu(past + 1)
    mask = mask[None, None].repeat(rows, 1, 1, 1)
    mask[..., : hidden.shape[1]].masked_fill_(hidden[:, None, None], lowest)
    return mask


def refill(guesses: Tensor, q: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Guesses [size] and their laws [size, V]; slots that enter hold random ids, and their law is a point mass."""
    guesses, q = guesses[:size], q[:size]
    fresh = torch.randint(q.shape[1], (size - len(guesses),), device=q.device)
    return torch.cat([guesses, fresh]), torch.cat([q, F.one_hot(fresh, q.shape[1]).to(q.dtype)])


@torch.inference_mode()
def released_sjd(
    transformer: arsd.LlamaGenTransformer,
    condition: Tensor,
    padding: Tensor | None,
    num_tokens: int,
    config: LawConfig,
    window: int = 16,
    seed: int = 0,
    parts: dict[str, float] | None = None,
) -> tuple[Tensor, int, float]:
    """Speculative Jacobi Decoding (arXiv 2410.01699) in the manner of its release: tokens [1, N], passes, seconds.

    One picture (and its guidance stream); a cache that is cut and concatenated in every pass; a dense mask built anew; a
    loop over slots that waits for the device in each; draft laws stored in full; the global random generator. The first
    token comes from the pass over the condition. In one thing it is better than the release: the window is clipped exactly
    at the end, where the release decodes the last window + 2 tokens one by one.

    Args:
        transformer: the model.
        condition: [S, 1, P, D], see :func:`hf_generate`.
        padding: [S, 1, P].
        num_tokens: N.
        config: guidance, temperature, top-k.
        window: tokens per pass: the last committed one and the guesses.
        seed: of torch's global generator.
        parts: seconds of the forward passes are added under ``forward``.

    Raises:
        ValueError: for more than one picture: the release is exact for one only.
    """
    streams, batch, prefix = condition.shape[:3]
    if batch != 1:
        raise ValueError("released SJD decodes one picture at a time")
    start, rows = now(condition.device), condition.flatten(0, 1)
    hidden = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device) if padding is None else padding.flatten(0, 1)
    watch = Stopwatch(parts if parts is not None else {"forward": 0.0}, rows.device)
    cache, past, passes = DynamicCache(), 0, 0

    def law(**inputs: Tensor) -> Tensor:
        nonlocal past, passes
        new = next(iter(inputs.values())).shape[1]
        positions = torch.arange(past, past + new, device=rows.device).expand(streams, -1)
        mask = dense_mask(streams, past, new, hidden, rows.dtype)
        with watch("forward"):
            out = transformer.lm(
                **inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        past, passes = past + new, passes + 1
        return torch.softmax(scores_of(out.logits.float(), config), dim=-1)

    torch.manual_seed(seed)
    p = law(inputs_embeds=rows)
    tokens = torch.multinomial(p[-1:], 1)[0]
    guesses, q = tokens[:0], p[:0]
    while len(tokens) < num_tokens:
        width = min(window, num_tokens - len(tokens))
        guesses, q = refill(guesses, q, width - 1)
        p = law(input_ids=torch.cat([tokens[-1:], guesses]).repeat(streams, 1))
        drawn = torch.multinomial(p, 1)[:, 0]  # of every slot, before any is judged
        taken, token = walk(p, q, guesses, drawn)
        tokens = torch.cat([tokens, guesses[:taken], token])
        if taken + 1 < width:
            cache.crop(taken + 1 - width)
            past = prefix + len(tokens) - 1
        guesses, q = drawn[taken + 1 :], p[taken + 1 :].clone()
    seconds = now(rows.device) - start
    watch.close()
    return tokens[None].clone(), passes, seconds
