# fastprune on a GPU node:  docker run --gpus all -v /data:/data fastprune convert /data/imagenet/train ...
#
# CUDA comes with torch's wheels, so the base is plain; NVIDIA's container toolkit adds the driver.
# For builds that can be repeated, give the base by its digest: --build-arg BASE_IMAGE=ubuntu:24.04@sha256:...
ARG BASE_IMAGE=ubuntu:24.04

# The compiler and the headers that FFCV's build needs stay in this stage.
FROM ${BASE_IMAGE} AS dependencies
ENV DEBIAN_FRONTEND=noninteractive
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY tools/system-packages.sh tools/
RUN apt-get update && apt-get install -y --no-install-recommends python3 \
    && tools/system-packages.sh && rm -rf /var/lib/apt/lists/*
# EXTRAS: dali-cuda12 in place of dali-cuda13 for older drivers. TORCH_INDEX: a wheel index to take
# torch from, such as PyTorch's CPU-only one.
ARG EXTRAS="train report ffcv dali-cuda13 timm"
ARG TORCH_INDEX=
COPY pyproject.toml constraints.txt tools/dependencies.py ./
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/fastprune \
    && python3 dependencies.py ${EXTRAS} > requirements.txt \
    && /opt/fastprune/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint constraints.txt --requirement requirements.txt
COPY tools/runtime-packages.sh tools/
RUN tools/runtime-packages.sh /opt/fastprune > /opt/fastprune/runtime-packages

# Our own code: a wheel of a megabyte, a layer of its own upon the gigabytes that seldom change.
FROM dependencies AS code
COPY README.md LICENSE ./
COPY recipes recipes
COPY fastprune fastprune
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/fastprune/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
ENV DEBIAN_FRONTEND=noninteractive
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --from=dependencies /opt/fastprune/runtime-packages /opt/fastprune/runtime-packages
# /cache and /workspace take any user: clusters choose the user id themselves. Being sticky, they
# keep users from each other's files; compiled code goes to a private folder of each in /cache.
RUN apt-get update \
    && xargs apt-get install -y --no-install-recommends python3 < /opt/fastprune/runtime-packages \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fastprune \
    && install -d -m 1777 /cache /workspace
COPY --from=dependencies /opt/fastprune /opt/fastprune
RUN --mount=type=bind,from=code,source=/wheels,target=/wheels \
    /opt/fastprune/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
# The NVIDIA variables are those of NVIDIA's own images: without them, its toolkit adds no driver.
ENV PATH=/opt/fastprune/bin:$PATH \
    NUMBA_CACHE_DIR=/cache \
    TORCH_HOME=/cache/torch \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /workspace
ENTRYPOINT ["fastprune"]
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="fastprune" \
      org.opencontainers.image.description="Knowledge distillation on pruned image datasets" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
