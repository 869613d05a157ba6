"""How fast is spherical k-means, against the matrix product it needs and against other libraries?

    python benchmarks/clusters.py [--rows 200000 --width 2048 --clusters 1000]

An iteration (each row's nearest center, and each center's new direction) takes turns with the bare
product of all rows and all centers. Others are compared by time until a solution at least as good:
they run first, and ours gets as many iterations as it needs to reach their mean distance; where it
settles above it, the result says so and has no speedup. Each of these runs once.
"""

import argparse
import importlib.metadata
import importlib.util
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from _harness import ratios, spread, take_turns, write_result
from threadpoolctl import threadpool_limits

from fastprune.base.cpus import cpus_per_rank
from fastprune.difficulty.clusters import _inverse_lengths, _Lloyd, spherical_kmeans


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument(
        "--peer-rows", type=int, default=50_000, help="beside others, which are slow"
    )
    parser.add_argument("--peer-clusters", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", help="not used; every benchmark takes it")
    arguments = parser.parse_args()
    # Compiled code is loaded, and the threads are there, before memory is looked at.
    spherical_kmeans(draw_features(2000, arguments.width, 10), 10)
    features = draw_features(arguments.rows, arguments.width, arguments.clusters)
    before = peak_bytes()
    spherical_kmeans(features, arguments.clusters, max_iterations=1)
    extra_bytes = max(0, peak_bytes() - before)
    iteration = measure_iteration(features, arguments.clusters, rounds=arguments.rounds)
    extra_share = extra_bytes / features.nbytes
    features = draw_features(arguments.peer_rows, arguments.width, arguments.peer_clusters)
    peers = {
        name: compare(features, arguments.peer_clusters, run)
        for name, module, run in (
            ("scikit-learn MiniBatchKMeans", "sklearn", with_sklearn),
            ("faiss Kmeans, spherical", "faiss", with_faiss),
        )
        if importlib.util.find_spec(module)
    }
    result = {
        "rows": arguments.rows,
        "width": arguments.width,
        "clusters": arguments.clusters,
        **iteration,
        "extra_bytes_over_features": extra_share,
        "peer_rows": arguments.peer_rows,
        "peer_clusters": arguments.peer_clusters,
        "peers": peers,
        "peer_versions": {
            name: importlib.metadata.version(name)
            for name, module in (("scikit-learn", "sklearn"), ("faiss-cpu", "faiss"))
            if importlib.util.find_spec(module)
        },
    }
    path = write_result("clusters", result)
    print(f"an iteration takes {iteration['iteration_over_product']['median']:.2f} of the product")
    for name, peer in peers.items():
        print(f"{name}: {peer['peer_seconds']:.1f} s, {peer['peer_mean_distance']:.5f}; ours")
        print(f"  {peer['seconds']:.1f} s, {peer['mean_distance']:.5f}, speedup {peer['speedup']}")
    print(f"-> {path}")


def draw_features(num_rows, width, num_clusters):
    """Rows around directions that overlap, as features of classes do."""
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((num_clusters, width), dtype=np.float32)
    features = generator.standard_normal((num_rows, width), dtype=np.float32)
    # In small parts: the memory that ours takes is measured as what comes on top of the features.
    for start in range(0, num_rows, 256):
        part = features[start : start + 256]
        part += 0.5 * directions[generator.integers(0, num_clusters, len(part))]
    return features


def peak_bytes():
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_iteration(features, num_clusters, *, rounds):
    """Seconds of one iteration over all rows, and of the product alone."""
    rows = np.arange(len(features))
    products = np.empty((8192, num_clusters), np.float32)
    # BLAS as the package has it in an iteration: one thread for each block of rows.
    with ThreadPoolExecutor(cpus_per_rank()) as pool:
        lloyd = _Lloyd(features, _inverse_lengths(features), map_blocks=pool.map)
        lloyd.centers = units(features[:num_clusters])
        centers = lloyd.centers.copy()

        def product():
            # With all of the library's threads, in parts whose result fits the memory.
            for start in range(0, len(features), 8192):
                part = features[start : start + 8192]
                np.matmul(part, centers.T, out=products[: len(part)])

        def iteration():
            with threadpool_limits(1, user_api="blas"):
                lloyd.move_centers(rows, *lloyd.assign(rows))

        seconds = take_turns({"product": product, "iteration": iteration}, rounds=rounds)
    return {
        "iteration_seconds": spread(seconds["iteration"]),
        "product_seconds": spread(seconds["product"]),
        "iteration_over_product": ratios(seconds["iteration"], seconds["product"]),
    }


def compare(features, num_clusters, run):
    """Time until ours is as good as a peer."""
    run(features[: 20 * num_clusters], num_clusters)  # imports and threads
    started = time.perf_counter()
    centers = run(features, num_clusters)
    peer_seconds = time.perf_counter() - started
    peer_mean = mean_distance(features, centers)
    for iterations in (0, 1, 2, 4, 8, 16, 30):
        started = time.perf_counter()
        ours = spherical_kmeans(features, num_clusters, max_iterations=iterations, tolerance=0)
        seconds = time.perf_counter() - started
        # Also where it has settled above: further iterations would change nothing.
        if ours.inertia / len(features) <= peer_mean or ours.iterations < iterations:
            break
    mean = ours.inertia / len(features)
    return {
        "peer_seconds": peer_seconds,
        "peer_mean_distance": peer_mean,
        "seconds": seconds,
        "mean_distance": mean,
        "iterations": iterations,
        "speedup": peer_seconds / seconds if mean <= peer_mean else None,
    }


def mean_distance(features, centers):
    """1 - cosine to the nearest of a peer's centers, on the scale that ours is judged by."""
    centers = (centers / np.linalg.norm(centers, axis=1, keepdims=True)).astype(np.float32)
    total = 0.0
    for start in range(0, len(features), 8192):
        part = features[start : start + 8192]
        cosines = (part @ centers.T).max(axis=1) / np.linalg.norm(part, axis=1)
        total += float((1 - cosines).sum(dtype=np.float64))
    return total / len(features)


def units(features):
    """Rows of length 1: for those, Euclidean and cosine k-means look for the same thing."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def with_sklearn(features, num_clusters):
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(num_clusters, batch_size=4096, n_init=1, random_state=0)
    return model.fit(units(features)).cluster_centers_


def with_faiss(features, num_clusters):
    import faiss

    model = faiss.Kmeans(
        features.shape[1],
        num_clusters,
        niter=10,
        spherical=True,
        seed=0,
        max_points_per_centroid=len(features),
    )
    model.train(units(features))
    return model.centroids


if __name__ == "__main__":
    main()
