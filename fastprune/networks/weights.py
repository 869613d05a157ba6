"""Weights of networks in files: safetensors, and PyTorch checkpoints without running pickles."""

import hashlib
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastprune.base.checks import MAX_CLASSES, require_channels
from fastprune.base.errors import ArtifactError
from fastprune.base.headers import parse_json

_CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "network")
_WRAPPERS = ("module.", "_orig_mod.")
_COUNTER = ".num_batches_tracked"
_NAMES_SHOWN = 3
# Of the numbers in a header; more is damage.
_LARGEST = {"image_size": 8192, "num_classes": MAX_CLASSES}

logger = logging.getLogger(__name__)


def save_weights(
    network: nn.Module, path: str | Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write the weights as safetensors.

    The file is written in place; give a temporary path (`atomic_path`) where readers may look.
    `metadata` is kept in the file's header.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(network).items()}
    # save_file() would make a file that only its owner may read, and hide why a disk refuses it.
    data = save(state, metadata={"format": "pt", **(metadata or {})})
    Path(path).write_bytes(_with_sorted_metadata(data))


def _with_sorted_metadata(data: bytes) -> bytes:
    """Sort a safetensors file's texts, which the library writes in the order of its hash map.

    The header is JSON behind its length (little-endian uint64), padded with spaces to eight bytes;
    tensors are found by offsets from its end.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load weights into a network, every one of them or none.

    The file is a .safetensors file, or a PyTorch checkpoint: a state dict, or a dict that holds one
    under `state_dict`, `model`, `model_state_dict`, `net` or `network` (RepDistiller, timm,
    torchvision's references). The prefixes of DistributedDataParallel and torch.compile are
    removed, and batch normalization's counters may be missing, as in old files. Pickled code is
    never run (`weights_only=True`).

    Raises:
        ArtifactError: the file is missing or unreadable, or its names or shapes are not the
            network's.
    """
    own = _state(network)
    # Counters that no result depends on; checkpoints from before torch 0.4.1 have none.
    counters = {name: own[name] for name in own if name.endswith(_COUNTER)}
    state = counters | _unwrapped(_read(Path(path)))
    # Checked before anything is loaded: load_state_dict would leave a half-loaded network.
    faults = [
        _names("missing", own.keys() - state.keys()),
        _names("unexpected", state.keys() - own.keys()),
        _shapes(own, state),
    ]
    if any(faults):
        raise ArtifactError(
            f"{path} does not fit {type(network).__name__}: {'; '.join(filter(None, faults))}. "
            "Name the network that the checkpoint was made from, with its number of classes."
        )
    network.load_state_dict(state)


def weights_metadata(path: str | Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file; none for other files.

    Other tools may write other texts under the names that fastprune reads (image_size, num_classes,
    mean, std, class_names). Those are left out with a warning.

    Raises:
        ArtifactError: the file is missing or unreadable.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Check the name of the checkpoint.") from error
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as a checkpoint ({error}).") from error
    unknown = {name: text for name, text in metadata.items() if not _is_understood(name, text)}
    for name, text in unknown.items():
        logger.warning("%s: %r in its header is %.80r, which is ignored", path, name, text)
    return {name: text for name, text in metadata.items() if name not in unknown}


def _is_understood(name: str, text: str) -> bool:
    """Whether an entry has the form in which `distill` writes it; unknown names pass."""
    try:
        if name in ("image_size", "num_classes"):
            return (name == "image_size") <= int(text) <= _LARGEST[name]
        if name in ("mean", "std"):
            require_channels(name, parse_json(text), positive=name == "std")
        if name == "class_names":
            names = parse_json(text)
            return isinstance(names, list) and all(isinstance(entry, str) for entry in names)
    except ValueError:
        return False
    return True


def network_in_metadata(metadata: dict[str, str], path: str | Path) -> str | None:
    """Return the network that a checkpoint's metadata names, if it names one.

    Raises:
        ArtifactError: it names a factory: code that a file could make us import and run.
    """
    name = metadata.get("network")
    if name is not None and ":" in name and name.partition(":")[0] not in ("timm", "torchvision"):
        raise ArtifactError(
            f"{path} names the factory {name!r} as its network. A file may not choose which code "
            "runs: name the network yourself, if you trust it."
        )
    return name


def weights_digest(network: nn.Module) -> str:
    """Identify the weights of a network.

    Returns:
        32 hex digits of BLAKE2b-128 over the name, dtype, shape and bytes of every tensor of the
        state dict, sorted by name.
    """
    digest = hashlib.blake2b(digest_size=16)
    # Sorted, because the order of definition does not belong to the weights.
    for name, tensor in sorted(_state(network).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, since numpy has no bfloat16.
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def _state(network: nn.Module) -> dict[str, Tensor]:
    return _unwrapped(network.state_dict())


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Checkpoints of a GPU are read on machines without one.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Check the name of the checkpoint.") from error
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} is not a checkpoint, or holds more than tensors and plain values, which could "
            "run code when it is read. Save its state dict alone: "
            "torch.save(torch.load(path, weights_only=False)['model'], 'clean.pt')."
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as a checkpoint ({error}).") from error
    return _find_state(content, path)


def _find_state(content: Any, path: Path) -> dict[str, Tensor]:
    # The state dict itself first: one of its tensors may be called "model".
    candidates = [content]
    if isinstance(content, dict):
        candidates += [content[name] for name in _CONTAINERS if name in content]
    for candidate in candidates:
        if (
            isinstance(candidate, dict)
            and candidate
            and all(isinstance(value, Tensor) for value in candidate.values())
        ):
            return candidate
    keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise ArtifactError(
        f"{path} holds no state dict (found: {keys[:200]}). Save the network with "
        "torch.save(network.state_dict(), path)."
    )


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that DistributedDataParallel and torch.compile add."""
    # Again after each: a compiled network may have been wrapped, or the other way round.
    for prefix in _WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            return _unwrapped({name.removeprefix(prefix): state[name] for name in state})
    return state


def _names(kind: str, names: set[str]) -> str:
    """`2 missing (fc.bias, fc.weight)`; a few names, then a count."""
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {kind} ({shown}{more})"


def _shapes(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """`fc.weight is (100, 64), not (10, 64)`; a few tensors, then a count."""
    wrong = [n for n in own if n in state and own[n].shape != state[n].shape]
    shown = ", ".join(
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in wrong[:_NAMES_SHOWN]
    )
    more = f" and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
    return shown + more
