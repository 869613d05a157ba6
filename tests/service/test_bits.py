"""Batches through a service equal a local loader's to the bit, whatever becomes of the service."""

import logging
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.beton.opening import open_beton
from fastprune.loading.loader import Loader
from fastprune.service import failover, wire
from tests.service.conftest import NUM_ROWS, cached_views, wait_for

SUBSET = np.arange(0, NUM_ROWS, 2)


def make_loader(path, service, subset=None, **settings):
    defaults = {
        "batch_size": 16,
        "image_size": 32,
        "augment": "rrc",
        "fields": ("images", "labels", "rows"),
    }
    token = settings.pop("token", None)
    beton = open_beton(path, service=service, token=token)
    return Loader(beton, subset, num_workers=1, **{**defaults, **settings})


def tensors(batch):
    """All tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    return [tensor for part in batch for tensor in tensors(part)]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for one, two in zip(tensors(batch), tensors(other), strict=True):
            assert torch.equal(one, two)


@pytest.fixture
def no_fallback(monkeypatch):
    """Decoding in the client fails the test."""

    def refuse(services, service, error):
        raise AssertionError(f"the service was not used: {error}")

    monkeypatch.setattr(failover.Services, "_lose", refuse)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "pages", "open_pages": 2},
        {"tail": "exact", "batch_size": 7},
        {"tail": "pad", "batch_size": 70},
        {"fields": ("images", "second_images", "labels", "rows")},
        {"dtype": torch.uint8},
        {"augment": "pad_crop"},
        {"train": False, "augment": None, "image_size": 96},
        {"verify_crc": True},
        {"distributed": (1, 2), "tail": "pad"},
    ],
    ids=str,
)
def test_batches_equal_a_local_loaders(beton, serve, no_fallback, settings):
    service = serve(beton)
    local = make_loader(beton, "", SUBSET, **settings)
    remote = make_loader(beton, service.address, SUBSET, **settings)
    for _ in range(2):
        assert_equal(remote, local)
    assert service.server.status()["views_decoded"] > 0


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_server_without_vector_instructions_gives_the_same_bits(
    beton, tmp_path, monkeypatch, serve_process, no_fallback
):
    with monkeypatch.context() as environment:
        environment.setenv("NUMBA_BOUNDSCHECK", "1")  # which turns vectors off, too
        serve_process(beton)
    address = f"unix:{tmp_path}/service.sock"
    for augment in ("rrc", "pad_crop"):
        assert_equal(
            make_loader(beton, address, augment=augment), make_loader(beton, "", augment=augment)
        )


def test_a_small_memory_changes_no_bit(beton, serve, no_fallback):
    service = serve(beton, memory_bytes=16 << 20)
    loaders = [make_loader(beton, where, image_size=160) for where in ("", service.address)]
    assert_equal(*loaders)
    assert_equal(*loaders)


def test_changed_rows_go_through_the_service(beton, serve, no_fallback):
    service = serve(beton)
    loaders = [make_loader(beton, where) for where in ("", service.address)]
    for epoch in range(3):
        for loader in loaders:
            loader.set_rows(np.arange(epoch, NUM_ROWS, 3))
        assert_equal(*loaders)


def test_an_epoch_that_began_locally_is_resumed_through_the_service_and_back(
    beton, serve, no_fallback
):
    service = serve(beton)
    whole = list(make_loader(beton, ""))
    state = None
    for i, where in enumerate(["", service.address, ""]):
        loader = make_loader(beton, where)
        if state is not None:
            loader.load_state_dict(state)
        batches = iter(loader)
        assert_equal([next(batches), next(batches)], whole[2 * i : 2 * i + 2])
        state = loader.state_dict()
        batches.close()


def test_three_trainers_share_every_view(beton, serve, no_fallback):
    service = serve(beton)
    loaders = [make_loader(beton, service.address, tail="exact") for _ in range(3)]
    for _ in range(2):
        iterators = [iter(loader) for loader in loaders]
        for first, second, third in zip(*iterators, strict=True):
            assert_equal([first, first], [second, third])
    # Small images have few boxes, some of which come again in the next epoch.
    rows = np.arange(NUM_ROWS)
    views = [np.c_[rows, loaders[0].views(rows, slot=epoch)] for epoch in range(2)]
    status = service.server.status()
    assert status["views_decoded"] == len(np.unique(np.concatenate(views), axis=0))
    assert status["views_served"] == 6 * NUM_ROWS


def test_two_iterators_at_once_and_batches_that_are_held(beton, serve, no_fallback):
    service = serve(beton)
    loader, local = make_loader(beton, service.address), make_loader(beton, "")
    epochs = list(zip(iter(loader), iter(loader), strict=True))
    assert_equal([first for first, _ in epochs], local)
    assert_equal([second for _, second in epochs], local)


def test_an_iterator_that_is_left_frees_what_it_held(beton, serve, no_fallback):
    service = serve(beton)
    loader = make_loader(beton, service.address)
    for _ in range(5):
        next(iter(loader))
    wait_for(lambda: not service.server.status()["clients"])
    assert not any(view.num_holders for view in cached_views(service))


def test_several_betons_and_sizes_at_one_address(beton, serve, tmp_path, no_fallback):
    from fastprune.beton.compact import compact

    compact(beton, tmp_path / "half.beton", subset=SUBSET)
    service = serve(beton, tmp_path / "half.beton", num_sizes=2)
    for path in (beton, tmp_path / "half.beton"):
        for image_size in (32, 48):
            settings = {"image_size": image_size}
            assert_equal(
                make_loader(path, service.address, **settings), make_loader(path, "", **settings)
            )


def test_the_environment_names_a_service(beton, serve, monkeypatch, no_fallback):
    service = serve(beton)
    monkeypatch.setenv("FASTPRUNE_SERVICE", service.address)
    assert_equal(make_loader(beton, None), make_loader(beton, ""))
    assert service.server.status()["views_decoded"] > 0


def test_a_service_is_refused_beside_another_engine(beton):
    with pytest.raises(InvalidValueError, match=r"service='unix:x' gives what backend='cpu'"):
        make_loader(beton, "unix:x", backend="dali")


def test_an_address_that_is_none_is_refused(beton):
    with pytest.raises(InvalidValueError, match=r"'localhost:80' is not an address.*unix:PATH"):
        make_loader(beton, "localhost:80")


def test_without_a_service_batches_are_decoded_locally_with_one_warning(beton, tmp_path, caplog):
    address = f"unix:{tmp_path}/nobody.sock"
    loader = make_loader(beton, address)
    with caplog.at_level(logging.WARNING, "fastprune"):
        for _ in range(2):
            assert_equal(loader, make_loader(beton, "", seed=0)) if _ == 0 else list(loader)
    (warning,) = caplog.records
    assert "cannot be used: no server listens there" in warning.getMessage()


def test_a_beton_that_is_not_served_is_decoded_locally(beton, serve, tmp_path, caplog):
    from fastprune.beton.compact import compact

    compact(beton, tmp_path / "half.beton", subset=SUBSET)
    service = serve(beton)
    with caplog.at_level(logging.WARNING, "fastprune"):
        assert_equal(
            make_loader(tmp_path / "half.beton", service.address),
            make_loader(tmp_path / "half.beton", ""),
        )
    assert "the images are not those of a served beton" in caplog.text


def test_a_beton_without_a_manifest_is_not_served(beton, tmp_path, serve):
    shutil.copy(beton, tmp_path / "bare.beton")
    with pytest.raises(InvalidValueError, match="has no manifest to identify its images by"):
        serve(tmp_path / "bare.beton")


@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_a_killed_server_changes_no_bit(beton, serve_process, tmp_path, caplog, num_before):
    process = serve_process(beton)
    loader = make_loader(beton, f"unix:{tmp_path}/service.sock")
    batches = iter(loader)
    got = [next(batches) for _ in range(num_before)]
    process.kill()
    process.wait()
    with caplog.at_level(logging.WARNING, "fastprune"):
        got += list(batches)
    assert_equal(got, make_loader(beton, ""))
    assert len(caplog.records) == 1


def test_a_stopped_server_is_given_up_on(beton, serve_process, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wire, "SERVER_SILENT_SECONDS", 0.5)
    process = serve_process(beton)
    loader = make_loader(beton, f"unix:{tmp_path}/service.sock")
    batches = iter(loader)
    got = [next(batches)]
    os.kill(process.pid, signal.SIGSTOP)
    assert_equal(got + list(batches), make_loader(beton, ""))
    assert "nothing was heard" in caplog.text


def test_a_restarted_server_is_used_again(beton, serve, monkeypatch):
    monkeypatch.setattr(failover, "_RETRY_SECONDS", 0.0)
    first = serve(beton)
    loader = make_loader(beton, first.address, batch_size=8)
    batches = iter(loader)
    got = [next(batches)]
    first.stop()
    got += [next(batches) for _ in range(8)]
    second = serve(beton)
    got += list(batches)
    assert_equal(got, make_loader(beton, "", batch_size=8))
    assert second.server.status()["views_served"] > 0


@pytest.mark.parametrize("verify_crc", [None, True, False])
def test_an_altered_row_is_judged_as_a_local_loader_would(beton, serve, tmp_path, verify_crc):
    for name in ("train.beton", "train.beton.manifest.parquet"):
        shutil.copy(beton.with_name(name), tmp_path / name)
    path = tmp_path / "train.beton"
    opened = open_beton(path)
    with path.open("r+b") as file:
        # Behind the pixels: it can be decoded, and is not what was written.
        file.seek(int(opened.offsets[6]) + int(opened.sizes[6]) - 1)
        file.write(b"\0")
    service = serve(path)
    settings = {"tail": "exact", "on_error": "skip", "verify_crc": verify_crc}
    through, local = (
        make_loader(path, service.address, **settings),
        make_loader(path, "", **settings),
    )
    for _ in range(2):
        assert_equal(through, local)
    assert through.num_skipped == local.num_skipped == (0 if verify_crc is False else 2)


def test_a_damaged_row_reaches_those_alone_who_ask_for_it(beton, serve, tmp_path):
    for name in ("train.beton", "train.beton.manifest.parquet"):
        shutil.copy(beton.with_name(name), tmp_path / name)
    path = tmp_path / "train.beton"
    opened = open_beton(path)
    with path.open("r+b") as file:
        file.seek(int(opened.offsets[6]) + int(opened.sizes[6]) // 2)
        file.write(bytes(range(256)) * 2)
    service = serve(path)
    rest = np.setdiff1d(SUBSET, [6])
    whole = make_loader(path, service.address, rest, tail="exact")
    damaged = make_loader(path, service.address, SUBSET, tail="exact")
    skipping = make_loader(path, service.address, SUBSET, tail="exact", on_error="skip")
    with pytest.raises(LoadingError) as there:
        list(damaged)
    with pytest.raises(LoadingError) as here:
        list(make_loader(path, "", SUBSET, tail="exact"))
    assert str(there.value) == str(here.value)
    assert "row 6 of" in str(there.value)
    assert_equal(whole, make_loader(path, "", rest, tail="exact"))
    assert_equal(skipping, make_loader(path, "", SUBSET, tail="exact", on_error="skip"))
    assert skipping.num_skipped == 1
