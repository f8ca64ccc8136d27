"""What :func:`arsd.generate_fn` is asked for and cannot give: said before anything is decoded."""

from __future__ import annotations

import inspect
import math
from typing import Any

from transformers.generation import logits_process as hf
from transformers.generation.configuration_utils import GenerationMode

from arsd.errors import InputError
from arsd.models.attention import own_implementation

STATEFUL = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.ClassifierFreeGuidanceLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor,
    hf.WhisperNoSpeechDetection,
    hf.DiaClassifierFreeGuidanceLogitsProcessor,
    hf.DiaEOSDelayPatternLogitsProcessor,
)
NEEDED = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")  # arguments of the model's forward


def refuse_options(config: Any, processors: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise InputError for what ``generate()`` is asked for and this is no way to get."""
    if config.guidance_scale not in (None, 1):
        raise InputError(
            f"guidance_scale counts its calls, which guesses upset: pass cfg_scale={config.guidance_scale} instead "
            "(with negative_input_ids), and guidance_scale=None"
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(f"generate_fn decodes greedily or by sampling, not by {mode.value}: leave out the options of that")
    for processor in processors:
        if isinstance(processor, STATEFUL):
            raise InputError(
                f"{type(processor).__name__} counts its calls, which guesses upset: leave it out (for guidance: cfg_scale)"
            )
    wanted = [x for x in ("scores", "logits", "attentions", "hidden_states") if getattr(config, f"output_{x}")]
    if wanted and config.return_dict_in_generate:
        raise InputError(f"output_{wanted[0]}=True is not supported: a pass computes guesses too; the result has stats")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise InputError("past_key_values holds tokens already: pass the whole text as input_ids, without a cache")


def refuse_model(model: Any, read: int, num_tokens: int) -> None:
    """Raise InputError for a model whose state cannot be rolled back row by row, or whose text would outgrow its window."""
    name, config, total = type(model).__name__, model.config.get_text_config(decoder=True), read + num_tokens
    if model.config.is_encoder_decoder:
        raise InputError(f"{name} has an encoder: generate_fn is for decoder-only models")
    types = set(getattr(config, "layer_types", None) or ())
    other = types - {"full_attention", "sliding_attention", "chunked_attention"}
    missing = [x for x in NEEDED if x not in inspect.signature(model.forward).parameters]
    if model._is_stateful or other or missing:
        why = f"layers of {', '.join(sorted(other))}" if other else f"no argument {missing[0]}" if missing else "a state"
        raise InputError(f"{name} cannot take guesses back (it has {why}): generate_fn needs attention over a plain cache")
    kernel = own_implementation(config)
    if kernel not in ("sdpa", "eager"):
        raise InputError(f"attn_implementation={kernel!r} takes no mask of rows: use 'sdpa' or 'eager'")
    windows = []
    if not types or "sliding_attention" in types:
        windows.append(getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None)
    if "chunked_attention" in types:
        windows.append(getattr(config, "attention_chunk_size", None))
    if total > min((w for w in windows if w), default=math.inf):
        raise InputError(
            f"prompt and new tokens may take {total} slots, more than the attention window of {name} "
            f"({min(w for w in windows if w)}): lower max_new_tokens"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for table in [rope, *(x for x in rope.values() if isinstance(x, dict))]:
        original = table.get("original_max_position_embeddings") or config.max_position_embeddings
        if table.get("rope_type") in ("dynamic", "longrope") and read - 1 <= original < total:
            raise InputError(
                f"{name} turns its positions otherwise beyond {original} tokens, and this text may reach {total}: "
                "lower max_new_tokens"
            )
