import pytest
import torch

from fastprune.base.errors import ConversionError, MissingDependencyError
from fastprune.doctor import engines
from fastprune.doctor.engines import check_engines
from tests.conftest import require_library


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["cpu", "dali", "ffcv"])
def test_an_installed_engine_decodes(name):
    if name != "cpu":
        require_library(name)
    found = {finding.topic: finding for finding in check_engines()}
    topic = "adapter ffcv" if name == "ffcv" else f"engine {name}, cpu"
    assert found[topic].verdict == "good"


def test_engines_that_are_not_installed_come_with_the_way_to_install_them(monkeypatch):
    monkeypatch.setattr(engines, "_is_installed", lambda package: package == "numba")
    cpu, dali, ffcv = check_engines()
    assert (cpu.verdict, dali.verdict, ffcv.verdict) == ("good", "note", "note")
    assert "pip install nvidia-dali-cuda130" in dali.advice
    assert "libturbojpeg0-dev && pip install 'ffcv>=1.0.2'" in ffcv.advice


def test_an_engine_that_cannot_be_imported_is_bad_and_says_what_is_missing(monkeypatch):
    def fail(name):
        raise MissingDependencyError("libopencv_core.so.406: cannot open shared object file")

    monkeypatch.setattr(engines, "_is_installed", lambda package: package == "ffcv")
    monkeypatch.setattr(engines.importlib, "import_module", fail)
    ffcv = check_engines()[-1]
    assert ffcv.verdict == "bad"
    assert ffcv.found == "libopencv_core.so.406: cannot open shared object file"
    assert "Install libopencv-dev and libturbojpeg0-dev" in ffcv.advice


def test_wrong_pixels_are_bad(monkeypatch):
    monkeypatch.setattr(engines, "_is_installed", lambda package: True)
    monkeypatch.setattr(
        engines, "_decode", lambda *names: torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    )
    assert "levels from PIL" in check_engines()[0].found


def test_a_machine_that_cannot_convert_is_told_where_to_look(monkeypatch):
    def fail(*arguments, **options):
        raise ConversionError("no space")

    monkeypatch.setattr("fastprune.beton.convert.writer.convert", fail)
    (finding,) = check_engines()
    assert finding.verdict == "bad"
    assert "TMPDIR" in finding.advice
