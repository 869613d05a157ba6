"""timm's distillation task with reshaping: in a loop as timm's train script has it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastprune import convert, open_beton
from fastprune.base.errors import InvalidValueError
from fastprune.rows.subset import Subset
from tests.images import write_image_folder

timm = pytest.importorskip("timm")

from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.task import LogitDistillationTask  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

from fastprune.adapters.timm import ReshapedDistillationTask  # noqa: E402

CLASS_STD = np.array([1.0, 2.0, 0.5, 3.0])


@pytest.fixture
def networks():
    torch.manual_seed(0)
    student = timm.create_model("resnet10t", num_classes=4)
    teacher = timm.create_model("resnet10t", num_classes=4)
    return student, teacher


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    return images, torch.arange(8) % 4


def make(networks, class_std=CLASS_STD, *, with_teacher=True, **options):
    student, teacher = networks
    options = {"criterion": nn.CrossEntropyLoss(), "task_loss_weight": 0.1, "temperature": 4.0} | (
        options
    )
    return ReshapedDistillationTask(
        student, teacher if with_teacher else None, class_std=class_std, verbose=False, **options
    )


def test_without_class_std_the_losses_are_those_of_timm(networks, batch):
    student, teacher = networks
    theirs = LogitDistillationTask(
        student,
        teacher,
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=0.1,
        temperature=4.0,
        verbose=False,
    ).eval()(*batch)
    ours = make(networks, None).eval()(*batch)
    assert {name: value.tolist() for name, value in ours.items()} == {
        name: value.tolist() for name, value in theirs.items()
    }


def test_logits_of_the_teacher_get_the_deviation_of_their_class(networks, batch):
    images, labels = batch
    task = make(networks).eval()
    with torch.no_grad():
        logits = networks[1].eval()(images)
        expected = logits * (torch.tensor(CLASS_STD)[labels] / logits.std(dim=1))[:, None]
        given = make(networks, None, with_teacher=False).eval()(images, labels, expected.float())
    torch.testing.assert_close(task(images, labels)["kd_loss"], given["kd_loss"])


def test_a_subset_brings_its_class_std(networks, batch, tmp_path):
    Subset(np.arange(3), class_std=CLASS_STD).save(tmp_path / "half.npy")
    expected = make(networks).eval()(*batch)["loss"]
    assert make(networks, tmp_path / "half.npy").eval()(*batch)["loss"] == expected
    assert make(networks, Subset.load(tmp_path / "half.npy")).eval()(*batch)["loss"] == expected


def test_mixed_images_get_the_mean_deviation_of_their_classes(networks, batch):
    images, labels = batch
    task = make(networks, criterion=SoftTargetCrossEntropy()).eval()
    one_hot = nn.functional.one_hot(labels, 4).float()
    plain = make(networks).eval()(images, labels)["kd_loss"]
    torch.testing.assert_close(task(images, one_hot)["kd_loss"], plain)
    halves = (one_hot + one_hot.roll(1, dims=0)) / 2
    deviations = task.reshape(torch.randn(8, 4), halves).std(dim=1)
    expected = (CLASS_STD[labels] + CLASS_STD[labels.roll(1)]) / 2
    np.testing.assert_allclose(deviations.numpy(), expected, rtol=1e-5)


def train(task, images, labels, *, mixup=None, steps=8):
    """One epoch, as train_one_epoch of timm's script has it, with EMA."""
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", lr=1e-3)
    average = ModelEmaV3(task.trainable_module, decay=0.9)
    task.train()
    losses = []
    for _ in range(steps):
        mixed, target = mixup(images, labels) if mixup else (images, labels)
        result = task(mixed, target)
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(task.trainable_module)
        losses.append(result["loss"].item())
    return losses


def test_timm_trains_with_it_and_the_teacher_stays_as_it_is(networks, batch):
    before = {name: value.clone() for name, value in networks[1].state_dict().items()}
    losses = train(make(networks), *batch)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in networks[1].state_dict().items())


def test_timm_trains_with_it_on_mixed_images(networks, batch):
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=4)
    losses = train(make(networks, criterion=SoftTargetCrossEntropy()), *batch, mixup=mixup)
    assert all(np.isfinite(losses))


def test_given_logits_take_the_place_of_a_teacher(networks, batch):
    images, labels = batch
    task = make(networks, with_teacher=False).eval()
    assert not list(task.teacher.parameters())
    with torch.no_grad():
        logits = networks[1].eval()(images)
    with_teacher = make(networks).eval()(images, labels)["loss"]
    torch.testing.assert_close(task(images, labels, logits)["loss"], with_teacher)


