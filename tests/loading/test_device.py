import pytest
import torch

from fastprune.base.errors import InvalidValueError
from fastprune.loading.batch import Copies, choose_device, cuda_index


def test_auto_is_cuda_where_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def test_unknown_device_is_refused():
    with pytest.raises(InvalidValueError, match="device 'warp' is none of torch's"):
        choose_device("warp")


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValueError, match="torch sees no CUDA device"):
        choose_device("cuda:1")


def test_a_cuda_device_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert cuda_index(torch.device("cuda")) == 3
    assert cuda_index(torch.device("cuda:1")) == 1
    assert cuda_index(torch.device("cpu")) is None


def test_a_copy_does_not_share_memory():
    lent = torch.zeros(3)
    owned = Copies().of(lent)
    lent.fill_(1)
    assert not owned.any()
