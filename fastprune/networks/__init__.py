"""Teachers and students: networks by name, their features, their weights."""

from fastprune.networks.catalog import (
    PublishedView,
    build_network,
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
    "published_view",
    "published_weights",
    "save_weights",
    "weights_digest",
    "weights_metadata",
]
