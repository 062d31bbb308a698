"""An OpenAI-compatible server over the batch inference engine.

`run` starts it and returns when it has been told to stop. One thread has the engine
(`engine_thread`), the event loop has the clients (`app`, over `connections`); they meet in queues.
"""

from infer.server.serve import run

__all__ = ["run"]
