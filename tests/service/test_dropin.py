"""Other people's loops use a service by the environment alone, and train to the same weights."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune.loading.loader import Loader
from tests.conftest import require_library
from tests.service.test_bits import make_loader

ROOT = Path(__file__).parents[2]

# A rank of torchrun: it prints a digest of two epochs' batches. No word of a service.
RANK = """
import hashlib, sys
import torch.distributed
from fastprune import Loader
torch.distributed.init_process_group("gloo")
loader = Loader(sys.argv[1], batch_size=7, image_size=32, augment="rrc", tail="pad",
                fields=("images", "labels", "rows"),
                num_workers=1, device="cpu")
digest = hashlib.blake2b()
for epoch in range(2):
    for images, labels, rows in loader:
        digest.update(images.contiguous().numpy().tobytes() + rows.numpy().tobytes())
print("rank", torch.distributed.get_rank(), digest.hexdigest(), flush=True)
torch.distributed.destroy_process_group()
"""


def repdistiller_weights(path):
    """Weights after two epochs of RepDistiller's loop: input, target, index."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    loader = Loader(
        path,
        batch_size=6,
        image_size=32,
        fields=("images", "labels", "rows"),
        device="cpu",
        num_workers=1,
    )
    for epoch in range(2):
        loader.set_epoch(epoch)
        for input, target, _index in loader:  # noqa: A001 - their names
            with torch.no_grad():
                logit_t = teacher(input.float())
            logit_s = student(input.float())
            loss = nn.functional.cross_entropy(logit_s, target)
            loss = loss + (logit_s - logit_t).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in student.parameters()])


def timm_weights(path):
    """Weights after an epoch of timm's loop."""
    import timm
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter, accuracy

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3, in_chans=3)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
    loader = Loader(path, batch_size=20, image_size=32, device="cpu", num_workers=1)
    meter = AverageMeter()
    loader.sampler.set_epoch(0)
    for images, target in loader:
        output = model(images)
        nn.functional.cross_entropy(output, target).backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.update(accuracy(output, target)[0].item(), len(images))
    assert meter.count == 120
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.filterwarnings("ignore")  # what other packages warn of is theirs
@pytest.mark.parametrize("train", [repdistiller_weights, timm_weights])
def test_a_loop_trains_to_the_same_weights_by_the_environment_alone(
    beton, serve, monkeypatch, train
):
    if train is timm_weights:
        require_library("timm")
    local = train(beton)
    service = serve(beton)
    monkeypatch.setenv("FASTPRUNE_SERVICE", service.address)
    assert torch.equal(train(beton), local)
    assert service.server.status()["views_served"] >= 120


def digest_of_rank(path, rank):
    loader = make_loader(path, "", batch_size=7, tail="pad", distributed=(rank, 2), device="cpu")
    digest = hashlib.blake2b()
    for _ in range(2):
        for images, _, rows in loader:
            digest.update(images.contiguous().numpy().tobytes() + rows.numpy().tobytes())
    return digest.hexdigest()


def test_two_ranks_of_torchrun_get_their_batches_from_one_service(beton, serve, tmp_path):
    service = serve(beton)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {"PYTHONPATH": str(ROOT), "FASTPRUNE_SERVICE": service.address}
    done = subprocess.run(
        [*launcher, str(script), str(beton)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} {digest_of_rank(beton, rank)}" in done.stdout
    # Nine batches of seven for each rank in each epoch; the rows that pad the end come twice.
    status = service.server.status()
    assert status["views_served"] == 2 * 2 * 9 * 7
    assert 0 < status["views_decoded"] <= 2 * 120
