"""A stand-in for Google Cloud Storage on this machine: `python tests/train/bucket.py PORT`.

gcp-storage-emulator, and what tensorstore needs beside it: the generation of what is read, and
writes that only replace the generation they know.
"""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus

NAME = "bucket"


def settings(port: int) -> dict[str, str]:
    """The variables with which gcsfs, Google's client and tensorstore use the stand-in alone."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # nobody is asked for credentials
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def started(port: int, log: str | os.PathLike) -> Iterator[None]:
    """Serves an empty bucket from a process of its own."""
    with open(log, "ab") as stream:  # noqa: PTH123
        server = subprocess.Popen(
            [sys.executable, __file__, str(port)], stdout=stream, stderr=stream
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}").close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "no stand-in"
                time.sleep(0.05)
        yield
    finally:
        server.terminate()
        server.wait()


def serve(port: int) -> None:
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def generation(storage, request, name: str) -> str:
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            return "0"

    download, insert = objects.download, objects.insert

    def download_with_generation(request, response, storage):
        download(request, response, storage)
        response["X-Goog-Generation"] = generation(storage, request, request.params["object_id"])

    def insert_where_known(request, response, storage):
        wanted = request.query.get("ifGenerationMatch")
        if wanted and wanted[0] != generation(storage, request, request.query["name"][0]):
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        insert(request, response, storage)

    objects.download = download_with_generation
    for _, methods in server.HANDLERS:
        methods |= {m: insert_where_known for m, handler in methods.items() if handler is insert}
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=NAME).run()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
