import pytest
import torch
from torch import nn
from torch.nn import functional

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.distillation.evaluation import evaluate, evaluate_checkpoint


class Shift(nn.Module):
    """Logits that do not depend on training mode, and remember it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return images.flatten(1)


def test_evaluation_counts_hits_over_uneven_batches():
    logits = torch.randn(13, 12)
    labels = torch.randint(0, 12, (13,))
    batches = [(logits[:8, :, None, None], labels[:8]), (logits[8:, :, None, None], labels[8:])]
    evaluation = evaluate(Shift(), batches)
    order = logits.argsort(dim=1, descending=True)
    top1 = (order[:, 0] == labels).double().mean()
    top5 = (order[:, :5] == labels[:, None]).any(dim=1).double().mean()
    assert evaluation.rows == 13
    assert evaluation.top1 == pytest.approx(float(top1))
    assert evaluation.top5 == pytest.approx(float(top5))
    assert evaluation.loss == pytest.approx(float(functional.cross_entropy(logits, labels)))


def test_evaluation_restores_the_training_mode():
    model = Shift().train()
    evaluate(model, [(torch.randn(2, 3, 1, 1), torch.tensor([0, 1]))])
    assert model.training


def test_evaluation_without_batches_is_refused():
    with pytest.raises(InvalidValueError, match="no batch to evaluate"):
        evaluate(Shift(), [])


def test_checkpoint_that_does_not_tell_its_network_asks_for_it(tmp_path, betons):
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(InvalidValueError, match=r"weights\.pt does not record its network; give"):
        evaluate_checkpoint(tmp_path / "weights.pt", betons / "val.beton")


def test_impossible_image_size_is_not_taken_for_none(teacher, betons):
    with pytest.raises(InvalidValueError, match="image_size"):
        evaluate_checkpoint(teacher, betons / "val.beton", network="resnet8", image_size=0)


def test_missing_checkpoint_is_named(tmp_path, betons):
    with pytest.raises(ArtifactError, match=r"nowhere\.safetensors does not exist"):
        evaluate_checkpoint(tmp_path / "nowhere.safetensors", betons / "val.beton")
