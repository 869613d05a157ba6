import numpy as np
import pytest
import torch
from torch.nn import functional

from fastprune import LogitReshaper
from fastprune.base.errors import InvalidValueError
from fastprune.distillation.losses import (
    decoupled_distillation_loss,
    distillation_loss,
    feature_loss,
    standardize_logits,
)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_distillation_loss_equals_the_formula_in_numpy():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 5, 7)).astype(np.float32)

    p, q = softmax(teacher / 4.0), softmax(student / 4.0)
    expected = 16.0 * (p * (np.log(p) - np.log(q))).sum(axis=1)
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature=4.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


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


def test_reshaper_does_not_round_what_is_given_in_double_precision():
    logits, labels = torch.randn(6, 10, dtype=torch.float64), torch.arange(6)
    class_std = np.random.default_rng(0).uniform(0.5, 2, 10)
    reshaper = LogitReshaper(class_std)
    assert reshaper(logits, labels).std(dim=1).numpy() == pytest.approx(class_std[:6], rel=1e-14)
    assert reshaper(logits.float(), labels).dtype == torch.float32
    assert LogitReshaper([1, 2, 3]).class_std.dtype == torch.float32


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
    logits = standardize_logits(torch.randn(4, 100) * 7 + 3)
    torch.testing.assert_close(logits.mean(dim=1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.std(dim=1), torch.ones(4), atol=1e-4, rtol=0)


def test_standardizing_constant_logits_gives_no_nan_gradient():
    logits = torch.ones(2, 5, requires_grad=True)
    standardize_logits(logits).square().sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_decoupled_loss_equals_the_formula_in_numpy():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 5, 7)) * 3
    labels = np.array([0, 6, 2, 2, 4])
    temperature, target_weight, others_weight = 4.0, 1.5, 8.0
    expected = []
    for s, t, y in zip(
        softmax(student / temperature), softmax(teacher / temperature), labels, strict=True
    ):
        s_others, t_others = np.delete(s, y) / (1 - s[y]), np.delete(t, y) / (1 - t[y])
        target = t[y] * np.log(t[y] / s[y]) + (1 - t[y]) * np.log((1 - t[y]) / (1 - s[y]))
        others = (t_others * np.log(t_others / s_others)).sum()
        expected.append((target_weight * target + others_weight * others) * temperature**2)
    loss = decoupled_distillation_loss(
        torch.tensor(student, dtype=torch.float32),
        torch.tensor(teacher, dtype=torch.float32),
        torch.tensor(labels),
        temperature=temperature,
        target_weight=target_weight,
        others_weight=others_weight,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_decoupled_loss_weighted_by_the_doubt_of_the_teacher_is_the_whole_divergence():
    student, teacher = torch.randn(2, 1, 5)
    labels = torch.tensor([3])
    doubt = 1 - float(functional.softmax(teacher / 2, dim=1)[0, 3])
    decoupled = decoupled_distillation_loss(
        student, teacher, labels, temperature=2.0, target_weight=1.0, others_weight=doubt
    )
    whole = distillation_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(decoupled, whole, rtol=1e-4, atol=1e-6)


def test_feature_loss_is_one_minus_the_cosine():
    student = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(feature_loss(student, teacher), torch.tensor([0.0, 1.0, 2.0, 1.0]))


LOSSES = {
    "kd": lambda s, t, y: distillation_loss(s, t, temperature=4.0),
    "dkd": lambda s, t, y: decoupled_distillation_loss(s, t, y, temperature=4.0),
    "features": lambda s, t, y: feature_loss(s, t),
}


@pytest.fixture(params=LOSSES)
def loss_of(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_those_of_the_same_numbers_in_float32(loss_of, dtype):
    student, teacher = (torch.randn(2, 6, 10) * 20).to(dtype)
    labels = torch.randint(0, 10, (6,))
    loss = loss_of(student, teacher, labels)
    assert loss.dtype == torch.float32
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, loss_of(student.float(), teacher.float(), labels))


def test_losses_send_no_gradient_into_the_teacher(loss_of):
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4, requires_grad=True)
    loss_of(student, teacher, torch.tensor([0, 3, 1])).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_losses_of_a_student_equal_to_its_teacher_are_zero(loss_of):
    logits = torch.randn(4, 10)
    loss = loss_of(logits, logits, torch.tensor([0, 1, 2, 9]))
    torch.testing.assert_close(loss, torch.zeros(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4])
def test_losses_and_gradients_are_finite_for_sure_and_for_constant_outputs(loss_of, scale):
    student = (torch.randn(4, 10) * scale).requires_grad_()
    loss = loss_of(student, torch.randn(4, 10) * scale, torch.tensor([0, 1, 2, 9]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()


def test_loss_of_a_row_does_not_depend_on_its_batch(loss_of):
    student, teacher = torch.randn(2, 5, 10)
    labels = torch.randint(0, 10, (5,))
    alone = torch.cat(
        [loss_of(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]) for i in range(5)]
    )
    torch.testing.assert_close(loss_of(student, teacher, labels), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reshaper_equals_the_reference_expression_on_a_large_batch(dtype):
    logits = torch.randn(512, 1000, dtype=dtype) * torch.rand(512, 1, dtype=dtype) * 10
    labels = torch.randint(0, 1000, (512,))
    class_std = torch.rand(1000) * 3
    expected = logits * class_std[labels][:, None] / logits.std(dim=1, keepdim=True)
    reshaped = LogitReshaper(class_std)(logits, labels)
    torch.testing.assert_close(reshaped, expected, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("value", [0.0, 2.0, 3.7])
def test_reshaper_of_constant_logits_has_a_finite_gradient(value):
    logits = torch.full((2, 10), value, requires_grad=True)
    LogitReshaper(torch.ones(10))(logits, torch.tensor([0, 1])).sum().backward()
    assert torch.isfinite(logits.grad).all()
