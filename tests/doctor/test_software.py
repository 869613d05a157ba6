import pytest
import torch

from fastprune.doctor.machine import check_cuda, check_packages


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_versions_are_listed():
    assert f"torch {torch.__version__.partition('+')[0]}" in check_packages().found


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    finding = check_cuda()
    assert (finding.verdict, finding.found) == ("good", "NVIDIA H100; CUDA 13.0")


def test_a_container_without_gpu_is_told_the_option(tmp_path):
    finding = check_cuda(devices=tmp_path)
    assert finding.verdict == "note"
    assert "docker run --gpus all" in finding.advice


def test_a_gpu_that_torch_cannot_use_is_bad(tmp_path):
    (tmp_path / "nvidia0").touch()
    finding = check_cuda(devices=tmp_path)
    assert finding.verdict == "bad"
    assert "it must be 13.0 or newer" in finding.advice


def test_a_gpu_that_is_hidden_on_purpose_is_no_fault(tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_cuda(devices=tmp_path).verdict == "note"


def test_torch_without_cuda_is_noted(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in check_cuda().found


def test_torch_that_cannot_be_imported_is_bad(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    finding = check_cuda()
    assert finding.verdict == "bad"
    assert "as a pair" in finding.advice
