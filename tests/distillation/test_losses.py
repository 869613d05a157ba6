import numpy as np
import pytest
import torch

from fastprune import LogitReshaper
from fastprune.distillation.losses import distillation_loss, standardize
from fastprune.errors import InvalidValueError


def test_distillation_loss_equals_the_formula_in_numpy():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 5, 7)).astype(np.float32)

    def softmax(z):
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    p, q = softmax(teacher / 4.0), softmax(student / 4.0)
    expected = 16.0 * (p * (np.log(p) - np.log(q))).sum(axis=1)
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature=4.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_no_gradient_flows_into_the_teacher():
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4, requires_grad=True)
    distillation_loss(student, teacher, temperature=2.0).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reshaper_equals_the_reference_expression(dtype):
    logits = torch.randn(6, 10, dtype=dtype) * 3 + 1
    labels = torch.tensor([0, 9, 3, 3, 5, 1])
    class_std = torch.rand(10) + 0.5
    expected = torch.stack(
        [z / z.std() * class_std[y] for z, y in zip(logits, labels, strict=True)]
    )
    reshaped = LogitReshaper(class_std)(logits, labels)
    torch.testing.assert_close(reshaped, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert reshaped.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reshaper_returns_float32_for_half_precision_logits(dtype):
    logits = torch.randn(2, 10).to(dtype)
    assert LogitReshaper(torch.ones(10))(logits, torch.tensor([0, 1])).dtype == torch.float32


def test_reshaper_leaves_constant_logits_and_empty_classes_as_they_are():
    logits = torch.tensor([[2.0, 2.0, 2.0], [1.0, 2.0, 4.0]])
    reshaped = LogitReshaper([1.0, float("nan"), 1.0])(logits, torch.tensor([0, 1]))
    assert torch.equal(reshaped, logits)


@pytest.mark.parametrize(
    ("class_std", "message"),
    [
        ([1.0, -0.5, 1.0], r"class_std\[1\] is -0.5"),
        ([1.0, 1.0, np.inf], r"class_std\[2\] is inf"),
        ([[1.0, 2.0]], r"shape \(1, 2\)"),
    ],
)
def test_reshaper_refuses_impossible_standard_deviations(class_std, message):
    with pytest.raises(InvalidValueError, match=message):
        LogitReshaper(class_std)


def test_standardized_logits_have_mean_zero_and_deviation_one():
    logits = standardize(torch.randn(4, 100) * 7 + 3)
    torch.testing.assert_close(logits.mean(dim=1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.std(dim=1), torch.ones(4), atol=1e-4, rtol=0)


def test_standardizing_constant_logits_gives_no_nan_gradient():
    logits = torch.ones(2, 5, requires_grad=True)
    standardize(logits).square().sum().backward()
    assert torch.isfinite(logits.grad).all()
