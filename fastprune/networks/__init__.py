"""Teachers and students: networks by name, their features, their weights."""

from fastprune.networks.catalog import build_network
from fastprune.networks.features import FeatureNetwork, classifier_name
from fastprune.networks.weights import load_weights, save_weights, weights_digest

__all__ = [
    "FeatureNetwork",
    "build_network",
    "classifier_name",
    "load_weights",
    "save_weights",
    "weights_digest",
]
