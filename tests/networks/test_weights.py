import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune.base.errors import ArtifactError
from fastprune.networks import (
    build_network,
    load_weights,
    network_in_metadata,
    save_weights,
    weights_digest,
    weights_metadata,
)

ROOT = Path(__file__).parents[2]


def network(seed=0, name="resnet8", num_classes=10):
    torch.manual_seed(seed)
    return build_network(name, num_classes=num_classes)


def same_weights(first, second):
    return weights_digest(first) == weights_digest(second)


def test_safetensors_round_trip_keeps_every_weight(tmp_path):
    saved, loaded = network(1), network(2)
    save_weights(saved, tmp_path / "net.safetensors", metadata={"network": "resnet8"})
    load_weights(loaded, tmp_path / "net.safetensors")
    assert same_weights(saved, loaded)


def test_channels_last_weights_are_saved_too(tmp_path):
    saved, loaded = network(1).to(memory_format=torch.channels_last), network(2)
    save_weights(saved, tmp_path / "net.safetensors")
    load_weights(loaded, tmp_path / "net.safetensors")
    assert same_weights(saved, loaded)


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict", "net"])
def test_checkpoint_is_read_whatever_holds_its_weights(tmp_path, key):
    saved, loaded = network(1), network(2)
    state = saved.state_dict()
    content = state if key is None else {"epoch": 240, "accuracy": torch.tensor(0.7), key: state}
    torch.save(content, tmp_path / "net.pth")
    load_weights(loaded, tmp_path / "net.pth")
    assert same_weights(saved, loaded)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    saved, loaded = network(1), network(2)
    torch.save({prefix + k: v for k, v in saved.state_dict().items()}, tmp_path / "net.pth")
    load_weights(loaded, tmp_path / "net.pth")
    assert same_weights(saved, loaded)


def test_checkpoint_without_the_counters_of_batch_normalisation_is_loaded(tmp_path):
    saved, loaded = network(1), network(2)
    state = {k: v for k, v in saved.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "old.pth")
    load_weights(loaded, tmp_path / "old.pth")
    assert same_weights(saved, loaded)


def test_digest_is_that_of_the_wrapped_network():
    plain = network(1)
    assert weights_digest(plain) == weights_digest(nn.DataParallel(plain))
    assert weights_digest(plain) != weights_digest(network(2))


def test_missing_and_unexpected_keys_are_named_and_counted(tmp_path):
    torch.save(network(name="resnet14").state_dict(), tmp_path / "net.pth")
    with pytest.raises(
        ArtifactError,
        match=r"36 unexpected \(layer1\.1\.bn1\.bias, .* and 33 more\)\. Name the network",
    ):
        load_weights(network(name="resnet8"), tmp_path / "net.pth")
    torch.save({"fc.weight": torch.zeros(10, 64), "fc.other": torch.zeros(1)}, tmp_path / "few.pth")
    with pytest.raises(ArtifactError, match=r"46 missing \(.*\); 1 unexpected \(fc\.other\)"):
        load_weights(network(), tmp_path / "few.pth")


def test_checkpoint_of_another_class_count_is_refused_and_nothing_is_loaded(tmp_path):
    target = network(2)
    before = weights_digest(target)
    torch.save(network(1, num_classes=100).state_dict(), tmp_path / "net.pth")
    with pytest.raises(
        ArtifactError, match=r"fc\.weight is \(100, 64\), not \(10, 64\).*number of classes"
    ):
        load_weights(target, tmp_path / "net.pth")
    assert weights_digest(target) == before


def test_checkpoint_with_code_in_it_is_not_run(tmp_path):
    torch.save({"model": network()}, tmp_path / "net.pth")
    with pytest.raises(ArtifactError, match=r"more than tensors.*Save its state dict alone"):
        load_weights(network(), tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("content", "found"), [({"epoch": 3}, "found: epoch"), ([1], "found: list")]
)
def test_checkpoint_without_weights_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(ArtifactError, match=f"no state dict \\({found}\\).*torch.save"):
        load_weights(network(), tmp_path / "net.pth")


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.pth does not exist"):
        load_weights(network(), tmp_path / "none.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_checkpoint_is_named(tmp_path, suffix):
    (tmp_path / f"net{suffix}").write_bytes(b"PK\x03\x04 no checkpoint at all")
    with pytest.raises(ArtifactError, match=r"net\..* cannot be read as a checkpoint"):
        load_weights(network(), tmp_path / f"net{suffix}")


def test_metadata_is_what_was_saved_with_the_weights(tmp_path):
    save_weights(network(), tmp_path / "net.safetensors", metadata={"network": "resnet8"})
    assert weights_metadata(tmp_path / "net.safetensors")["network"] == "resnet8"
    assert weights_metadata(tmp_path / "net.pth") == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("image_size", "224x224"),
        ("image_size", "0"),
        ("image_size", "99999"),
        ("num_classes", "ten"),
        ("num_classes", "-1"),
        ("mean", "0.5, 0.5, 0.5"),
        ("mean", '["a", "b", "c"]'),
        ("std", "[0, 0, 0]"),
        ("class_names", "cat, dog"),
        ("class_names", "[1, 2]"),
    ],
)
def test_texts_of_other_tools_under_our_names_are_warned_of_and_left_out(
    tmp_path, caplog, name, text
):
    path = tmp_path / "net.safetensors"
    save_weights(network(), path, metadata={"network": "resnet8", name: text})
    assert weights_metadata(path) == {"format": "pt", "network": "resnet8"}
    assert f"{path}: {name!r} in its header is {text!r}, which is ignored" in caplog.text


def test_metadata_of_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.safetensors does not exist"):
        weights_metadata(tmp_path / "none.safetensors")
    (tmp_path / "net.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ArtifactError, match=r"net\.safetensors cannot be read as a checkpoint"):
        weights_metadata(tmp_path / "net.safetensors")


def test_file_may_name_a_network_but_no_code(tmp_path):
    assert network_in_metadata({"network": "resnet8"}, "a.safetensors") == "resnet8"
    assert network_in_metadata({"network": "timm:resnet18"}, "a.safetensors") == "timm:resnet18"
    assert network_in_metadata({}, "a.safetensors") is None
    with pytest.raises(ArtifactError, match=r"a\.safetensors names the factory 'os:system'"):
        network_in_metadata({"network": "os:system"}, "a.safetensors")


def test_equal_weights_make_equal_bytes_in_every_process(tmp_path):
    metadata = {f"key {number}": "ü" * number for number in range(20)}
    code = (
        "import sys, torch; from fastprune.networks import build_network, save_weights;"
        "torch.manual_seed(0);"
        f"save_weights(build_network('resnet8', num_classes=3), sys.argv[1], metadata={metadata})"
    )
    for name in ("a", "b", "c"):
        subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True, cwd=ROOT)
    first, *others = ((tmp_path / name).read_bytes() for name in ("a", "b", "c"))
    assert others == [first, first]
    assert weights_metadata((tmp_path / "a").rename(tmp_path / "a.safetensors")) == {
        "format": "pt",
        **metadata,
    }
