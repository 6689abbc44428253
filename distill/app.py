"""The worker's Celery application: the shared configuration plus the one task it runs.

Never imports torch.  Called by `python -m distill`.
"""

from __future__ import annotations

import contextlib
import os
import signal

from billiard.process import active_children  # type: ignore[import-untyped]
from celery import Celery
from celery.signals import worker_shutting_down

from adapter.broker import make_celery
from adapter.settings import Settings
from distill.tasks import register


def make_app(settings: Settings) -> Celery:
    """Build the application and register the training task; connects to nothing yet."""
    app = make_celery(settings)
    app.conf.update(
        task_reject_on_worker_lost=True,
        worker_disable_prefetch=True,
        worker_send_task_events=False,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    register(app, settings)
    worker_shutting_down.connect(_tell_the_pool)
    return app


def _tell_the_pool(**_: object) -> None:
    """Pass the shutdown on: Celery would wait for the running training, which takes minutes."""
    for child in active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGTERM)
