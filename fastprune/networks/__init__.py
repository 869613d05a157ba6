"""Teachers and students: networks by name, their features, their weights.

The names are imported on first use: `fastprune.networks.names` must be had without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastprune.networks.catalog import (
        PublishedView,
        build_network,
        own_classes,
        published_view,
        published_weights,
    )
    from fastprune.networks.features import FeatureNetwork, classifier_name
    from fastprune.networks.weights import (
        load_weights,
        network_in_metadata,
        save_weights,
        weights_digest,
        weights_metadata,
    )

__all__ = [
    "FeatureNetwork",
    "PublishedView",
    "build_network",
    "classifier_name",
    "load_weights",
    "network_in_metadata",
    "own_classes",
    "published_view",
    "published_weights",
    "save_weights",
    "weights_digest",
    "weights_metadata",
]

_HOMES = {
    "FeatureNetwork": "features",
    "PublishedView": "catalog",
    "build_network": "catalog",
    "classifier_name": "features",
    "load_weights": "weights",
    "own_classes": "catalog",
    "published_view": "catalog",
    "published_weights": "catalog",
    "network_in_metadata": "weights",
    "save_weights": "weights",
    "weights_digest": "weights",
    "weights_metadata": "weights",
}


def __getattr__(name: str) -> Any:
    """Import a name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
