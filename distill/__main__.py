"""`python -m distill`: the worker that turns announced jobs into trainer processes.

Prefork with one child and no torch in either process: a trainer is exec'd, so its memory goes back at
its end and a crash in it is only an exit status.  Gossip and mingle are off because workers with them
have stopped consuming after a Redis restart.  SIGTERM stops it; a running job is handed back.
"""

from __future__ import annotations

import sys

from adapter.broker import QUEUE
from adapter.settings import load_settings
from distill.app import make_app


def main() -> int:
    """Run the worker until it is stopped; a broker that is down is retried for ever."""
    app = make_app(load_settings())
    app.worker_main(
        [
            "worker",
            "--pool=prefork",
            "--concurrency=1",
            "--without-gossip",
            "--without-mingle",
            f"--queues={QUEUE}",
            "--hostname=distill@%h",
            "--loglevel=INFO",
        ]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
