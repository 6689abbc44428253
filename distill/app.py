"""The worker's Celery application: the shared configuration plus the one task it runs.

Never imports torch.  Called by `python -m distill`.
"""

from __future__ import annotations

from celery import Celery

from adapter.broker import make_celery
from adapter.settings import Settings
from distill.tasks import register

_SOFT_SHUTDOWN_S = 2.0  # the task hands its job back within a second; the rest is margin


def make_app(settings: Settings) -> Celery:
    """Build the application and register the training task; connects to nothing yet."""
    app = make_celery(settings)
    app.conf.update(
        task_reject_on_worker_lost=True,
        worker_disable_prefetch=True,
        worker_soft_shutdown_timeout=_SOFT_SHUTDOWN_S,
        worker_enable_soft_shutdown_on_idle=False,
        worker_send_task_events=False,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    register(app, settings)
    return app
