"""A beton that only services have, and rows that several services share."""

import json
import logging
import pickle
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.base.provenance import structure_digest
from fastprune.beton.opening import open_beton
from fastprune.service import failover
from fastprune.service import served_beton as service_beton
from fastprune.service.credentials import ServerCredentials
from fastprune.service.served_beton import METADATA_KEY, SCHEMA, open_remote_beton
from tests.service.conftest import NUM_ROWS, free_port
from tests.service.test_bits import SUBSET, assert_equal, make_loader, no_fallback  # noqa: F401

LOOPBACK = ("grpc://127.0.0.1:0",)
TOKEN = "0123456789abcdef" * 2


@pytest.fixture
def small_blocks(monkeypatch):
    """Few rows are enough for everybody to have a share."""
    monkeypatch.setattr(failover, "_ROWS_IN_BLOCK", 1)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(service_beton, "_PATIENCE_SECONDS", 1.0)


def test_columns_names_and_identity_are_those_of_the_file(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    local, remote = open_beton(beton), open_remote_beton(f"{service.remote}/train.beton")
    for name in ("labels", "widths", "heights"):
        np.testing.assert_array_equal(getattr(remote, name), getattr(local, name))
        assert getattr(remote, name).dtype == getattr(local, name).dtype
    assert remote.fingerprint == local.fingerprint
    assert remote.class_names == local.class_names
    assert remote.num_classes == local.num_classes
    assert remote.has_labels == local.has_labels


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "pages", "open_pages": 2},
        {"tail": "exact", "fields": ("images", "second_images", "labels", "rows")},
    ],
    ids=str,
)
def test_batches_equal_those_of_the_file(beton, serve, settings):
    service = serve(beton, beside=LOOPBACK)
    remote = make_loader(f"{service.remote}/train.beton", None, SUBSET, **settings)
    local = make_loader(beton, "", SUBSET, **settings)
    for _ in range(2):
        assert_equal(remote, local)


