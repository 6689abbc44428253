"""What makes one request's law its own beyond temperature and nucleus: bias, penalties, bans, grammar.

Every rule is a function of the committed tokens and the drafted ones before a row, so it holds row
by row inside a drafted block and nothing has to be undone when a draft is rejected.  Requests
without such rules have none of this.  Applied by the engine to the target's rows and by the draft
model's proposer to its own; both times before temperature, top-k, top-p and min-p.
"""

from __future__ import annotations

import torch

from adapter.contracts import Sampling
from serving.engine.grammar import TokenGrammar


class Penalties:
    """Presence, frequency and repetition penalties over tensors of the distinct tokens seen so far.

    Presence and frequency look at generated tokens, repetition at the prompt too: a logit above 0 is
    divided by it, one below is multiplied.  Then count times frequency and, once, presence are
    taken off.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._repetition = sampling.repetition_penalty
        known = sorted(set(prompt)) if self._repetition != 1 else []
        self._slots = {token: slot for slot, token in enumerate(known)}
        self._tokens = torch.tensor(known, dtype=torch.long)
        self._counts = torch.zeros(len(known))  # how often each was generated

    def apply(self, logits: torch.Tensor, drafted: list[int], first: int) -> None:
        """Penalise in place.  Shapes: as `Constraints.apply`."""
        last = first + len(logits) - 1
        before = drafted[:last]
        slots, tokens = self._places(before)
        rows = torch.arange(first, last + 1)[:, None]
        counts = torch.nn.functional.pad(self._counts, (0, len(tokens) - len(self._counts))).repeat(len(logits), 1)
        if before:
            counts.index_add_(1, slots, (torch.arange(len(before)) < rows).to(counts.dtype))
        values = logits[:, tokens]
        if self._repetition != 1:
            seen = counts > 0
            seen[:, : len(self._counts)] |= self._counts == 0  # known, yet never generated: from the prompt
            scaled = torch.where(values > 0, values / self._repetition, values * self._repetition)
            values = torch.where(seen, scaled, values)
        values = values - counts * self._frequency - (counts > 0) * self._presence
        logits[:, tokens] = values

    def commit(self, tokens: list[int]) -> None:
        """Count tokens that were committed."""
        slots, self._tokens = self._places(tokens)
        for token in tokens:
            self._slots.setdefault(token, len(self._slots))
        counts = torch.nn.functional.pad(self._counts, (0, len(self._tokens) - len(self._counts)))
        self._counts = counts.index_add(0, slots, torch.ones(len(slots)))

    def _places(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the slot of each token, and all known tokens with the new ones at the end."""
        new: dict[int, int] = {}
        slots = []
        for token in tokens:
            slot = self._slots.get(token)
            slots.append(new.setdefault(token, len(self._slots) + len(new)) if slot is None else slot)
        known = torch.cat((self._tokens, torch.tensor(list(new), dtype=torch.long))) if new else self._tokens
        return torch.tensor(slots, dtype=torch.long), known


class Constraints:
    """The rules of one request, in this order: bias, penalties, minimum length, grammar.

    The minimum length yields where the grammar allows nothing but the end.
    """

    def __init__(
        self,
        *,
        bias: tuple[tuple[int, float], ...] = (),
        penalties: Penalties | None = None,
        min_tokens: int = 0,
        end_tokens: list[int],
        grammar: TokenGrammar | None = None,
    ) -> None:
        self._biased = torch.tensor([token for token, _ in bias], dtype=torch.long)
        self._bias = torch.tensor([value for _, value in bias], dtype=torch.float32)
        self._penalties = penalties
        self._unripe = min_tokens  # tokens still to come before an end token may
        self._ends = torch.tensor(end_tokens, dtype=torch.long)
        self._grammar = grammar

    @property
    def failed(self) -> bool:
        """Whether the answer had to end although it does not fit its grammar."""
        return self._grammar is not None and self._grammar.failed

    def apply(self, logits: torch.Tensor, drafted: list[int], first: int = 0) -> None:
        """Change the logits of a round in place.

        Shapes: logits [rows, vocab] float32; row j decides the token after the committed tokens and
        drafted[: first + j].
        """
        if len(self._biased):
            logits.index_add_(1, self._biased, self._bias.expand(len(logits), -1))
        if self._penalties is not None:
            self._penalties.apply(logits, drafted, first)
        unripe = min(len(logits), max(0, self._unripe - first))
        if self._grammar is None:
            logits[:unripe, self._ends] = -torch.inf
            return
        for row in range(len(logits)):
            must_end = self._grammar.restrict(logits[row], drafted[: first + row])
            if row < unripe and not must_end:
                logits[row, self._ends] = -torch.inf

    def commit(self, tokens: list[int]) -> None:
        """Take in tokens that were committed."""
        self._unripe = max(0, self._unripe - len(tokens))
        if self._penalties is not None:
            self._penalties.commit(tokens)
        if self._grammar is not None:
            self._grammar.commit(tokens)


def constraints_for(
    sampling: Sampling, prompt: list[int], end_tokens: frozenset[int], vocab: int, grammar: TokenGrammar | None = None
) -> Constraints | None:
    """Return the rules a request asks for, or None when it asks for none.

    `vocab` is the width of the target's logits; biased tokens must lie inside it, an end token
    outside never comes.
    """
    ends = sorted(token for token in end_tokens if 0 <= token < vocab)
    penalised = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    min_tokens = sampling.min_tokens if ends else 0
    if not (sampling.logit_bias or penalised or min_tokens or grammar):
        return None
    return Constraints(
        bias=sampling.logit_bias, penalties=Penalties(sampling, prompt) if penalised else None,
        min_tokens=min_tokens, end_tokens=ends, grammar=grammar,
    )  # fmt: skip
