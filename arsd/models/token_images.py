"""Families whose image codes are words of the model's own vocabulary: what the decoding of their pictures must know.

A family is one :class:`TokenProtocol`: prompts of both streams, the layout of a picture, and which word is which code. It
holds no weights; :class:`CodeEmbedding` and :class:`CodeHead` are how the loop's small vocabulary meets the model's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arsd.errors import CheckpointError, InputError
from arsd.models.raster import Raster


class TokenProtocol(ABC):
    """What a family of models does with words and codes.

    Attributes:
        code_ids: [C] the model's id of each code.
        mark_ids: the model's id of each structure token, in the order of the loop's ids (see :class:`Raster`).
        sampling: the sampling options published with the models (fields of :class:`arsd.decoding.LawConfig`).
        size: default side of a picture in pixels.
        negative_prompt: the words of the unconditional stream where it has some, which a call may replace; else ``None``.
    """

    negative_prompt: str | None = None
    code_ids: Tensor
    mark_ids: dict[str, int]
    sampling: dict[str, float]
    size: int

    @abstractmethod
    def raster(self, height: int, width: int) -> Raster:
        """The layout of a picture of ``height`` x ``width`` pixels.

        Raises:
            InputError: for a size that the models cannot make.
        """

    def advice(self, height: int, width: int) -> str:
        """What a user should know of a size that the models can make, if anything."""
        return ""

    @abstractmethod
    def prompt_ids(self, prompt: str, height: int, width: int, images: Sequence[Tensor] = ()) -> list[int]:
        """Ids of the conditional stream, up to the last one before the first code.

        Args:
            prompt: the text.
            height: of the picture that is made, in pixels.
            width: likewise.
            images: codes [h, w] of the pictures that the prompt speaks of.
        """

    @abstractmethod
    def null_ids(
        self, height: int, width: int, prompt_ids: Sequence[int] = (), negative_prompt: str | None = None
    ) -> list[int]:
        """Ids of the unconditional stream.

        Args:
            height: of the picture that is made, in pixels.
            width: likewise.
            prompt_ids: those of the conditional stream, which some families blank out.
            negative_prompt: words instead of :attr:`negative_prompt`, where the family has any.
        """

    def image_only_ids(self, height: int, width: int, images: Sequence[Tensor]) -> list[int]:
        """Ids of the stream that has the pictures of a prompt without its text.

        Raises:
            InputError: for a family whose prompts hold no pictures.
        """
        raise InputError("prompts of this model hold no pictures: leave out prompt_images")

    @property
    def local_ids(self) -> Tensor:
        """[V] the model's id of each of the loop's ids."""
        return torch.cat([self.code_ids, torch.tensor(list(self.mark_ids.values()), dtype=torch.int64)])

    def codebook(self, vectors: Tensor) -> Tensor:
        """[V, c] code vectors [C, c], and for each mark a vector that lies far away from all of them."""
        return with_marks(vectors, len(self.mark_ids))


def with_marks(vectors: Tensor, marks: int) -> Tensor:
    """[C + marks, c] code vectors [C, c], and for each mark a vector that lies far away from all of them and the others."""
    far = 1e3 * (1 + vectors.abs().amax()) * torch.arange(1, 1 + marks, device=vectors.device)
    return torch.cat([vectors, far[:, None].to(vectors).expand(-1, vectors.shape[1])])


class CodeEmbedding(nn.Module):
    """The loop's ids to the embeddings of the model's own.

    Args:
        embed: the model's embedding; it stays where it is (and keeps the hooks that move it).
        ids: [V] the model's id of each of the loop's ids.
    """

    ids: Tensor

    def __init__(self, embed: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.__dict__["embed"] = embed  # not a submodule: it belongs to the model
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        return self.__dict__["embed"](self.ids[tokens])


class CodeHead(nn.Module):
    """Logits of the codes only: the rows of the model's head that belong to them.

    Marks get the logit 0. It is never used: a grammar forces them, or excludes them.

    Args:
        head: the model's head. Where its weights are at hand, only the rows of the codes are multiplied (a view of them, if
            the ids of the codes are consecutive); where hooks bring them for each pass, the whole head is used.
        ids: [C] the model's ids of the codes.
        marks: how many marks there are.
        device: where it computes.
    """

    def __init__(self, head: nn.Linear, ids: Tensor, marks: int, device: torch.device) -> None:
        super().__init__()
        self.out_features = len(ids) + marks
        self.marks, self.ids = marks, ids.to(device)
        self.__dict__["head"] = head
        hooked = any(getattr(head, name, None) is not None for name in ("_hf_hook", "_diffusers_hook"))
        self.rows: Tensor | None = None
        if not hooked and head.weight.device.type != "meta":
            first, last = int(ids[0]), int(ids[-1]) + 1
            consecutive = torch.equal(ids.cpu(), torch.arange(first, last))
            self.rows = (head.weight[first:last] if consecutive else head.weight[ids.to(head.weight.device)]).to(device)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        rows = self.rows
        if rows is None:
            every = self.__dict__["head"](hidden)
            logits = every[..., self.ids.to(every.device)].to(self.ids.device)
        else:
            logits = F.linear(hidden.to(rows.device), rows)
        return F.pad(logits, (0, self.marks))


class BroughtTo(nn.Module):
    """A module of a network whose layers may lie on several devices; what it gives comes to one of them.

    Args:
        device: which.
        module: computes where its weights are.
        out_features: as of a linear layer, where it is a head.
    """

    def __init__(self, device: torch.device, module: nn.Module, out_features: int = 0) -> None:
        super().__init__()
        self.device, self.out_features = device, out_features
        self.__dict__["module"] = module

    def forward(self, value: Tensor) -> Tensor:
        """What the module gives."""
        found: Tensor = self.__dict__["module"](value)
        return found.to(self.device)


def word_ids(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """The ids of special words, by name.

    Raises:
        CheckpointError: for a tokenizer that lacks one: it is another model's.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise CheckpointError(f"the tokenizer has no {', '.join(missing[:5])}: it belongs to another model")
    return [int(vocabulary[name]) for name in names]


def chameleon_code_ids(tokenizer: Any) -> Tensor | None:
    """[C] the ids of Chameleon's codes, which its vocabulary names ``IMGIMG...Z``; ``None`` where it has no such words.

    The letters A to J between stand for the digits of the code.

    Raises:
        CheckpointError: when codes are missing between others.
    """
    found = {}
    for word, number in tokenizer.get_vocab().items():
        if word.startswith("IMGIMG") and word.endswith("Z"):
            digits = word[len("IMGIMG") : -1]
            if digits and all("A" <= letter <= "J" for letter in digits):
                found[int("".join(str(ord(letter) - ord("A")) for letter in digits))] = int(number)
    if not found:
        return None
    if set(found) != set(range(len(found))):
        raise CheckpointError(f"the tokenizer names {len(found)} codes, but not all from 0 to {len(found) - 1}")
    return torch.tensor([found[code] for code in range(len(found))])
