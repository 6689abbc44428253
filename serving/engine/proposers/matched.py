"""Proposals made of text that was found, not drawn: every law is one-hot."""

from __future__ import annotations

import torch

from serving.engine.proposers.base import Proposal


def matched_proposal(name: str, tokens: list[int], vocab: int | None) -> Proposal:
    """Build a proposal of matched tokens; with its laws where `vocab`, the width of the target's logits, is given.

    A proposer that is certain of x has q = 1 at x: the classical rule then keeps x with probability
    p(x), and draws from p without x otherwise.  Source: arXiv 2211.17192, Algorithm 1.
    """
    if not tokens:
        return Proposal()
    laws = []
    if vocab is not None:
        laws = list(torch.full((len(tokens), vocab), -torch.inf).scatter_(1, torch.tensor(tokens)[:, None], 0.0))
    return Proposal(tokens=tokens, scaled=laws, proposer=name)
