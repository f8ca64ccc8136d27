"""Token Recycling: trees of guesses from what the model last thought likely behind each token."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks it up in a component's module
from torch import Tensor

from arsd.decoding.laws import Law
from arsd.decoding.model_strategies import check_length
from arsd.decoding.options import whole
from arsd.decoding.registry import register_drafter
from arsd.decoding.siblings import SeedExactTree
from arsd.decoding.strategies import STRATEGIES, DecodingStrategy, Setting
from arsd.decoding.trees import TreeShape, laid_out
from arsd.decoding.types import Draft, FixedWindow, Parts, Seen, Step, Verdict
from arsd.errors import StrategyError

TREES = {
    # the 19 likeliest nodes where the child of rank 0, 1, 2, ... is right with .45, .14, .08, .05, .04, .03, .02, .02
    "small": "7x4.1.1.1.0x2.1.0.0.1.0x1.0",
    # 80 nodes, by depth 8 / 21 / 25 / 15 / 8 / 3 (Luowaterbi/TokenRecycling, tree_template_.py, version 2.2.2)
    "published": "8x8.4.3.2.1.1.1.1x8.3.2.1.1.1.1.1.2.1.0.0.1.0.0.1.0.1.1.0"
    "x5.2.1.1.1.0.0.0.1.0.0.1.0.0.0.0.0.0.1.0.0.1.1.0x3.1.1.0.0.1.0.0.0.0.1.0.1.0x2.0.0.1.0",
}


@register_drafter("token-recycling")
class RecyclingDrafter:
    """A tree filled from a matrix [V, k] of the newest most likely successors of every token (arXiv 2408.08696, section 3).

    Child i of a node that holds token t is entry i of the row of t, whatever stands before t. Every law of a pass overwrites
    the row of the token that was read there; of several laws for one token that of the last column (deepest node) counts,
    and of the last row. Of rounds of other drafters it hears the latest laws, along what was committed. At first the rows
    hold what last followed their tokens in the prompt; a token that was not there is guessed to stay.

    Args:
        setting: of the call; reads ``prompt`` and ``given``.
        shape: a name of :data:`TREES`, or what :meth:`arsd.decoding.trees.TreeShape.parse` takes.
        k: successors kept of each token; 4 V k bytes, of every row or once.
        shared: one matrix for all rows of the batch. Guesses then depend on the neighbours, which no seed-exact rule shows,
            but any other does.

    Raises:
        StrategyError: for a bad shape, or one with more children of a node than k.
    """

    needs_law = False
    hears_laws = True
    trees = True

    def __init__(self, setting: Setting, shape: str | TreeShape = "small", k: int = 8, shared: bool = False) -> None:
        self.tree = shape if isinstance(shape, TreeShape) else tree_of(shape, k)
        device, self.vocab = setting.device, setting.grammar.vocab
        self.prompt, self.given, self.shared = setting.prompt, setting.given, shared
        self.start, self.rows = self.vocab, self.vocab + 2  # a row for what stands before all tokens, and one for nothing
        ids = torch.arange(self.rows, dtype=torch.int32, device=device)[:, None]
        self.fresh = (ids + torch.arange(min(k, self.vocab), dtype=torch.int32, device=device)) % self.vocab
        copies = 1 if shared else setting.batch
        self.matrix = self.fresh.repeat(copies, 1)
        self.offset = torch.arange(setting.batch, device=device)[:, None] * (0 if shared else self.rows)
        self.written = torch.full((len(self.matrix),), -1, dtype=torch.int64, device=device)  # which law wrote each row
        self.laws = 0  # seen so far
        self.last = torch.full((setting.batch, 1), self.start, device=device)  # last committed token
        parents, widest = self.tree.parents, self.fresh.shape[1] - 1
        ranks = [min(node - parents.index(parent), widest) for node, parent in enumerate(parents)]
        self.parents, self.ranks = torch.tensor([[0, *parents], [0, *ranks]], device=device)
        self.read = self.last.expand(-1, self.tree.columns)  # what the columns of the pass read
        self.taught = False
        self.join(list(range(setting.batch)), list(range(setting.batch)))

    def propose(self, step: Step) -> Draft:
        """The tree, level by level."""
        self.read = self.last.repeat(1, self.tree.columns)
        for depth in range(1, self.tree.depth + 1):
            nodes = self.tree.level(depth)
            here = slice(nodes.start, nodes.stop)
            place = self.offset + self.read[:, self.parents[here]]
            self.read[:, here] = self.matrix[place, self.ranks[here]].long()
        return Draft(self.read[:, 1:], tree=self.tree)

    def learn(self, scores: Tensor, read: Tensor, counts: Tensor) -> None:
        """The laws [B, n, V] behind tokens ``read`` [B, n] overwrite their rows, where they ``counts`` [B, n].

        What a law excludes does not replace an older successor.
        """
        best = scores.topk(self.matrix.shape[1], dim=-1)
        place = torch.where(counts, self.offset + read, len(self.matrix) - 1).flatten()
        order = torch.arange(len(place), device=place.device).view(-1, read.shape[0]).T
        number = self.laws + order.flatten()
        self.written.scatter_reduce_(0, place, number, "amax")
        place = torch.where(self.written[place] == number, place, len(self.matrix) - 1)
        fresh, old = best.indices.flatten(0, 1).int(), self.matrix[place]
        self.matrix[place] = torch.where(best.values.flatten(0, 1) > -torch.inf, fresh, old)
        self.laws += len(place)

    def observe(self, step: Step, law: Law, verdict: Verdict, lengths: Tensor) -> None:
        """Go on from the last committed token. What a rule did not teach is learnt along the accepted path."""
        if self.taught:
            end = verdict.count[:, None] - 1
            self.last = torch.where(end < 0, self.last, verdict.tokens.gather(1, end.clamp_min(0)))
        else:
            self.hear(Seen.of(step, law, verdict))
        self.taught = False

    def hear(self, seen: Seen) -> None:
        """Learn the laws along what several rounds committed, and go on from the last token."""
        columns = torch.arange(1, seen.tokens.shape[1] + 1, device=seen.tokens.device)
        tokens = torch.cat([self.last, seen.tokens], 1)
        latest = torch.where(seen.taken, columns, 0).cummax(1).values  # column of the last committed token so far
        read = torch.cat([self.last, tokens.gather(1, latest)], 1)
        assert seen.scores is not None
        known = seen.scores.shape[1]
        self.learn(seen.scores, read[:, -1 - known : -1], seen.taken[:, -known:])
        self.last = read[:, -1:]

    def join(self, rows: list[int], pictures: list[int]) -> None:
        """The rows begin with other prompts and given tokens; a matrix of their own begins anew."""
        texts = [x[pictures] for x in (self.prompt, self.given) if x is not None]
        text = torch.cat([self.last.new_full((len(rows), 1), self.start), *texts], 1)
        text = torch.where((text < 0) | (text >= self.vocab), self.start, text)
        self.last[rows] = text[:, -1:]
        if not self.shared:
            self.matrix.view(-1, *self.fresh.shape)[rows] = self.fresh
        self._read_pairs(self.offset[rows] + text[:, :-1], text[:, 1:])

    def _read_pairs(self, place: Tensor, after: Tensor) -> None:
        """Of all pairs (place, token after it) [R, n] keep the latest of each place, the last one first."""
        place = torch.where(after == self.start, len(self.matrix) - 1, place).flatten()
        place, order = place.sort(stable=True)
        behind = torch.searchsorted(place, place, right=True) - 1 - torch.arange(len(place), device=place.device)
        kept = behind < self.matrix.shape[1]
        place = torch.where(kept, place, len(self.matrix) - 1)
        self.matrix[place, torch.where(kept, behind, 0)] = after.flatten()[order].int()


class _Teaching(SeedExactTree):
    """The seed-exact rule; the drafter learns from the laws of all nodes, of which a verdict shows one path only."""

    def __init__(self, drafter: RecyclingDrafter) -> None:
        self.drafter = drafter

    def verify(self, step: Step, law: Law, draft: Draft) -> Verdict:
        """See :class:`arsd.decoding.types.Rule`."""
        self.drafter.learn(law.before_greedy, self.drafter.read, laid_out(step, draft.tree)[1])
        self.drafter.taught = True
        return super().verify(step, law, draft)


def tree_of(shape: str | int, k: int) -> TreeShape:
    """The tree of this name or shape.

    Raises:
        StrategyError: when it is none, or a node of it has more children than a row of the matrix.
    """
    tree = TreeShape.parse(TREES.get(str(shape), shape))
    if max(tree.counts) > whole("k", k, 1):
        raise StrategyError(f"k ({k}) must be at least {max(tree.counts)}, the most children of a node of the tree")
    return tree


class TokenRecycling(DecodingStrategy):
    """A tree of each token's newest likely successors (:class:`RecyclingDrafter`, arXiv 2408.08696); lossless, seed-exact.

    No model drafts and nothing is trained; a pass is as long as the tree is large.

    Args:
        tree: ``small`` (19 nodes, for a CPU), ``published`` (80 nodes, the authors'), or a shape such as ``4x2x1`` (children
            of each node by depth, :class:`arsd.decoding.TreeShape`).
        k: successors kept of each token.
        pass_tokens: tokens per pass, at least the columns of the tree; ``None`` means that.

    Raises:
        StrategyError: for values that do not fit.
    """

    name = "token-recycling"

    @register_to_config
    def __init__(self, tree: str | int = "small", k: int = 8, pass_tokens: int | None = None) -> None:
        check_length(1, pass_tokens, str(tree_of(tree, k)))

    def build(self, setting: Setting) -> Parts:
        """See :class:`DecodingStrategy`."""
        drafter = RecyclingDrafter(setting, self.config["tree"], self.config["k"], shared=True)
        tree = drafter.tree
        return Parts(drafter, _Teaching(drafter), FixedWindow(tree.depth + 1), self.config["pass_tokens"] or tree.columns)


STRATEGIES[TokenRecycling.name] = TokenRecycling
