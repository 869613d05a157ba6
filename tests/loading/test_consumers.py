"""Real consumers, where they are installed: each takes the loader in place of its own."""

import json

import pytest
import torch
from torch import nn

from fastprune.adapters.torchdistill import TorchdistillLoader
from fastprune.base.errors import InvalidValueError
from fastprune.loading.loader import Loader
from fastprune.rows.teacher_cache import TeacherCache
from tests.conftest import require_library

ROWS = ("images", "labels", "rows")

# What other packages warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def _loader(path, **settings):
    return Loader(path, batch_size=6, image_size=32, device="cpu", **settings)


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))


def test_timm_schedules_by_length_and_trains_on_normalized_batches(bare_beton):
    require_library("timm")
    import timm
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, accuracy

    loader = _loader(bare_beton)
    model = timm.create_model("resnet10t", num_classes=3, in_chans=3).to(
        memory_format=torch.channels_last
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        num_epochs=2,
        warmup_epochs=0,
        updates_per_epoch=len(loader),
        step_on_epochs=False,
    )
    meter, updates = AverageMeter(), 0
    for epoch in range(num_epochs):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        if loader.mixup_enabled:
            loader.mixup_enabled = False
        for images, target in loader:
            output = model(images)
            nn.functional.cross_entropy(output, target).backward()
            optimizer.step()
            optimizer.zero_grad()
            meter.update(accuracy(output, target)[0].item(), len(images))
            updates += 1
            scheduler.step_update(num_updates=updates)
    assert updates == num_epochs * len(loader)
    assert meter.count == updates * 6


def test_lightning_trains_names_the_epochs_and_validates(bare_beton, tmp_path):
    require_library("lightning")
    import lightning

    train, val = (
        _loader(bare_beton, fields=ROWS),
        _loader(bare_beton, train=False),
    )
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = _network()

        def training_step(self, batch, number):
            images, labels, rows = batch
            seen.append((self.current_epoch, rows.tolist()))
            return nn.functional.cross_entropy(self.network(images), labels)

        def validation_step(self, batch, number):
            images, labels = batch
            self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), train, val)
    expected = []
    for epoch in range(2):
        train.set_epoch(epoch)
        expected += [(epoch, rows.tolist()) for _, _, rows in train]
    assert seen == expected


