"""The Celery application, configured once for whoever sends a job and whoever runs it.

Task arguments are ids.  State lives in SQL, so results are ignored and a lost message costs a
few seconds until the watcher announces the job again.
"""

from __future__ import annotations

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

from adapter import keys
from adapter.settings import Settings

log = structlog.get_logger(__name__)

TRAIN_TASK = "distill.train"
QUEUE = "train"


def make_celery(settings: Settings) -> Celery:
    """Build the application; connects to nothing yet."""
    app = Celery("draftsmith", broker=settings.broker)
    hard_limit = int(settings.distill.max_seconds * 2 + 180)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_default_queue=QUEUE,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_time_limit=hard_limit,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": hard_limit + 120,
            "global_keyprefix": keys.CELERY_PREFIX,
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "health_check_interval": 25,
        },
    )
    return app


def announce_job(settings: Settings, job_id: str) -> bool:
    """Tell the workers that a job waits; False when the broker cannot be reached."""
    app = make_celery(settings)
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "socket_timeout": 1, "max_retries": 0}
    try:
        app.send_task(TRAIN_TASK, args=[job_id], queue=QUEUE, retry=False)
    except (OperationalError, OSError) as error:
        log.warning("job_not_announced", job_id=job_id, error=str(error))
        return False
    finally:
        app.close()
    return True
