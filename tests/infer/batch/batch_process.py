"""A job in a process of its own, to be killed: `python -m tests.infer.batch.batch_process`."""

import sys
import time

from infer.batch import batch_job
from tests.infer import fake_engine


class SlowEngine(fake_engine.FakeEngine):
    """Takes its time, so that there is some to be killed in."""

    def step(self):
        time.sleep(0.002)
        return super().step()


if __name__ == "__main__":
    input_path, output_path, order = sys.argv[1:]
    service = fake_engine.service(kind=SlowEngine)
    batch_job.run(service, input_path, output_path, order=order, max_open=8)
