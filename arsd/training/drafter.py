"""Stage ``drafter``: train an EAGLE drafter for a text-to-image LlamaGen pipeline on pictures that the target draws itself.

Features are computed on the fly and never stored: a training step runs the frozen target once over its own pictures, with
and without caption. The drafter learns on what it will meet: samples of the guided law at the pipeline's own settings.
Guesses behind the first one read predicted features, so these are trained too: the drafter runs over every picture
several times, each time on its own predictions (training-time test of EAGLE-3, arXiv 2503.01840).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arsd.decoding import Laws
from arsd.devices import has_fast_bfloat16
from arsd.errors import DataError
from arsd.models.eagle import EagleDrafter
from arsd.models.llamagen import attention_bias
from arsd.provenance import model_hash, weights_hash
from arsd.run_folders import claim_folder
from arsd.training.common import Muon, Run, save_atomically
from arsd.training.data import held_out_captions, training_captions

GENERATION_BATCH = 32
GENERATION_CHUNK = 256  # pictures between two saves
HELD_OUT_PICTURES = 64


@dataclass(frozen=True)
class DrafterLoss:
    """Weights of the loss of one predicted slot.

    Args:
        feature: SmoothL1 of the predicted feature (EAGLE: 1).
        cross_entropy: of the drafter's law against the target's (EAGLE: 0.1).
        acceptance: 1 - TV(p, q) is the probability of acceptance; its complement is the loss.
        guided: take the laws behind guidance (``u + s (c - u)``) instead of those of each stream.
        depth: runs over a picture, each on the features that the one before it predicted.
        decay: weight of each run against the one before it.
    """

    feature: float = 1.0
    cross_entropy: float = 0.1
    acceptance: float = 1.0
    guided: bool = True
    depth: int = 3
    decay: float = 0.8

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            DataError: for a negative weight or a depth below 1.
        """
        weights = (self.feature, self.cross_entropy, self.acceptance, self.decay)
        if min(weights) < 0 or not any(weights[:3]) or self.depth < 1:
            raise DataError(f"loss weights must be >= 0 and not all 0, depth at least 1: {self}")


