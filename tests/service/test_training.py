"""Students that train through a service end with the weights of a run without one."""

import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastprune.distillation.trainer import distill
from fastprune.service.credentials import ServerCredentials
from fastprune.settings import make_recipe


def train(beton, out, *, service=None, seed=0, data_seed=None, epochs=2, pruning=None, **more):
    """Weights of a small student after a few epochs."""
    data = {"train": beton, "val": beton, "image_size": 32, "batch_size": 40, "num_workers": 1}
    return load_file(
        distill(
            make_recipe(
                {
                    "data": data | {"service": service, "seed": data_seed} | more,
                    "student": {"network": "resnet8"},
                    "schedule": {"epochs": epochs, "learning_rate": 0.05},
                    **({"pruning": pruning} if pruning else {}),
                    "run": {"out": out, "seed": seed, "device": "cpu"},
                }
            )
        ).student
    )


def are_equal(weights, others):
    return all(np.array_equal(weights[name], others[name]) for name in weights)


def test_a_student_is_the_same_with_and_without_a_service(beton, serve, tmp_path):
    service = serve(beton)
    local = train(beton, tmp_path / "local", service="")
    remote = train(beton, tmp_path / "remote", service=service.address)
    assert are_equal(local, remote)
    assert service.server.status()["views_decoded"] > 0


def test_epochs_that_infobatch_prunes_are_the_same_with_and_without_a_service(
    beton, serve, tmp_path
):
    service = serve(beton)
    settings = {"epochs": 6, "pruning": {"rule": "infobatch", "skip_probability": 0.7}}
    local = train(beton, tmp_path / "local", service="", **settings)
    remote = train(beton, tmp_path / "remote", service=service.address, **settings)
    assert are_equal(local, remote)
    # Validation takes all rows of every epoch; training, fewer.
    assert 6 * 120 < service.server.status()["views_served"] < 12 * 120


def test_runs_of_one_data_seed_share_every_view_and_differ_in_their_weights(beton, serve, tmp_path):
    service = serve(beton)
    first = train(beton, tmp_path / "first", service=service.address, data_seed=5)
    num_decoded = service.server.status()["views_decoded"]
    second = train(beton, tmp_path / "second", service=service.address, seed=1, data_seed=5)
    assert service.server.status()["views_decoded"] == num_decoded > 0
    assert not are_equal(first, second)


@pytest.mark.parametrize(
    "num_kills", [1, pytest.param(20, marks=[pytest.mark.full, pytest.mark.timeout(1800)])]
)
def test_a_server_killed_at_any_moment_changes_no_weight(beton, serve_process, tmp_path, num_kills):
    local = train(beton, tmp_path / "local", service="")
    generator = np.random.default_rng(0)
    for number in range(num_kills):
        process = serve_process(beton)
        killer = threading.Timer(generator.uniform(0, 1), process.kill)
        killer.start()
        remote = train(beton, tmp_path / str(number), service=f"unix:{tmp_path}/service.sock")
        killer.join()
        assert are_equal(local, remote)


def test_a_student_that_a_service_elsewhere_feeds_is_the_same_and_its_token_is_nowhere(
    beton, serve, certificates, tmp_path, monkeypatch
):
    token = "0123456789abcdef" * 2
    (tmp_path / "token").write_text(f"{token}\n")
    monkeypatch.setenv("FASTPRUNE_SERVICE_CA", str(certificates / "ca.pem"))
    credentials = ServerCredentials.read(
        certificates / "server.pem", certificates / "server.key", None, tmp_path / "token"
    )
    service = serve(beton, beside=["grpc+tls://127.0.0.1:0"], credentials=credentials)
    settings = {"epochs": 6, "pruning": {"rule": "infobatch", "skip_probability": 0.7}}
    local = train(beton, tmp_path / "local", service="", **settings)
    settings |= {"service_token_file": tmp_path / "token"}
    remote = train(beton, tmp_path / "remote", service=service.remote, **settings)
    assert are_equal(local, remote)
    assert 6 * 120 < service.server.status()["views_served"] < 12 * 120
    for path in (tmp_path / "remote").rglob("*"):
        assert path.is_dir() or token.encode() not in path.read_bytes()
