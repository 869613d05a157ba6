import weakref

import torch

from fastprune.difficulty.teacher import make_teacher, ready_forward
from tests.difficulty.betons import small_teacher


def test_views_of_a_batch_are_not_held_together():
    seen, alive = [], []

    def views():
        for _ in range(5):
            images = torch.rand(2, 3, 16, 16)
            seen.append(weakref.ref(images))
            alive.append(sum(view() is not None for view in seen))
            yield images, torch.tensor([0, 1]), torch.tensor([0, 1])

    with ready_forward(
        make_teacher(small_teacher(), num_classes=3),
        feature_layer=None,
        image_size=16,
        device=torch.device("cpu"),
        precision="fp32",
        compile_network=False,
    ) as forward:
        _, features, _ = forward.examine(views())
    assert features.shape == (2, 64)
    assert max(alive) <= 2
