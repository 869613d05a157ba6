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
    assert found[f"engine {name}, cpu"].verdict == "good"


def test_engines_that_are_not_installed_come_with_the_way_to_install_them(monkeypatch):
    monkeypatch.setattr(engines, "_is_installed", lambda package: package == "numba")
    cpu, dali, ffcv = check_engines()
    assert (cpu.verdict, dali.verdict, ffcv.verdict) == ("good", "note", "note")
    assert "pip install nvidia-dali-cuda130" in dali.advice
    assert "libturbojpeg0-dev && pip install 'ffcv>=1.0.2'" in ffcv.advice


def test_an_engine_that_cannot_be_imported_is_bad_and_says_what_is_missing(monkeypatch):
    def fail(beton, backend, device):
        raise MissingDependencyError("libopencv_core.so.406: cannot open shared object file")

    monkeypatch.setattr(engines, "_is_installed", lambda package: package == "ffcv")
    monkeypatch.setattr(engines, "_decode", fail)
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


@pytest.mark.parametrize(("trial", "verdict"), [("crashes", "bad"), ("slow", "note")])
def test_a_gpu_on_which_dali_must_not_decode_is_not_tried_in_this_process(
    monkeypatch, trial, verdict
):
    from fastprune.decoding import gpu_probe

    def probe(index, *, again):
        assert again
        return gpu_probe.GpuDecoding(trial, "it ended with SIGSEGV")

    monkeypatch.setattr(engines, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_probe, "probe_gpu_decoding", probe)
    monkeypatch.setattr(engines, "_is_installed", lambda package: package == "nvidia.dali")
    (found,) = [one for one in check_engines() if one.topic == "engine dali, cuda"]
    assert (found.verdict, found.found) == (verdict, "it ended with SIGSEGV")
    assert 'backend="auto" takes the CPU engine' in found.advice