class _Grown:
    """A cache of one layer whose keys grow by one run over the picture at a time."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values


def run_mask(bias: Tensor, run: int) -> Tensor:
    """Additive mask [B, 1, T, (run + 1) T] of run ``run`` over a picture.

    Slot t reads what a drafter has at hand when it makes its guess number ``run``: slots up to t - run with true features
    (run 0), and slot t - run + i as run i made it.

    Args:
        bias: [B, 1, T, T], the target's own mask.
        run: 0 for the run on true features.
    """
    length = bias.shape[-1]
    behind = torch.arange(length, device=bias.device)[:, None] - torch.arange(length, device=bias.device)
    lowest = torch.finfo(bias.dtype).min
    parts = [bias.masked_fill(behind < run, lowest)]
    for i in range(1, run + 1):
        parts.append(bias.masked_fill(behind != run - i, lowest))
    return torch.cat(parts, dim=-1)


class DrafterTask:
    """The frozen target of a pipeline, and the loss of a drafter on its pictures.

    Args:
        pipe: a text-to-image LlamaGen pipeline.
        loss: weights.
    """

    def __init__(self, pipe: Any, loss: DrafterLoss) -> None:
        self.pipe, self.loss = pipe, loss
        self.transformer, self.lm = pipe.transformer, pipe.transformer.lm
        config = pipe.law_config({})
        self.laws, self.streams = Laws(config, pipe.make_grammar()), 1 if config.guidance_scale == 1 else 2

    @torch.no_grad()
    def teach(self, captions: list[str], ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the drafter reads and should predict, streams one after another.

        Args:
            captions: B captions.
            ids: [B, N] their pictures.

        Returns:
            Embeddings [S * B, T, D] of the condition and all tokens but the last, the target's features [S * B, T, D], and
            the mask [S * B, 1, T, T].
        """
        conditions = self.pipe.encode_inputs(captions, guided=self.streams == 2)
        condition, padding = conditions.condition.flatten(0, 1), conditions.padding
        tokens = self.lm.model.embed_tokens(ids[:, :-1]).repeat(self.streams, 1, 1)
        embeds = torch.cat([condition, tokens], dim=1)
        keep = None if padding is None else ~padding.flatten(0, 1)
        bias = attention_bias(embeds, keep)
        places = torch.arange(embeds.shape[1], device=embeds.device)[None]
        out = self.lm.model(inputs_embeds=embeds, attention_mask=bias, position_ids=places, use_cache=False)
        return embeds, out.last_hidden_state, bias

    def __call__(self, drafter: nn.Module, embeds: Tensor, features: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Loss, and the acceptance probability 1 - TV(p, q) of each run, averaged over the picture's tokens."""
        first = embeds.shape[1] - self.transformer.num_tokens  # the slot whose feature gives the first token's law
        with torch.no_grad():
            p = self._law(features[:, first:])
        losses, accepted = [], []
        for run, guessed in enumerate(self.runs(drafter, embeds, features, bias)):
            q = self._law(guessed[:, first:])
            accepted.append(torch.minimum(p.exp(), q.exp()).sum(-1).mean())
            entropy = -(p.exp() * q).sum(-1).mean()
            feature = F.smooth_l1_loss(guessed[:, first:].float(), features[:, first:].float())
            weights = self.loss
            one = weights.feature * feature + weights.cross_entropy * entropy + weights.acceptance * (1 - accepted[-1])
            losses.append(weights.decay**run * one)
        return torch.stack(losses).sum(), accepted

    def runs(self, drafter: nn.Module, embeds: Tensor, features: Tensor, bias: Tensor) -> Iterator[Tensor]:
        """Predicted features [S * B, T, D] of each run over the pictures; slot t of run j is a chain's guess number j."""
        places = torch.arange(embeds.shape[1], device=embeds.device)[None]
        rotary = self.lm.model.rotary_emb(embeds, position_ids=places)
        if (
            bias.shape[-1] - self.transformer.num_tokens > 0
        ):  # more than one condition slot: the first has no feature before it
            bias = bias.clone()
            bias[:, :, 1:, 0] = torch.finfo(bias.dtype).min
        cache, fed = _Grown(), features
        for run in range(self.loss.depth):
            fed = drafter(embeds, F.pad(fed, (0, 0, 1, -1)), run_mask(bias, run), rotary, cache)
            yield fed

    def _law(self, features: Tensor) -> Tensor:
        """Log-probabilities [B or S * B, N, V] without the filters, whose edges have no gradient."""
        logits = self.lm.lm_head(features).float()
        if not self.loss.guided or self.streams == 1:
            return torch.log_softmax(logits, -1)
        conditional, unconditional = logits.chunk(2)
        scale = self.laws.config.guidance_scale
        scores = unconditional + scale * (conditional - unconditional)
        return torch.log_softmax(scores / (self.laws.config.temperature or 1.0), -1)


@torch.no_grad()
def draw_pictures(pipe: Any, captions: list[str], count: int, path: Path, seed: int) -> tuple[list[str], Tensor]:
    """``count`` pictures by the target, kept in ``path`` and resumed from it; every caption once before any comes again.

    Returns:
        Captions and tokens [count, N].

    Raises:
        DataError: when ``path`` is damaged.
    """
    names: list[str] = []
    tokens = torch.zeros(0, pipe.transformer.num_tokens, dtype=torch.int64)
    if path.is_file():
        try:
            state = torch.load(path, weights_only=True)
            names, tokens = state["captions"], state["tokens"].long()
        except Exception as error:  # a damaged archive raises anything
            raise DataError(f"cannot go on with {path} ({type(error).__name__}): delete it or use a new --out") from error
    drawer = _in_fast_dtype(pipe) if len(names) < count else pipe
    while len(names) < count:
        first, size = len(names), min(GENERATION_CHUNK, count - len(names))
        some = [_in_turn(captions, i, seed) for i in range(first, first + size)]
        source = torch.Generator().manual_seed(seed + first)
        options = {"decoder": "sjd", "batch_size": min(size, GENERATION_BATCH), "output_type": "latent", "progress": False}
        made = drawer(some, generator=source, **options).tokens.cpu()
        names, tokens = names + some, torch.cat([tokens, made])
        save_atomically({"captions": names, "tokens": tokens.int()}, path)
        print(f"{len(names)} of {count} pictures drawn", flush=True)
    return names[:count], tokens[:count]


def _in_turn(captions: list[str], index: int, seed: int) -> str:
    """Caption ``index`` of an endless row of shuffled lists."""
    lap, place = divmod(index, len(captions))
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed + lap))
    return captions[int(order[place])]


def _in_fast_dtype(pipe: Any) -> Any:
    """The pipeline, on a CPU with fast bfloat16 with a copy of its transformer in that dtype."""
    model = pipe.transformer
    if model.device.type != "cpu" or model.dtype != torch.float32 or not has_fast_bfloat16():
        return pipe
    drawer = copy.copy(pipe)
    drawer.register_modules(transformer=copy.deepcopy(model).bfloat16(), drafter=None)
    return drawer


