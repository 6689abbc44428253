"""One engine a data folder: a second one is refused and takes nothing from the first."""

from __future__ import annotations

import subprocess
import sys

from processes import serving_tiny

from adapter.settings import child_environment


def test_a_second_engine_is_refused_and_the_first_serves_on() -> None:
    """It ends with status 2 and a sentence; an API that starts afterwards still finds the first engine."""
    with serving_tiny() as service:
        second = subprocess.run(
            [sys.executable, "-m", "serving.engine"], env=child_environment(service.settings), capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        assert second.returncode == 2
        assert "another engine serves" in second.stdout + second.stderr
        service.api.terminate()
        service.api.wait(60)
        service.start_api()
        service.wait_ready()
        body = {"model": "tiny-target", "prompt": "the", "max_tokens": 2}
        assert service.post("/v1/completions", body).status_code == 200
