"""Every Redis key: its name, type, bound, writer and reader.  Keys are spelled nowhere else.

| key | type | bound | writer | reader |
|---|---|---|---|---|
| draftsmith:blocks | stream | about `log.stream_max_entries`, or `log.stream_max_bytes` | engine | trainer |
| draftsmith:blocks:dead | stream | maxlen 1000 | trainer | a person |
| draftsmith:outcomes | stream | about `log.stream_max_entries`, or `log.stream_max_bytes` | engine | watcher |
| draftsmith:hint | pub/sub channel | – | registry writers | engine |
| draftsmith:celery:* | Celery's own | task arguments are ids | watcher | worker |
"""

from __future__ import annotations

BLOCKS = "draftsmith:blocks"
BLOCKS_DEAD = "draftsmith:blocks:dead"
OUTCOMES = "draftsmith:outcomes"
HINT = "draftsmith:hint"
CELERY_PREFIX = "draftsmith:celery:"

TRAINER_GROUP = "trainer"
WATCHER_GROUP = "watcher"
PAYLOAD_FIELD = b"p"