def train_drafter(
    pipe: Any,
    out: Path,
    minutes: float = 60,
    pictures: int = 6000,
    batch: int = 8,
    lr: float = 3e-3,
    loss: DrafterLoss | None = None,
    seed: int = 0,
    save_minutes: float = 5,
    captions: list[str] | None = None,
) -> EagleDrafter:
    """Draw pictures with the target, then train (or go on training) an EAGLE drafter on them.

    Args:
        pipe: the pipeline to draft for.
        out: run folder; ``samples.pt`` and ``checkpoint.pt`` in it are resumed.
        minutes: time budget of the training itself, over all resumed runs.
        pictures: how many pictures the target draws first.
        batch: pictures per step.
        lr: peak learning rate.
        loss: weights of the loss.
        seed: of weights, pictures and batches.
        save_minutes: minutes between checkpoints.
        captions: of the pictures, of which every 20th is kept for the held-out acceptance; ``None``: those of the emoji
            list, and its held-out concepts.

    Returns:
        The averaged drafter, float32.

    Raises:
        DataError: for sizes that make no sense, or a run folder of another configuration.
    """
    if not minutes > 0 or pictures < 1 or batch < 1:
        raise DataError(f"minutes ({minutes}), pictures ({pictures}) and batch ({batch}) must be positive")
    torch.manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    task = DrafterTask(pipe, loss or DrafterLoss())
    pipe.transformer.requires_grad_(False)
    known, others = (training_captions(), held_out_captions()) if captions is None else split_captions(captions)
    settings = {"sampling": asdict(task.laws.config), "loss": asdict(task.loss), "batch": batch, "lr": lr, "seed": seed}
    models = {name: weights_hash(getattr(pipe, name)) for name in ("transformer", "text_encoder")}
    claim_folder(out, {**models, "captions": hashlib.sha256("\n".join(known).encode()).hexdigest(), **settings})
    names, ids = draw_pictures(pipe, known, pictures, out / "samples.pt", seed)
    held_names, held_ids = draw_pictures(pipe, others, HELD_OUT_PICTURES, out / "held_out.pt", seed + 10**6)
    device = pipe.transformer.device
    ids, held_ids = ids.to(device), held_ids.to(device)
    drafter = EagleDrafter.for_transformer(pipe.transformer.lm).to(device)
    matrices: list[nn.Parameter] = [m.weight for m in drafter.modules() if isinstance(m, nn.Linear)]  # type: ignore[misc]
    vectors = [p for p in drafter.parameters() if p.ndim < 2]
    optimizers = [Muon(matrices, lr=lr), torch.optim.AdamW(vectors, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
    run = Run(out, drafter, optimizers, lr, minutes)
    source = torch.Generator().manual_seed(seed + run.step)
    while run.begin_step():
        pick = torch.randint(len(names), (batch,), generator=source)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
            lesson = task.teach([names[i] for i in pick.tolist()], ids[pick.to(device)])
            value, accepted = task(drafter, *lesson)
        run.finish_step(value, accepted=[round(float(a.detach()), 4) for a in accepted])
        if run.due(save_minutes):
            run.save()
            run.log(held_out=held_out_acceptance(task, averaged(run), held_names, held_ids))
    return averaged(run)


def split_captions(captions: list[str]) -> tuple[list[str], list[str]]:
    """Every 20th caption is held out; the others are trained on.

    Raises:
        DataError: when there are fewer than two.
    """
    if len(captions) < 2:
        raise DataError(f"{len(captions)} captions are too few: one is trained on and another held out, at least")
    return [caption for i, caption in enumerate(captions) if i % 20], captions[::20]


def averaged(run: Run) -> EagleDrafter:
    """The drafter of the averaged weights."""
    assert isinstance(run.model, EagleDrafter)
    drafter = EagleDrafter.from_config(run.model.config)
    drafter.load_state_dict(run.average.values)
    return drafter.eval()


@torch.no_grad()
def held_out_acceptance(task: DrafterTask, drafter: EagleDrafter, captions: list[str], ids: Tensor) -> list[float]:
    """Mean 1 - TV(p, q) of the first, second, ... guess on pictures of captions that were not trained on."""
    totals, drafter = torch.zeros(task.loss.depth), drafter.to(ids.device)
    for first in range(0, len(captions), 16):
        part = slice(first, first + 16)
        lesson = task.teach(captions[part], ids[part])
        totals += torch.stack(task(drafter, *lesson)[1]).cpu() * len(captions[part])
    return [round(float(x), 4) for x in totals / len(captions)]


def ship_drafter(drafter: EagleDrafter, folder: Path) -> None:
    """Save a drafter in bfloat16."""
    copy = EagleDrafter.from_config(drafter.config)
    copy.load_state_dict(drafter.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def check_folder(folder: Path, pipe: Any = None) -> None:
    """Raise DataError when ``folder`` is no pipeline folder that a drafter (of ``pipe``, if given) could be added to."""
    if not (folder / "model_index.json").is_file():
        raise DataError(f"{folder} has no model_index.json: --into takes the folder of a saved pipeline")
    if pipe is not None and model_hash(folder) != pipe.model_hash:
        raise DataError(f"{folder} holds another model than the one that is drafted for: give --into a copy of --model")


def add_drafter(drafter: EagleDrafter, folder: Path) -> None:
    """Add a drafter to a saved pipeline, as its component ``drafter``.

    Raises:
        DataError: when ``folder`` is no pipeline folder.
    """
    check_folder(folder)
    ship_drafter(drafter, folder / "drafter")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["drafter"] = ["arsd.models.eagle", "EagleDrafter"]
    scratch = folder / "model_index.json.part"
    scratch.write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, folder / "model_index.json")
