"""MineWorld (arXiv 2504.08388): Minecraft as a plain Llama over frames and the actions between them.

A clip is a frame of codes in raster order, the 11 ids of an action, the next frame, and so on; actions are given, frames are
made. The ids of the loop are the model's own: codes first, then the 70 ids of actions. Published files are read by
:mod:`arsd.models.mineworld_files`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from arsd.decoding.laws import Grammar
from arsd.decoding.row_grammar import RowGrammar
from arsd.errors import InputError
from arsd.models.llamagen import attention_bias
from arsd.models.volume import Volume

SAMPLING = {"top_p": 0.8, "temperature": 1.0}
"""What Microsoft's scripts sample with; there is no guidance."""

BUTTONS = (
    *("use", "attack", "forward", "back", "left", "right", "jump", "sneak", "sprint", "drop", "swapHands", "pickItem"),
    *("inventory", "ESC", *(f"hotbar.{i}" for i in range(1, 10))),
)
"""Names of the buttons in an action, in the order of their ids, counted from the number of codes on."""

CAMERA_BINS, CAMERA_MOST, CAMERA_MU = 21, 90.0, 11.4887
BEGIN, NOTHING, END = (len(BUTTONS) + 2 * CAMERA_BINS + i for i in range(3))
ACTION_IDS = 70
"""Ids of actions; the model has two more than there are meanings."""

_SLOTS = (  # behind the two of the camera: what may stand in the next ones; none of them where two are pressed
    tuple(f"hotbar.{i}" for i in range(1, 10)),
    *(("forward", "back"), ("left", "right"), ("sprint", "sneak"), ("use", "attack"), ("jump",), ("drop", "pickItem")),
)
ACTION_LENGTH = 4 + len(_SLOTS)
"""Ids of an action: begin, the camera's two angles, the slots, end."""


class MineWorldTransformer(ModelMixin, ConfigMixin):
    """Autoregressive transformer over the frames and actions of a clip, a stock ``LlamaForCausalLM``.

    Args:
        vocab_size: codes and ids of actions.
        hidden_size: model width D.
        num_layers: decoder layers.
        num_heads: query heads.
        num_key_value_heads: key/value heads.
        intermediate_size: width F of the gated MLP.
        frames: of a clip, at most.
        rows: of codes of a frame.
        columns: codes per row.
        rope_base: base of the rotary table.
        norm_eps: epsilon of the RMS norms.
        sampling: the sampling options published with the weights (fields of :class:`arsd.decoding.LawConfig`).
        frame_rate: frames per second of the clips that the model was trained on.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["LlamaDecoderLayer"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8192 + ACTION_IDS,
        hidden_size: int = 2048,
        num_layers: int = 20,
        num_heads: int = 32,
        num_key_value_heads: int = 4,
        intermediate_size: int = 8192,
        frames: int = 16,
        rows: int = 14,
        columns: int = 24,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        sampling: dict[str, Any] | None = None,
        frame_rate: float = 6.0,
    ) -> None:
        super().__init__()
        self.lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_key_value_heads,
                intermediate_size=intermediate_size,
                max_position_embeddings=frames * (rows * columns + ACTION_LENGTH),
                rope_parameters={"rope_type": "default", "rope_theta": rope_base},
                rms_norm_eps=norm_eps,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest clip."""
        config: Any = self.config
        return ActionVolume(config.frames, config.rows, config.columns, config.vocab_size - ACTION_IDS).num_tokens

    def forward(self, ids: Tensor) -> Tensor:
        """Teacher-forced logits [B, T, vocab] of tokens 1..T of clips that begin with ``ids`` [B, T]."""
        embeds = self.lm.model.embed_tokens(ids)
        position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        bias = attention_bias(embeds)
        hidden = self.lm.model(inputs_embeds=embeds, attention_mask=bias, position_ids=position_ids, use_cache=False)
        return self.lm.lm_head(hidden.last_hidden_state)

    @classmethod
    def from_single_file(cls, path: str | Path, **options: Any) -> MineWorldTransformer:
        """Load a published ``.ckpt``; see :func:`arsd.models.mineworld_files.load_transformer`."""
        from arsd.models.mineworld_files import load_transformer

        return load_transformer(path, **options)

    def save_single_file(self, path: str | Path, **options: Any) -> None:
        """Write the upstream layout; see :func:`arsd.models.mineworld_files.save_transformer`."""
        from arsd.models.mineworld_files import save_transformer

        save_transformer(self, path, **options)