def test_without_a_teacher_logits_are_demanded(networks, batch):
    with pytest.raises(InvalidValueError, match=r"no teacher.*field \"teacher_logits\""):
        make(networks, with_teacher=False)(*batch)


def test_given_logits_are_refused_for_mixed_targets(networks, batch):
    images, labels = batch
    task = make(networks, with_teacher=False, criterion=SoftTargetCrossEntropy())
    with pytest.raises(InvalidValueError, match=r"mixed ones \(8, 4\).*without mixup"):
        task(images, nn.functional.one_hot(labels, 4).float(), torch.zeros(8, 4))


def test_a_subset_of_other_classes_is_refused(networks):
    with pytest.raises(InvalidValueError, match="class_std has 2 classes, but the student has 4"):
        make(networks, np.ones(2))


def test_a_bare_subset_is_refused(networks, tmp_path):
    with pytest.raises(InvalidValueError, match=r"no class std.*fastprune select"):
        make(networks, Subset(np.arange(3)))


_TWO_PROCESSES = """
import sys

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, reduce_tensor
from torch import nn

from fastprune import Loader
from fastprune.adapters.timm import ReshapedDistillationTask

# What timm's train.py does, in its order, on two processes: task, DDP, EMA, an epoch, validation.
beton, subset, with_mixup = sys.argv[1], sys.argv[2], sys.argv[3] == "mixup"
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
loader_train = Loader(beton, subset, batch_size=4, image_size=32, device="cpu", num_workers=1)
loader_eval = Loader(beton, train=False, batch_size=4, image_size=32, device="cpu", num_workers=1)
torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=3)
teacher = timm.create_model("resnet10t", num_classes=3)
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05)
mixup = Mixup(mixup_alpha=0.8, num_classes=3) if with_mixup else None
task = ReshapedDistillationTask(
    model,
    teacher,
    class_std=subset,
    criterion=SoftTargetCrossEntropy() if with_mixup else nn.CrossEntropyLoss(),
    distill_loss_weight=0.9,
    task_loss_weight=0.1,
    temperature=4.0,
    verbose=False,
)
task.setup_ema(decay=0.9)
task.prepare_distributed(device_ids=None)
scheduler, epochs = create_scheduler_v2(
    optimizer, num_epochs=1, warmup_epochs=0, updates_per_epoch=len(loader_train)
)
losses = AverageMeter()
loader_train.sampler.set_epoch(0)
task.train()
seen = []
for step, (input, target) in enumerate(loader_train):
    input, target = mixup(input, target) if mixup else (input, target)
    result = task(input, target)
    result["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    task.update_ema(step=step)
    losses.update(reduce_tensor(result["loss"].detach(), 2).item(), len(input))
    scheduler.step_update(num_updates=step + 1, metric=losses.avg)
task.eval()
with torch.no_grad():
    top1 = AverageMeter()
    for input, target in loader_eval:
        top1.update(accuracy(task.get_eval_model(ema=True)(input), target)[0].item(), len(input))
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
both = [torch.empty_like(weights) for _ in range(2)]
torch.distributed.all_gather(both, weights)
assert torch.equal(both[0], both[1]), "the processes' students differ"
print(f"rank {rank}: {len(loader_train)} steps, loss {losses.avg:.4f}, {top1.count} rows validated")
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("mix", ["mixup", "plain"])
def test_two_processes_train_an_epoch_as_timms_script_does(mix, tmp_path):
    write_image_folder(tmp_path / "images", classes=3, per_class=16)
    convert(tmp_path / "images", tmp_path / "train.beton")
    fingerprint = open_beton(tmp_path / "train.beton").fingerprint
    Subset(np.arange(0, 48, 2), fingerprint, class_std=CLASS_STD[:3]).save(tmp_path / "half.npy")
    (tmp_path / "train.py").write_text(_TWO_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [tmp_path / "train.py", tmp_path / "train.beton", tmp_path / "half.npy", mix]
    done = subprocess.run(
        [*launcher, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    # 24 rows in batches of 4 for each of two processes; 48 rows to validate.
    assert [line.split(",")[0] for line in lines] == ["rank 0: 3 steps", "rank 1: 3 steps"]
    assert all("24 rows validated" in line and "nan" not in line for line in lines)
