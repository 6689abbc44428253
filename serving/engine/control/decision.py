"""What was decided last, and that in words.  Knows nothing of how it came about; used by `adaptive`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from serving.engine.control.search import OFF_RULE

REASONS = {
    "speculate": "drafting up to {depth} promises {best:.1f} tokens/s against {plain:.1f} without",
    "kept": "{depth} a round was the choice before, and no other promises {hysteresis:.0%} more than its {now:.1f} "
    "tokens/s",
    "matches": "only text matches are worth verifying: {now:.1f} tokens/s against {plain:.1f} without",
    "off": "the best, {depth_best}, promises {best:.1f} tokens/s: less than {off_rule:.0%} of the {plain:.1f} without",
    "off_matches": "the text matches at hand promise {now:.1f} tokens/s: less than {off_rule:.0%} of the {plain:.1f} "
    "without",
    "short": "too few tokens are left to draft",
    "backlog": "what the draft model would have to read first costs more than it would bring",
    "probe": "{best:.1f} tokens/s at best against {plain:.1f} without; one request drafts all the same, to learn",
    "window": "a short window without speculation, to measure what it brings",
    "bypass": "speculation was measured to be slower than none; it is tried again later",
    "own": "every request named its own draft length, or switched speculation off",
    "nothing": "nothing was chosen yet, or no proposer had anything to offer",
}


@dataclass(slots=True)
class Decision:
    """The last choice, as numbers; words are made when somebody asks."""

    reason: str = "nothing"
    depth: int = 0
    alternatives: list[float] = field(default_factory=list)  # tokens per second by depth
    slots: list[int] = field(default_factory=list)
    plain: float = 0.0
    gammas: list[int] = field(default_factory=list)
    batch: int = 0

    def explain(self, hysteresis: float) -> dict[str, object]:
        """Return it in plain values, with a sentence; `hysteresis` is what another depth had to promise more."""
        rates = self.alternatives
        drafted = len(rates) > 1  # else only matches were priced
        best = int(np.argmax(rates[1:])) + 1 if drafted else 0
        words = "off_matches" if self.reason == "off" and not drafted else self.reason
        sentence = REASONS[words].format(
            depth=_tokens(self.depth), depth_best=_tokens(best), best=rates[best] if rates else 0.0, plain=self.plain,
            now=rates[self.depth] if rates else 0.0, hysteresis=hysteresis, off_rule=OFF_RULE,
        )  # fmt: skip
        alternatives = [
            {"gamma": depth, "tokens_per_s": round(rate, 3), "drafted": slots}
            for depth, (rate, slots) in enumerate(zip(rates, self.slots, strict=True))
        ]
        return {
            "reason": self.reason, "sentence": sentence, "gamma": self.depth, "batch": self.batch,
            "plain_tokens_per_s": round(self.plain, 3), "alternatives": alternatives, "gammas": self.gammas[:64],
        }  # fmt: skip


def _tokens(number: int) -> str:
    return f"{number} token{'' if number == 1 else 's'}"