def test_a_run_moves_between_the_file_and_a_service_that_has_it(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    given, state = [], None
    for where in (beton, f"{service.remote}/train.beton", beton):
        loader = make_loader(where, None if where != beton else "")
        if state is not None:
            loader.load_state_dict(state)
        batches = iter(loader)
        given.append(next(batches))
        state = loader.state_dict()
        batches.close()
    assert_equal(given, list(make_loader(beton, ""))[:3])


def test_a_pickled_loader_opens_the_service_again(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    loader = make_loader(f"{service.remote}/train.beton", None)
    assert_equal(pickle.loads(pickle.dumps(loader)), make_loader(beton, ""))


def test_token_and_certificate_are_asked_for(beton, serve, certificates, monkeypatch):
    files = [certificates / "server.pem", certificates / "server.key"]
    credentials = ServerCredentials(*[path.read_bytes() for path in files], tokens=(TOKEN,))
    service = serve(beton, beside=["grpc+tls://127.0.0.1:0"], credentials=credentials)
    monkeypatch.setenv("FASTPRUNE_SERVICE_CA", str(certificates / "ca.pem"))
    url = f"{service.remote}/train.beton"
    assert_equal(make_loader(url, None, token=TOKEN), make_loader(beton, ""))
    with pytest.raises(LoadingError, match=r"it refuses the token. Pass its token to"):
        make_loader(url, None, token="f" * 32)


def test_a_name_that_is_not_served_is_refused_at_once(beton, serve, tmp_path):
    service = serve(beton, beside=LOOPBACK)
    with pytest.raises(LoadingError, match=r"no beton named 'other.beton', but train.beton"):
        make_loader(f"{service.remote}/other.beton", None)
    (tmp_path / "copy").mkdir()
    for name in ("train.beton", "train.beton.manifest.parquet"):
        shutil.copy(beton.with_name(name), tmp_path / "copy" / name)
    twice = serve(beton, tmp_path / "copy" / "train.beton", name="2.sock", beside=LOOPBACK)
    with pytest.raises(LoadingError, match="more than one beton named"):
        make_loader(f"{twice.remote}/train.beton", None)
    assert len(make_loader(f"{twice.remote}/copy/train.beton", None)) == 7


@pytest.mark.parametrize(
    ("url", "settings", "cure"),
    [
        ("grpc://127.0.0.1:1", {}, "must name one beton"),
        ("grpc://127.0.0.1:1/a,grpc://127.0.0.1:2/b", {}, "must name one beton"),
        ("grpc://127.0.0.1/a", {}, "is not an address"),
        ("grpc://127.0.0.1:1/a", {"cache": "here"}, "is for betons in object storage"),
    ],
)
def test_urls_that_name_no_beton_are_refused(url, settings, cure):
    with pytest.raises(InvalidValueError, match=cure):
        open_beton(url, **settings)


def test_no_other_service_can_be_named_beside_it(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    with pytest.raises(InvalidValueError, match="Leave out `service`"):
        make_loader(f"{service.remote}/train.beton", "unix:/other.sock")
    with pytest.raises(InvalidValueError, match="gives what backend='cpu' gives"):
        make_loader(f"{service.remote}/train.beton", None, backend="dali")


@pytest.mark.usefixtures("impatient")
def test_without_a_service_an_error_names_address_and_cure():
    with pytest.raises(LoadingError, match=r"127.0.0.1:1: no server listens.*fastprune serve"):
        make_loader("grpc://127.0.0.1:1/train.beton", None)


@pytest.mark.usefixtures("impatient")
def test_a_service_that_is_lost_for_good_ends_the_epoch(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    batches = iter(make_loader(f"{service.remote}/train.beton", None, batch_size=8))
    next(batches)
    service.stop()
    with pytest.raises(LoadingError, match=r"no loading service gives it.*no server listens there"):
        list(batches)


def test_a_service_that_comes_back_in_time_changes_no_bit(beton, serve, caplog):
    address = f"grpc://127.0.0.1:{free_port()}"
    first = serve(beton, beside=[address])
    batches = iter(make_loader(f"{address}/train.beton", None, batch_size=8))
    got = [next(batches) for _ in range(2)]
    first.stop()
    again = threading.Timer(0.5, serve, [beton], {"name": "again.sock", "beside": [address]})
    again.start()
    got += list(batches)
    again.join()
    assert_equal(got, make_loader(beton, "", batch_size=8))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "It is tried again" in warning.getMessage()


def test_a_damaged_row_is_found_where_the_file_is(beton, serve, tmp_path):
    for name in ("train.beton", "train.beton.manifest.parquet"):
        shutil.copy(beton.with_name(name), tmp_path / name)
    opened = open_beton(tmp_path / "train.beton")
    with (tmp_path / "train.beton").open("r+b") as file:
        # Behind the pixels: it can be decoded, and is not what was written.
        file.seek(int(opened.offsets[6]) + int(opened.sizes[6]) - 1)
        file.write(b"\0")
    service = serve(tmp_path / "train.beton", beside=LOOPBACK)
    url = f"{service.remote}/train.beton"
    with pytest.raises(LoadingError, match=r"row 6 of .* cannot be used: its bytes are not those"):
        list(make_loader(url, None, tail="exact"))
    skipping = make_loader(url, None, tail="exact", on_error="skip")
    rows = np.concatenate([rows for _, _, rows in skipping])
    assert sorted(rows) == [row for row in range(NUM_ROWS) if row != 6]


class Liar(flight.FlightServerBase):
    """Sends a table that contradicts itself."""

    def __init__(self, table):
        self._table = table
        super().__init__("grpc://127.0.0.1:0")

    def do_get(self, context, ticket):
        return flight.RecordBatchStream(self._table)


def table(metadata=b"{}", **columns):
    given = {"label": [0, 1], "width": [8, 8], "height": [8, 8], "page": [1, 1]} | columns
    arrays = [pa.array(given[field.name], field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata({METADATA_KEY: metadata}))


def metadata(num_rows=2, structure="0" * 32, **changes):
    identity = {"num_rows": num_rows, "structure": structure, "content": "0" * 32}
    fields = {"fingerprint": identity, "digest": "x", "has_labels": True, "page_bytes": 1 << 20}
    return json.dumps(fields | changes).encode()


STRUCTURE = structure_digest(np.array([0, 1]), *[np.array([8, 8], np.uint16)] * 2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (table(), "it has no"),
        (table(b"[" * 60_000), "it is nested too deeply"),
        (table(metadata()), "its fingerprint is another one's"),
        (table(metadata(class_names="x")), "its 'class_names' is 'x'"),
        (table(metadata(page_bytes=0)), "its 'page_bytes' is 0"),
        (table(metadata(more=0)), "its 'more' is unknown"),
        (table(metadata(1)), "more rows than announced"),
        (table(metadata(3)), "it ends too soon"),
        (table(metadata(0)), "num_rows"),
        (table(metadata(-1)), "num_rows"),
        (table(metadata(2**62)), "4,611,686,018,427,387,904 rows"),
        (table(metadata(structure=STRUCTURE, class_names=["a"])), "fewer class names than labels"),
        (pa.table({"label": [1]}), "its columns are others"),
    ],
    ids=range(13),
)
def test_a_table_that_contradicts_itself_is_not_believed(given, reason):
    server = Liar(given)
    with pytest.raises(LoadingError, match=f"its table is not understood.*{reason}"):
        open_remote_beton(f"grpc://127.0.0.1:{server.port}/x")
    server.shutdown()


@pytest.mark.usefixtures("no_fallback", "small_blocks")
@pytest.mark.parametrize("settings", [{}, {"tail": "exact", "order": "pages"}], ids=str)
def test_services_share_the_rows(beton, serve, settings):
    services = [serve(beton, name=f"{i}.sock", beside=LOOPBACK) for i in range(3)]
    addresses = [services[0].address, services[1].remote, services[2].remote]
    local = make_loader(beton, "", **settings)
    one = make_loader(beton, ",".join(addresses), **settings)
    other = make_loader(beton, ", ".join(reversed(addresses)), **settings)
    assert_equal(one, local)
    decoded = [service.server.status()["views_decoded"] for service in services]
    assert min(decoded) > 0
    assert sum(decoded) == 16 * len(local) - (8 if settings else 0)
    # Another trainer asks the same service for the same row.
    local.set_epoch(0)
    assert_equal(other, local)
    assert [service.server.status()["views_decoded"] for service in services] == decoded


@pytest.mark.usefixtures("small_blocks")
def test_the_others_decode_the_share_of_one_that_is_killed(beton, serve, serve_process, caplog):
    process = serve_process(beton, name="first.sock", port=(port := free_port()))
    second = serve(beton, beside=LOOPBACK)
    addresses = f"grpc://127.0.0.1:{port},{second.remote}"
    batches = iter(make_loader(beton, addresses, batch_size=8))
    got = [next(batches) for _ in range(2)]
    process.kill()
    process.wait()
    got += list(batches)
    assert_equal(got, make_loader(beton, "", batch_size=8))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the others decode its share" in warning.getMessage()
    # All that were left after the loss came from there, and not from here.
    assert second.server.status()["views_served"] >= 12 * 8


@pytest.mark.usefixtures("small_blocks")
def test_the_share_of_a_lost_service_alone_moves():
    from fastprune.service.address import parse_address
    from fastprune.service.failover import Service, split_rows

    services = [Service(parse_address(f"grpc://host{i}:1")) for i in range(4)]
    rows = np.arange(40_000)
    owner = np.empty(len(rows), np.int64)
    for service, share in split_rows(rows, services).items():
        owner[share] = services.index(service)
    assert (np.abs(np.bincount(owner) / len(rows) - 0.25) < 0.05).all()
    for service, share in split_rows(rows, services[:3]).items():
        kept = owner[share] == services.index(service)
        assert (kept | (owner[share] == 3)).all()


@pytest.mark.usefixtures("small_blocks")
def test_a_service_that_is_back_takes_its_share_in_the_next_epoch(beton, serve, monkeypatch):
    monkeypatch.setattr(failover, "_RETRY_SECONDS", 0.0)
    first, second = (serve(beton, name=f"{i}.sock", beside=LOOPBACK) for i in range(2))
    loader = make_loader(beton, f"{first.address},{second.remote}")
    local = make_loader(beton, "")
    assert_equal(loader, local)
    first.stop()
    assert_equal(loader, local)
    again = serve(beton, name="0.sock")
    assert_equal(loader, local)
    assert again.server.status()["views_served"] > 0
