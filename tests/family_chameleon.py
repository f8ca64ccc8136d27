"""Lumina-mGPT, Anole and Chameleon as samples of :mod:`families`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import published_chameleon as published
import reference_chameleon
import reference_vqgan
import torch
from families import CODES, Sample
from published_files import spelled
from torch import Tensor

F16 = {"ch": 32, "mult": (1, 1, 1, 1, 1), "blocks": 1, "z": 16, "dim": 8, "codes": CODES}
F8 = {"ch": 32, "mult": (1, 1, 1, 1), "blocks": 1, "codes": CODES}
LUMINA_SIZES = tuple((32 * h, 32 * w) for h, w in ((1, 1), (1, 3), (3, 1), (2, 2), (4, 3), (3, 5)))


def write_sample(kind: str, folder: Path) -> Sample:
    """A checkpoint of this kind."""
    vq = reference_vqgan.movq_state(**F8) if kind == "lumina-mgpt-2" else reference_vqgan.vqgan_state(**F16)
    writers: dict[str, Any] = {
        "lumina-mgpt": published.write_lumina,
        "lumina-mgpt-2": lambda path, vq_state: published.write_lumina2(path, vq_state=vq_state),
        "anole": published.write_anole,
        "anole-meta": published.write_anole_meta,
        "chameleon": published.write_chameleon,
    }
    state = writers[kind](folder, vq_state=vq)
    if kind == "anole":  # lies among the network's weights, in their dtype
        vq = {key: value.bfloat16() for key, value in vq.items()}
    if kind == "chameleon":
        torch.save({"state_dict": vq}, folder / "vqgan.ckpt")
    parts = {"state": state, "vq": vq, "words": words_of(kind)}
    if kind.startswith("lumina"):
        sizes = LUMINA_SIZES if kind == "lumina-mgpt" else ((32, 64), (64, 32))
        return ChameleonSample(kind, folder, (64, 96), sizes=sizes, parts=parts)
    return ChameleonSample(kind, folder, (64, 64), {"image_size": 64}, parts=parts)


def words_of(kind: str) -> dict[str, int]:
    if kind == "lumina-mgpt-2":
        return published.vocabulary_2()
    return published.vocabulary(CODES, "<reserved08707>" if kind == "anole-meta" else "<image>")


class ChameleonSample(Sample):
    """Of any of the five layouts."""

    def logits(self, prompt: list[int], picture: list[int]) -> Tensor:
        state = {key: value.double() for key, value in self.parts["state"].items()}
        every = reference_chameleon.logits(state, torch.tensor([[*prompt, *picture]]))[0]
        first = self.first_code
        return every[-len(picture) - 1 : -1, first : first + CODES]

    def decode(self, codes: Tensor) -> Tensor:
        return reference_vqgan.decode({key: value.double() for key, value in self.parts["vq"].items()}, codes)

    @property
    def first_code(self) -> int:
        return 155000 if self.kind == "lumina-mgpt-2" else self.parts["words"][published.code_word(0)]

    def streams(self, text: str, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        """The height comes before the width, and the null stream has no words."""
        words: dict[str, int] = self.parts["words"]
        begin, turn = words["<racm3:break>"], words["<reserved08706>"]
        if not self.kind.startswith("lumina"):
            return [words["<s>"], *spelled(words, text), turn, begin], [words["<s>"], begin]
        text = f"Generate an image of {size[1]}x{size[0]} according to the following prompt:\n{text}"
        place = [begin, *(words[f"<reserved{8800 + side // 32:05d}>"] for side in size)]
        first = words["<|endoftext|>"] if self.kind.endswith("2") else words["<s>"]
        return [first, *spelled(words, text), turn, *place], place

    def legal(self, ids: list[int], size: tuple[int, int]) -> bool:
        words = self.parts["words"]
        end, line = words["<eoss>"], words.get("<reserved08799>")
        factor = 8 if self.kind == "lumina-mgpt-2" else 16
        rows, columns = size[0] // factor, size[1] // factor

        def is_code(number: int) -> bool:
            return self.first_code <= number < self.first_code + CODES

        if self.kind.startswith("lumina"):
            for k, number in enumerate(ids):  # k tokens behind the size words so far
                if k + 1 == rows * (columns + 1) + 1:
                    right = number == end
                elif (k + 1) % (columns + 1) == 0:
                    right = number == line
                else:
                    right = is_code(number)
                if not right:
                    return False
            return len(ids) == rows * (columns + 1) + 1
        return len(ids) == rows * columns + 1 and all(is_code(number) for number in ids[:-1]) and ids[-1] == end