@dataclass(frozen=True)
class ActionVolume(Volume):
    """The layout of clips with an action behind each frame but the last.

    Args:
        frames: of a clip.
        rows: h, rows of codes of a frame.
        columns: w, codes per row.
        codes: C, codes of the tokenizer.
        actions: [M, frames - 1, 11] ids of the actions of M clips; ``None``: nothing is done in any of them.
    """

    actions: Tensor | None = field(default=None, compare=False, repr=False)
    marks: ClassVar[tuple[str, ...]] = tuple(f"action {i}" for i in range(ACTION_IDS))

    @property
    def frame_length(self) -> int:
        """Tokens from one frame to the next."""
        return self.rows * self.columns + ACTION_LENGTH

    @property
    def num_tokens(self) -> int:
        """N, tokens of a whole clip."""
        return self.frames * self.frame_length - ACTION_LENGTH

    @property
    def vocab(self) -> int:
        """V, codes and ids of actions."""
        return self.codes + ACTION_IDS

    @property
    def places(self) -> Tensor:
        """[t, h, w] the position of each code."""
        inside = torch.arange(self.rows * self.columns).view(self.rows, self.columns)
        return self.frame_length * torch.arange(self.frames)[:, None, None] + inside

    @property
    def tables(self) -> Tensor:
        """[M, N] the ids of the actions where they stand, -1 everywhere else; M = 1 where no actions are given."""
        idle = torch.tensor(encode_action({}, self.codes)).expand(1, self.frames - 1, -1)
        actions = idle if self.actions is None else self.actions
        tables = torch.full((len(actions), self.frames, self.frame_length), -1, device=actions.device)
        tables[:, :-1, -ACTION_LENGTH:] = actions
        return tables.flatten(1)[:, : self.num_tokens]

    @property
    def forced(self) -> dict[int, int]:  # type: ignore[override]
        """``{position: id}`` of the actions of one clip.

        Raises:
            InputError: where there are several clips.
        """
        if len(self.tables) > 1:
            raise InputError(f"{len(self.tables)} clips have actions of their own: ask for one of them")
        return {n: token for n, token in enumerate(self.tables[0].tolist()) if token >= 0}

    def grammar(self, device: torch.device | str = "cpu") -> Grammar:
        """Actions are forced, each clip's own; frames have codes only."""
        allowed = (torch.arange(self.vocab) < self.codes)[None]
        if self.actions is None:
            return Grammar(self.num_tokens, self.vocab, self.forced, allowed, device=device)
        return RowGrammar(self.tables, self.vocab, allowed, device=device)

    def to_codes(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N] to codes [B, t, h, w].

        Raises:
            InputError: for tokens of another size, or with actions at the places of codes.
        """
        codes = super().to_codes(tokens)
        if bool((codes >= self.codes).any()):
            raise InputError("tokens have actions at the places of codes")
        return codes

    def from_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, t', h, w] to the tokens of the first t' < t frames, each with its action, [B, t' * frame_length].

        Raises:
            InputError: for frames of another size, or for actions of another number of clips.
        """
        super().from_codes(codes)
        length, tables = codes.shape[1] * self.frame_length, self.tables.to(codes.device)
        if codes.shape[1] == self.frames or len(tables) not in (1, len(codes)):
            raise InputError(f"{len(tables)} x {self.frames} frames cannot begin with {len(codes)} x {codes.shape[1]}")
        tokens = tables[:, :length].repeat(len(codes) // len(tables), 1)
        tokens[:, self.places[: codes.shape[1]].to(codes.device)] = codes
        return tokens


def encode_action(action: Mapping[str, Any], codes: int) -> list[int]:
    """The ids of an action as MineRL's environment has it, names of pressed buttons to 1 and ``camera`` to two angles.

    Buttons and a camera that are missing count as 0. The camera (degrees down, degrees right) is clipped to 90 degrees and
    falls into one of 21 mu-law bins. Of two buttons that exclude each other none counts.

    Args:
        action: such as ``{"forward": 1, "camera": [0, 15]}``.
        codes: C, codes of the tokenizer.

    Raises:
        InputError: for buttons that there are not, or values that are none.
    """
    unknown = [name for name in action if name not in BUTTONS and name != "camera"]
    if unknown:
        raise InputError(f"an action has no {unknown[0]!r}: it can have camera, {', '.join(BUTTONS)}")
    pressed = {name for name, value in action.items() if name != "camera" and _is_pressed(name, value)}
    camera = [float(angle) for angle in _angles(action.get("camera", (0, 0)))]
    found = [BEGIN, *(len(BUTTONS) + axis * CAMERA_BINS + _bin(angle) for axis, angle in enumerate(camera))]
    for number, names in enumerate(_SLOTS):
        here = [name for name in names if name in pressed]
        one = here[:1] if len(here) == 1 or number == 0 else []  # of the hotbar the first
        found.append(BUTTONS.index(one[0]) if one else NOTHING)
    return [codes + number for number in [*found, END]]


def parse_actions(actions: Any, frames: int, codes: int) -> Tensor:
    """[M, frames - 1, 11] ids of the actions behind every frame but the last.

    Args:
        actions: one action, which is done all the time; a list of actions, for one clip; or a list of such lists. An action
            is a mapping, see :func:`encode_action`, or 11 ids. Whole numbers may come as tensor or array, [S, 11] or
            [M, S, 11]. S is ``frames - 1``; of ``frames`` actions the last is not read.
        frames: of a clip.
        codes: C, codes of the tokenizer.

    Raises:
        InputError: for anything else.
    """
    if isinstance(actions, Mapping):
        return torch.tensor(encode_action(actions, codes)).expand(1, frames - 1, -1).clone()
    if isinstance(actions, Sequence) and not isinstance(actions, str):
        actions = _encoded(actions, codes)
    try:
        ids = torch.as_tensor(actions)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(
            "actions must be mappings, or ids [frames, 11] or [clips, frames, 11], as many of each clip"
        ) from None
    ids = ids[None] if ids.ndim == 2 else ids
    if ids.ndim != 3 or ids.is_floating_point() or ids.dtype == torch.bool or not len(ids) or ids.shape[2] != ACTION_LENGTH:
        raise InputError(f"ids of actions must be whole numbers [frames, {ACTION_LENGTH}], not {tuple(ids.shape)}")
    if ids.shape[1] not in (frames - 1, frames):
        raise InputError(f"{frames} frames take {frames - 1} actions, one behind each but the last, not {ids.shape[1]}")
    if int(ids.min()) < codes or int(ids.max()) >= codes + ACTION_IDS:
        raise InputError(f"ids of actions must lie in {codes}..{codes + ACTION_IDS - 1}")
    return ids[:, : frames - 1].long()


def _encoded(actions: Sequence[Any], codes: int, depth: int = 3) -> list[Any]:
    """Mappings in lists to ids."""
    if not depth:
        raise InputError("actions must be mappings, or ids [frames, 11] or [clips, frames, 11], as many of each clip")
    return [
        encode_action(one, codes)
        if isinstance(one, Mapping)
        else _encoded(one, codes, depth - 1)
        if isinstance(one, list)
        else one
        for one in actions
    ]


def _is_pressed(name: str, value: Any) -> bool:
    if value not in (0, 1):
        raise InputError(f"{name} of an action must be 0 or 1, not {value!r}")
    return bool(value)


def _angles(camera: Any) -> Sequence[float]:
    try:
        angles = [float(angle) for angle in camera]
    except (TypeError, ValueError, OverflowError):
        angles = []
    if len(angles) != 2 or not all(map(math.isfinite, angles)):
        raise InputError(f"camera of an action must be two angles in degrees, not {camera!r}")
    return angles


def _bin(angle: float) -> int:
    """The mu-law bin of an angle in degrees."""
    share = max(-1.0, min(1.0, angle / CAMERA_MOST))
    curved = math.copysign(math.log1p(CAMERA_MU * abs(share)) / math.log1p(CAMERA_MU), share)
    return round((curved + 1) * (CAMERA_BINS - 1) / 2)
