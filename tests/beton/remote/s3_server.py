"""A small S3 server on loopback, path-style, that can misbehave: for pyarrow's real client."""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

# Faults that `S3Server.fault` may return for a request.
# A key that must turn up in no message and in no request.
SECRET = "do-not-show-this-key"
FAULTS = ("503", "cut", "wrong range", "slow", "stalled")


@dataclass
class S3Server:
    """Buckets are the folders below `root`.

    Attributes:
        root: what is served and written to.
        fault: asked for each GET and HEAD: (method, key, number of the request) -> a fault or None.
        denied: whether every request is refused.
        etags: ETags that are not those of the content, by key.
        requests: (method, key, Range header) of each request.
        sent_bytes: of bodies.
    """

    root: Path
    fault: Callable[[str, str, int], str | None] = lambda method, key, number: None
    denied: bool = False
    etags: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    sent_bytes: int = 0
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(root: Path) -> Iterator[S3Server]:
    state = S3Server(root)

    class Handler(_Handler):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that gave up
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@lru_cache
def _md5(path, mtime_ns):
    """Of a file as it is; a client that waits longer than 3 s for an answer asks again."""
    return hashlib.md5(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: S3Server
    uploads: ClassVar[dict[str, dict[int, bytes]]] = {}

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.connection.settimeout(20)

    @property
    def key(self):
        return unquote(urlsplit(self.path).path).lstrip("/")

    @property
    def query(self):
        return parse_qs(urlsplit(self.path).query, keep_blank_values=True)

    def answer(self, status, body=b"", headers=None, *, length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            # Counted first: the client may look as soon as it has the last byte.
            self.server_state.sent_bytes += len(body)
            self.wfile.write(body)

    def refuse(self, status, code):
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.answer(status, body, {"Content-Type": "application/xml"})

    def note(self):
        state = self.server_state
        state.requests.append((self.command, self.key, self.headers.get("Range", "")))
        return None if state.denied else state.fault(self.command, self.key, len(state.requests))

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        state, fault = self.server_state, self.note()
        if state.denied:
            return self.refuse(403, "AccessDenied")
        if fault == "503":
            return self.refuse(503, "SlowDown")
        if "list-type" in self.query:
            return self.list_objects()
        path = state.root / self.key
        if not path.is_file():
            return self.refuse(404, "NoSuchKey")
        content = path.read_bytes()
        headers = {
            "ETag": state.etags.get(self.key, f'"{_md5(path, path.stat().st_mtime_ns)}"'),
            "Accept-Ranges": "bytes",
            "Last-Modified": "Sat, 01 Nov 2025 00:00:00 GMT",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, content, headers)
        start, end = int(asked[1]), min(int(asked[2]), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        body = content[start : end + 1]
        if fault == "wrong range":
            body = (content[:1] + content)[start : end + 1]
        if fault == "slow":
            time.sleep(0.2)
        if fault == "stalled":
            time.sleep(4)
        if fault == "cut":
            self.answer(206, body[: len(body) // 2], headers, length=len(body))
            self.close_connection = True
            return None
        return self.answer(206, body, headers)

    def list_objects(self):
        bucket = self.server_state.root / self.key.strip("/")
        prefix = self.query.get("prefix", [""])[0]
        delimiter = self.query.get("delimiter", [""])[0]
        names = sorted(str(p.relative_to(bucket)) for p in bucket.rglob("*") if p.is_file())
        found, folders = "", {}
        for name in names:
            rest = name[len(prefix) :]
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders[f"{prefix}{rest.split(delimiter)[0]}{delimiter}"] = None
                continue
            size = (bucket / name).stat().st_size
            found += (
                f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size>"
                "<LastModified>2025-11-01T00:00:00.000Z</LastModified></Contents>"
            )
        found += "".join(
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in folders
        )
        count = f"<KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>"
        body = f"<ListBucketResult>{count}{found}</ListBucketResult>"
        self.answer(200, body.encode(), {"Content-Type": "application/xml"})

    def body(self):
        """The body, out of HTTP's chunks and AWS's chunks inside of them."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while count := int(self.rfile.readline(), 16):
            data += self.rfile.read(count)
            self.rfile.readline()
        self.rfile.readline()
        whole = b""
        while count := int(data[: data.index(b"\r\n")].split(b";")[0], 16):
            at = data.index(b"\r\n") + 2
            whole, data = whole + data[at : at + count], data[at + count + 2 :]
        return whole

    def do_PUT(self):
        data = self.body()
        self.server_state.requests.append(("PUT", self.key, ""))
        if self.server_state.denied:
            return self.refuse(403, "AccessDenied")
        etag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        if "partNumber" in self.query:
            parts = self.uploads[self.query["uploadId"][0]]
            parts[int(self.query["partNumber"][0])] = data
            return self.answer(200, headers=etag)
        self.put(data)
        return self.answer(200, headers=etag)

    def do_POST(self):
        self.body()
        xml = {"Content-Type": "application/xml"}
        if "uploads" in self.query:
            upload = str(len(self.uploads) + 1)
            self.uploads[upload] = {}
            names = f"<Bucket>b</Bucket><Key>{self.key}</Key><UploadId>{upload}</UploadId>"
            body = f"<InitiateMultipartUploadResult>{names}</InitiateMultipartUploadResult>"
            return self.answer(200, body.encode(), xml)
        parts = self.uploads.pop(self.query["uploadId"][0])
        self.put(b"".join(parts[number] for number in sorted(parts)))
        body = '<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>'
        return self.answer(200, body.encode(), xml)

    def put(self, data):
        path = self.server_state.root / self.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
