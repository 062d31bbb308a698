"""Scalars in TensorBoard's event files, by tensorboardX's writer that needs no thread."""

import os
import sys
import time
from pathlib import Path

# tensorboardX imports torch wherever it finds it, which takes two seconds, to log tensors of a kind
# that we do not have. A module that is None counts as missing.
sys.modules.setdefault("torch", None)
try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
finally:
    if sys.modules["torch"] is None:
        del sys.modules["torch"]


class Board:
    """An event file in `folder` for steps from `first`.

    Viewers drop the values of earlier files from step `first` on. The board writes in the caller's
    thread, so that a failed write, such as on a full disk, raises an error.
    """

    def __init__(self, folder: Path, *, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first, session_log=start)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write one value of the curve `name`."""
        self._write(step=step, summary=summary.scalar(name, value))

    def flush(self) -> None:
        """Flush the written values to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _write(self, **fields: object) -> None:
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), **fields))
