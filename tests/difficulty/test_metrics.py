import math

import numpy as np
import pytest
import torch

from fastprune.base.errors import InvalidValueError
from fastprune.difficulty import metrics
from fastprune.settings.score import LOGIT_METRICS


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 7, generator=generator)
    labels = torch.randint(0, 7, (50,), generator=generator)
    return logits, labels, torch.randn(50, 11, generator=generator)


def plain(logits, labels):
    """Probabilities and one-hot labels in numpy's float64."""
    z = logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return p, np.eye(z.shape[1])[labels.numpy()]


def test_metrics_are_those_of_the_formulas(batch):
    logits, labels, features = batch
    p, e = plain(logits, labels)
    error = np.linalg.norm(p - e, axis=1)
    h = features.double().numpy()
    expected = {
        "loss": -np.log((p * e).sum(axis=1)),
        "el2n": error,
        "grand_last": error * np.sqrt(1 + (h**2).sum(axis=1)),
        "margin": (p - 9 * e).max(axis=1) - (p * e).sum(axis=1),
        "entropy": -(p * np.log(p)).sum(axis=1),
        "confidence": 1 - p.max(axis=1),
        "logit_std": logits.double().numpy().std(axis=1, ddof=1),
    }
    found = metrics.logit_metrics(logits, labels, features)
    assert tuple(found) == LOGIT_METRICS == tuple(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-9, err_msg=name)


def test_grand_last_is_the_gradient_norm_of_the_last_layer(batch):
    _, labels, features = batch
    layer = torch.nn.Linear(11, 7).double()
    for h, y, expected in zip(
        features.double(),
        labels,
        metrics.grand_last(layer(features.double()), labels, features).detach(),
        strict=True,
    ):
        loss = torch.nn.functional.cross_entropy(layer(h)[None], y[None])
        gradients = torch.autograd.grad(loss, [layer.weight, layer.bias])
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm == pytest.approx(float(expected), rel=1e-9)


def test_rows_of_a_very_sure_teacher_are_told_apart():
    logits = torch.tensor([[30.0, 0.0], [35.0, 0.0]])
    labels = torch.zeros(2, dtype=torch.int64)
    for name in ("loss", "el2n", "confidence", "entropy"):
        arguments = (logits, labels) if name in ("loss", "el2n") else (logits,)
        less_sure, surer = getattr(metrics, name)(*arguments).float().tolist()
        assert less_sure > surer > 0, name


def test_extreme_logits_give_finite_metrics():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    found = metrics.logit_metrics(logits, torch.tensor([0, 0]), torch.ones(2, 3))
    assert all(values.isfinite().all() for values in found.values())
    assert found["margin"].tolist() == [-1, 1]
    assert found["el2n"][1] == pytest.approx(math.sqrt(2))


def test_half_precision_logits_are_computed_on_in_float64(batch):
    logits, labels, features = batch
    half = logits.half()
    found = metrics.logit_metrics(half, labels, features)
    expected = metrics.logit_metrics(half.double(), labels, features)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_teacher_with_one_logit_is_refused():
    with pytest.raises(InvalidValueError, match="1 logit per image; scores need at least 2"):
        metrics.logit_metrics(torch.zeros(3, 1), torch.zeros(3).long(), torch.zeros(3, 2))
