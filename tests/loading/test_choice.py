"""Which engine "auto" stands for."""

import pytest
import torch

from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.decoding import choice
from fastprune.decoding.choice import choose_backend, faster, images_per_second
from fastprune.decoding.engine import make_engine
from fastprune.decoding.faults import RowFaults
from fastprune.decoding.gpu_probe import GpuDecoding
from tests.conftest import require_library
from tests.images import write_image_folder


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """Twelve pictures of three classes."""
    folder = tmp_path_factory.mktemp("choice")
    convert(write_image_folder(folder / "images"), folder / "a.beton", workers=1)
    return open_beton(folder / "a.beton")


def _choose(beton, device):
    return choose_backend(
        beton, pytest.fail, image_size=32, num_workers=2, device=torch.device(device)
    )


def test_the_cpu_has_an_engine_of_its_own(beton):
    assert _choose(beton, "cpu") == ("cpu", "the device is the CPU")


def test_a_gpu_without_dali_is_fed_by_the_cpu(beton, monkeypatch):
    monkeypatch.setattr(choice, "_has_dali", lambda: False)
    assert _choose(beton, "cuda:0") == ("cpu", "DALI is not installed")


@pytest.mark.parametrize(("rate", "chosen"), [(500.0, "cpu"), (5000.0, "dali")])
def test_a_gpu_on_which_dali_decodes_is_fed_by_the_faster_engine(
    beton, monkeypatch, tmp_path, rate, chosen
):
    tmp_path.chmod(0o700)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_has_dali", lambda: True)
    monkeypatch.setattr(choice, "gpu_facts", lambda index: ["H100"])
    monkeypatch.setattr(choice, "probe_gpu_decoding", lambda index: GpuDecoding("good", ""))
    monkeypatch.setattr(
        choice,
        "images_per_second",
        lambda name, beton, size: {"cpu": 1000.0, "dali": rate}[name],
    )

    def choose(make):
        return choose_backend(
            beton, make, image_size=32, num_workers=2, device=torch.device("cuda:0")
        )[0]

    assert choose(lambda name: name) == chosen
    assert choose(pytest.fail) == chosen, "the rates are kept"


@pytest.mark.parametrize("verdict", ["crashes", "fails", "slow"])
def test_a_gpu_on_which_dali_does_not_decode_is_fed_by_the_cpu(beton, monkeypatch, verdict):
    monkeypatch.setattr(choice, "_has_dali", lambda: True)
    monkeypatch.setattr(
        choice, "probe_gpu_decoding", lambda index: GpuDecoding(verdict, "it ended with SIGSEGV")
    )
    backend, why = _choose(beton, "cuda:0")
    assert backend == "cpu"
    assert why == "DALI is not used on this GPU: it ended with SIGSEGV"


def test_dali_must_be_worth_what_it_takes_from_the_gpu():
    assert faster({"cpu": 1000.0, "dali": 1190.0}, 2)[0] == "cpu"
    backend, why = faster({"cpu": 1000.0, "dali": 1210.0}, 2)
    assert backend == "dali"
    assert why == "1,000 images/s on 2 CPU threads, 1,210 by DALI on the GPU"


@pytest.mark.parametrize("name", ["cpu", "dali"])
def test_engines_are_measured_on_views_of_the_beton(beton, name):
    if name == "dali":
        require_library("dali")
    engine = make_engine(
        name,
        beton,
        image_size=32,
        num_workers=1,
        device=torch.device("cpu"),
        faults=RowFaults(beton, skip=True, verify_crc=False),
    )
    assert images_per_second(engine, beton, 32) > 0
