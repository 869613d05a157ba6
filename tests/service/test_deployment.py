"""The files to deploy a service with: they parse, and their commands and addresses fit together."""

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from fastprune.cli import main
from fastprune.service.address import parse_address

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]


class Loader(yaml.SafeLoader):
    """YAML as Compose reads it, with its tag for what a service does not take over."""


Loader.add_constructor("!reset", lambda loader, node: None)


def parse(words):
    """Parse a command's arguments as the command line does, and return its options."""
    with main.make_context("fastprune", list(words), resilient_parsing=False) as context:
        name, command, rest = main.resolve_command(context, words)
        return command.make_context(name, rest, parent=context).params


def listens_at(words):
    """The folder in which a server makes its socket, and its address."""
    (address,) = parse(words)["listen"]
    return str(Path(parse_address(address).path).parent), address


def test_compose_has_a_server_and_two_trainers_with_its_socket():
    found = yaml.load((ROOT / "compose.yaml").read_text(), Loader)
    services = found["services"]
    folder, address = listens_at(shlex.split(services["serve"]["command"]))
    assert services["serve"]["healthcheck"]["test"][-1] == address
    for name in ("serve", "train-a", "train-b"):
        service = services[name]
        assert service["profiles"] == ["service"]
        assert f"service:{folder}" in service["volumes"]
        assert service["extends"] in services
    for name in ("train-a", "train-b"):
        assert services[name]["environment"]["FASTPRUNE_SERVICE"] == address
        assert parse(shlex.split(services[name]["command"]))["resume"]
        assert "serve" in services[name]["depends_on"]
    assert "service" in found["volumes"]


def test_a_daemonset_serves_the_jobs_of_its_node():
    server, job = yaml.safe_load_all((ROOT / "deploy" / "service.yaml").read_text())
    assert (server["kind"], job["kind"]) == ("DaemonSet", "Job")
    pods = [document["spec"]["template"]["spec"] for document in (server, job)]
    containers = [pod["containers"][0] for pod in pods]
    folder, address = listens_at(containers[0]["args"])
    assert containers[0]["livenessProbe"]["exec"]["command"][-1] == address
    assert {"name": "FASTPRUNE_SERVICE", "value": address} in containers[1]["env"]
    assert parse(containers[1]["args"])["resume"]
    sockets = [
        volume["hostPath"]["path"]
        for pod in pods
        for volume in pod["volumes"]
        if volume["name"] == "socket"
    ]
    assert len(sockets) == 2
    assert len(set(sockets)) == 1
    # The socket is its owner's alone.
    assert pods[0]["securityContext"]["runAsUser"] == pods[1]["securityContext"]["runAsUser"]
    for pod, container in zip(pods, containers, strict=True):
        assert folder in [mount["mountPath"] for mount in container["volumeMounts"]]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert (
        server["spec"]["selector"]["matchLabels"]
        == server["spec"]["template"]["metadata"]["labels"]
    )
    memory = parse(containers[0]["args"])["memory"]
    limit = containers[0]["resources"]["limits"]["memory"]
    assert memory + (300 << 20) < int(limit.removesuffix("Gi")) << 30


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_serves_trains_and_ends_the_server(tmp_path):
    # In the place of Slurm and of fastprune: they note what they were started with.
    tools = {
        "srun": "while [[ $1 == --* ]]; do shift; done\n"
        f'[ $2 = serve ] && echo $$ > {tmp_path}/42.0\nexec "$@"',
        "scancel": f'[ $1 = --signal=TERM ] && kill "$(cat {tmp_path}/$2)"',
        "fastprune": f'echo "$FASTPRUNE_SERVICE $*" >> {tmp_path}/log\n'
        'if [ "$1" = serve ]; then trap "exit 0" TERM\n'
        'python3 -c "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])" '
        '"${FASTPRUNE_SERVICE#unix:}"\n'
        f"while sleep 0.05; do :; done; fi; [ $2 != bad.toml ]",
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    script = ["bash", str(ROOT / "deploy" / "service.sbatch"), "train.beton", "val.beton"]
    for recipes, status in ((["a.toml", "b.toml"], 0), (["a.toml", "bad.toml"], 1)):
        (tmp_path / "log").unlink(missing_ok=True)
        done = subprocess.run(
            [*script, *recipes], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        lines = [line.split(" ", 1) for line in (tmp_path / "log").read_text().splitlines()]
        (address,) = {address for address, _ in lines}
        serving, *training = sorted(words for _, words in lines)
        assert parse(shlex.split(serving))["listen"] == (address,)
        assert parse(shlex.split(serving))["betons"] == (Path("train.beton"), Path("val.beton"))
        assert [parse(shlex.split(words))["resume"] for words in training] == [True, True]
        assert not Path(parse_address(address).path).parent.exists()
