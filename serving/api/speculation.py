"""`metrics.speculative_decoding` of a response, in the shape vLLM gives it.

Counts come from the engine's summary of each answer, before any trimming: accepted tokens may
exceed delivered ones by the tokens behind a stop string.  Rates divide by what was really drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from adapter.contracts import Counts
from serving.ipc import Summary


def spec_metrics(summaries: Sequence[Summary], num_spec_tokens: int) -> dict[str, Any]:
    """Return the object for one response; several answers of one request are added up.

    `acceptance_histogram[j]` counts the rounds that accepted exactly j drafted tokens; rounds that
    drafted nothing are no rounds of speculation.  `num_spec_tokens` is the most a round of the request
    may draft; the histogram has one entry more.
    """
    counts = sum((item.counts for item in summaries), Counts())
    steps, drafted, accepted = counts.num_rounds, counts.num_drafted, counts.num_accepted
    at_least = [sum(row) for row in zip_longest(*(item.accepted_by_position for item in summaries), fillvalue=0)]
    size = max(num_spec_tokens, len(at_least))
    reached = [steps, *at_least, *[0] * (size - len(at_least)), 0]
    return {
        "mean_acceptance_length": counts.tokens_per_round,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": [reached[place] - reached[place + 1] for place in range(size + 1)],
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": num_spec_tokens,
        "num_accepted_tokens_per_pos": at_least,
        "num_plain_steps": sum(item.plain_rounds for item in summaries),
    }
