import pytest
import torch

from fastprune.base.errors import InvalidValueError
from fastprune.loading.batch import choose_device


def test_auto_is_cuda_where_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def test_unknown_device_is_refused():
    with pytest.raises(InvalidValueError, match="torch does not know the device 'warp'"):
        choose_device("warp")


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValueError, match="torch sees no CUDA device"):
        choose_device("cuda:1")
