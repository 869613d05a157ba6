"""Training without labels: from a teacher's features alone, or its logits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastprune.base.errors import ArtifactMismatch, RecipeError
from fastprune.beton.convert.writer import convert
from fastprune.distillation.evaluation import evaluate_checkpoint
from fastprune.distillation.trainer import distill
from fastprune.loading.loader import Loader
from fastprune.networks import build_network, load_weights, save_weights

FEATURES = {"cross_entropy_weight": 0, "distillation_weight": 0, "feature_weight": 1}


@pytest.fixture(scope="session")
def unlabeled(betons):
    path = betons / "unlabeled.beton"
    convert(betons / "images" / "train", path, workers=1, unlabeled=True)
    return path


@pytest.fixture
def headless_teacher(tmp_path):
    torch.manual_seed(3)
    path = tmp_path / "headless.safetensors"
    save_weights(build_network("resnet14", num_classes=0), path)
    return {"network": "resnet14", "checkpoint": path}


def sections(unlabeled, teacher, **more):
    data = {"train": unlabeled, "val": None, "labels": False}
    return {"data": data, "teacher": teacher, "loss": FEATURES} | more


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_student_learns_the_features_of_a_teacher_without_a_classifier(
    recipe, unlabeled, headless_teacher
):
    schedule = {"epochs": 8, "learning_rate": 0.05}
    settings = recipe(**sections(unlabeled, headless_teacher, schedule=schedule))
    result = distill(settings)
    seen = losses(settings.run.out)
    assert seen[-1] < 0.7 * seen[0]
    assert result.top1_last is None
    assert result.curve == []
    state = load_file(result.student)
    assert not any(name.startswith("fc") for name in state)
    student = build_network("resnet8", num_classes=0)
    load_weights(student, result.student)
    assert student.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 64)


def test_its_loss_is_one_minus_the_cosine_of_projected_features(
    recipe, unlabeled, headless_teacher
):
    settings = recipe(**sections(unlabeled, headless_teacher))
    distill(settings)
    assert all(0 < loss <= 2 for loss in losses(settings.run.out))


def test_a_timm_teacher_without_a_head_teaches(recipe, unlabeled, tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    save_weights(build_network("timm:resnet10t", num_classes=0), tmp_path / "t.safetensors")
    teacher = {"network": "timm:resnet10t", "checkpoint": tmp_path / "t.safetensors"}
    assert distill(recipe(**sections(unlabeled, teacher))).steps > 0


def test_labels_of_a_labeled_beton_are_not_looked_at(recipe, betons, unlabeled, headless_teacher):
    first = distill(recipe(**sections(unlabeled, headless_teacher)))
    other = {"out": first.student.parent.with_name("other")}
    second = distill(recipe(**sections(betons / "train.beton", headless_teacher, run=other)))
    ours, theirs = load_file(first.student), load_file(second.student)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_logits_teach_without_labels_too(recipe, unlabeled, teacher):
    loss = {"cross_entropy_weight": 0, "distillation_weight": 1}
    checkpoint = {"network": "resnet8", "checkpoint": teacher, "num_classes": 10}
    result = distill(recipe(**sections(unlabeled, checkpoint, loss=loss)))
    assert load_file(result.student)["fc.weight"].shape == (10, 64)


def test_logits_of_a_teacher_without_a_classifier_are_refused(recipe, unlabeled, headless_teacher):
    loss = {"cross_entropy_weight": 0, "distillation_weight": 1}
    with pytest.raises(RecipeError, match=r"distillation_weight = 1.*teacher\.num_classes"):
        distill(recipe(**sections(unlabeled, headless_teacher, loss=loss)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": FEATURES | {"cross_entropy_weight": 0.1}}, r"cross_entropy_weight = 0\.1 needs"),
        ({"loss": FEATURES | {"label_smoothing": 0.1}}, r"label_smoothing = 0\.1 needs labels"),
        ({"loss": FEATURES | {"distillation": "dkd"}}, r"distillation = 'dkd' needs labels"),
        ({"loss": FEATURES | {"feature_weight": 0}}, r"are both 0.*nothing else to learn from"),
    ],
)
def test_a_recipe_names_what_needs_labels(recipe, unlabeled, headless_teacher, change, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**(sections(unlabeled, headless_teacher) | change))


def test_without_labels_there_must_be_a_teacher(recipe, unlabeled):
    data = {"train": unlabeled, "val": None, "labels": False}
    with pytest.raises(RecipeError, match=r"data\.labels = false .*\[teacher\] is missing"):
        recipe(data=data, loss={"cross_entropy_weight": 0})


def test_reshaping_by_class_needs_labels(recipe, unlabeled, headless_teacher, half):
    settings = sections(unlabeled, headless_teacher, loss=FEATURES | {"reshaping": "class_std"})
    settings["data"]["subset"] = half
    with pytest.raises(RecipeError, match=r"reshaping = 'class_std' needs labels.*leave it out"):
        recipe(**settings)


def test_validation_by_top1_needs_labels(recipe, betons, unlabeled, headless_teacher):
    settings = sections(unlabeled, headless_teacher)
    settings["data"]["val"] = betons / "val.beton"
    with pytest.raises(RecipeError, match=r"data\.val = .*top-1, which needs labels.*leave it out"):
        recipe(**settings)


def test_with_labels_a_validation_set_is_needed(recipe):
    with pytest.raises(RecipeError, match=r"data\.val is missing\."):
        recipe(data={"val": None})


def test_images_without_labels_are_refused_where_labels_are_looked_at(recipe, betons, unlabeled):
    with pytest.raises(RecipeError, match=r"data\.train = .*without labels.*data\.labels = false"):
        distill(recipe(data={"train": unlabeled}))
    with pytest.raises(RecipeError, match=r"data\.val = .*without labels"):
        distill(recipe(data={"val": unlabeled}))


def test_a_student_without_a_classifier_has_no_accuracy(
    recipe, betons, unlabeled, headless_teacher
):
    student = distill(recipe(**sections(unlabeled, headless_teacher))).student
    with pytest.raises(ArtifactMismatch, match=r"no classifier.*gives features"):
        evaluate_checkpoint(student, betons / "val.beton", device="cpu")


def test_accuracy_is_not_measured_on_images_without_labels(betons, unlabeled, tmp_path):
    save_weights(build_network("resnet8", num_classes=10), tmp_path / "s.safetensors")
    with pytest.raises(ArtifactMismatch, match=r"converted without labels"):
        evaluate_checkpoint(
            tmp_path / "s.safetensors", unlabeled, network="resnet8", image_size=32, device="cpu"
        )


def test_the_loader_gives_label_zero(unlabeled):
    loader = Loader(unlabeled, batch_size=20, image_size=32, device="cpu")
    assert all((labels == 0).all() for _, labels in loader)
