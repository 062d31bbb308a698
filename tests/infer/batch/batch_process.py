"""A job in a process of its own, to be killed: `python -m tests.infer.batch.batch_process`.

It prints STARTED before the job and ENDED after it, so that a test knows what a kill has hit.
"""

import sys
import time

from infer.batch import batch_job
from tests.infer import fake_engine

STARTED, ENDED = "started", "ended"


class SlowEngine(fake_engine.FakeEngine):
    """An engine whose steps take 2 ms, so that a kill can hit the job at work."""

    def step(self):
        time.sleep(0.002)
        return super().step()


if __name__ == "__main__":
    input_path, output_path, order = sys.argv[1:]
    service = fake_engine.service(kind=SlowEngine)
    print(STARTED, flush=True)
    batch_job.run(service, input_path, output_path, order=order, max_open=8)
    print(ENDED, flush=True)
