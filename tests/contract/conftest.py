"""A loopback S3 server for the contract tests."""

import os
import socket
import subprocess
import sys
import time

import pytest


@pytest.fixture(scope="module")
def s3():
    """A loopback S3 server without buckets, to which the environment points: its process."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    names = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    kept = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield server
    finally:
        server.terminate()
        server.wait()
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
