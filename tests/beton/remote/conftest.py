"""A bucket that is served, to clients that find it by their environment."""

import pytest

from tests.beton.remote.s3_server import SECRET, serving


@pytest.fixture
def server(bucket, monkeypatch):
    """Serve the bucket of a test's module; its address and keys stand in the environment."""
    with serving(bucket.parent) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield server
