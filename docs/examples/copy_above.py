"""A method in one file: a drafter that guesses the token above, and a rule that needs no law of its guesses.

arsd check-rule docs/examples/copy_above.py:CopyAbove
arsd bench --import docs/examples/copy_above.py --prompt pizza \
    --decoders ar speculative:drafter=copy-above,rule=seed-exact,window=8 speculative:drafter=copy-above,rule=take-or-leave
"""

import torch

import arsd
from arsd.decoding import Draft, Outcome, Purpose, Verdict


@arsd.register_drafter("copy-above")
class CopyAbove:
    """Guess that a token equals the one above it: pictures have areas of one colour."""

    needs_law = False  # these guesses are not drawn: there is no q

    def __init__(self, setting):
        self.row = setting.row_length or 1
        self.tokens = torch.zeros(setting.batch, setting.num_tokens + 1, dtype=torch.int64, device=setting.device)

    def propose(self, step):
        """The last token known in each guess's column (in the first line, the first token)."""
        known, positions = step.positions[:, :1], step.positions[:, :-1]  # a window begins at its row's length
        above = known - self.row + (positions - known) % self.row
        return Draft(self.tokens.gather(1, above.clamp_min(0)))

    def observe(self, step, law, verdict, lengths):
        """Keep what was committed; the last column takes the rest."""
        committed = step.positions < lengths[:, None]
        place = torch.where(committed, step.positions, self.tokens.shape[1] - 1)
        self.tokens.scatter_(1, place, verdict.tokens)

    def join(self, rows, pictures):
        """Begin other pictures."""
        self.tokens[rows] = 0


@arsd.register_rule("take-or-leave")
class TakeOrLeave:
    """Lossless for any guess d: taken with probability p(d), else replaced by a draw from p without d."""

    def verify(self, step, law, draft):
        """Judge every slot; the last one has no guess."""
        last = torch.zeros_like(step.positions[:, :1])
        guesses = torch.cat([draft.tokens, last], 1)[..., None]
        guessed = torch.cat([torch.ones_like(draft.tokens), last], 1).bool()
        key = step.positions, step.iteration
        chance = torch.where(guessed, law.probs.gather(-1, guesses)[..., 0], 0)
        taken = step.noise.bernoulli(chance, Purpose.ACCEPT, *key, step.active) & guessed
        rest = torch.where(guessed[..., None], law.probs.scatter(-1, guesses, 0), law.probs)
        fresh = step.noise.categorical(rest, Purpose.RESIDUAL, *key, step.active & ~taken)
        tokens = torch.where(taken, guesses[..., 0], fresh)
        outcome = torch.where(taken, int(Outcome.ACCEPTED), int(Outcome.RESAMPLED))
        return Verdict(torch.minimum(taken.long().cumprod(1).sum(1) + 1, step.width), tokens, outcome)