def test_lightning_spawns_two_processes_that_share_the_rows(bare_beton, tmp_path):
    require_library("lightning")
    import lightning

    from tests.loading.spawned import Module

    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(
        Module(tmp_path),
        _loader(bare_beton, fields=ROWS, tail="pad", num_workers=1),
    )
    rows = [json.loads((tmp_path / f"rows-{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(set(rows[0] + rows[1])) == list(range(30))
    assert len(rows[0]) == len(rows[1]) == 18


def test_accelerate_leaves_the_loader_as_it_is(bare_beton):
    require_library("accelerate")
    import accelerate

    loader = _loader(bare_beton)
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    accelerator = accelerate.Accelerator(cpu=True)
    network, optimizer, prepared = accelerator.prepare(network, optimizer, loader)
    assert prepared is loader
    for images, labels in prepared:
        accelerator.backward(nn.functional.cross_entropy(network(images), labels))
        optimizer.step()
        optimizer.zero_grad()


def _torchdistill_box(teacher, loader, *, teacher_path, teacher_proc="forward_batch_only"):
    """A box that distills logits, `teacher_path` being where the teacher's come from."""
    from torchdistill.core.distillation import DistillationBox

    config = {
        "num_epochs": 1,
        "teacher": {"requires_grad": False},
        "student": {},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {
                                "student_module_path": "1",
                                "student_module_io": "output",
                                "teacher_module_path": teacher_path,
                                "teacher_module_io": "output",
                                "temperature": 4.0,
                                "alpha": 0.9,
                                "reduction": "batchmean",
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    for role, path, proc in (
        ("teacher", teacher_path, teacher_proc),
        ("student", "1", "forward_batch_only"),
    ):
        config[role]["forward_proc"] = proc
        # "." is the whole network, whose output needs no hook.
        config[role]["forward_hook"] = {"input": [], "output": [] if path == "." else [path]}
    cpu = torch.device("cpu")
    box = DistillationBox(teacher, _network(), {}, config, cpu, None, False, 1.0)
    box.train_data_loader = loader
    return box


def _torchdistill_epoch(box):
    """Losses of the steps of an epoch."""
    box.pre_epoch_process(epoch=0)
    losses = []
    for sample_batch, targets, supp_dict in box.train_data_loader:
        box.pre_forward_process()
        loss = box.forward_process(sample_batch, targets, supp_dict)
        box.post_forward_process(loss=loss)
        losses.append(float(loss))
    box.post_epoch_process()
    return losses


def test_torchdistill_distils_with_the_supplement(bare_beton):
    require_library("torchdistill")
    loader = TorchdistillLoader(_loader(bare_beton, fields=ROWS))
    losses = _torchdistill_epoch(_torchdistill_box(_network(), loader, teacher_path="1"))
    assert len(losses) == len(loader)
    assert all(loss > 0 for loss in losses)


def test_torchdistill_distils_from_a_teacher_cache_and_asks_no_teacher(bare_beton, tmp_path):
    require_library("torchdistill")
    from torchdistill.core.interfaces.registry import register_forward_proc_func

    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    plain = TorchdistillLoader(_loader(bare_beton, fields=ROWS, num_views=1))
    with TeacherCache.create(
        tmp_path / "cache",
        rows=plain.rows,
        num_classes=3,
        num_views=1,
        dtype="float32",
        identity=plain.view_identity(),
    ) as cache:
        for images, _, supplement in plain:
            cache.put(supplement["rows"], 0, teacher(images).detach())
    cached = {"fields": (*ROWS, "teacher_logits"), "teacher_cache": tmp_path / "cache"}
    loader = TorchdistillLoader(_loader(bare_beton, **cached))
    plain.set_epoch(0)
    asked = _torchdistill_epoch(_torchdistill_box(teacher, plain, teacher_path="."))

    @register_forward_proc_func
    def forward_cached(model, images, targets=None, supp_dict=None, **kwargs):
        return supp_dict["cached_data"]["teacher_outputs"]

    box = _torchdistill_box(nn.Identity(), loader, teacher_path=".", teacher_proc="forward_cached")
    assert _torchdistill_epoch(box) == asked


def test_torchdistill_finds_cached_logits_where_its_own_cache_would_be(bare_beton, tmp_path):
    plain = _loader(bare_beton, fields=ROWS, num_views=1)
    with TeacherCache.create(
        tmp_path / "cache",
        rows=plain.rows,
        num_classes=3,
        num_views=1,
        dtype="float32",
        identity=plain.view_identity(),
    ) as cache:
        cache.put(plain.rows, 0, torch.eye(3)[torch.from_numpy(plain.rows) % 3].numpy())
    cached = {"fields": (*ROWS, "teacher_logits"), "teacher_cache": tmp_path / "cache"}
    _, labels, supplement = next(iter(TorchdistillLoader(_loader(bare_beton, **cached))))
    logits = supplement["cached_data"]["teacher_outputs"]
    assert torch.equal(logits, torch.eye(3)[labels])
    assert supplement["cached_data"]["extracted_outputs"]["."]["output"] is logits
    _, labels, supplement = next(iter(TorchdistillLoader(plain)))
    assert supplement.keys() == {"rows"}
    assert torch.equal(supplement["rows"] % 3, labels)


def test_torchdistill_refuses_other_fields(bare_beton):
    with pytest.raises(InvalidValueError, match=r"torchdistill needs fields=.*not \('images', 'l"):
        TorchdistillLoader(_loader(bare_beton))
