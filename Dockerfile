# fastprune on a GPU node:  docker run --gpus all -v /data:/data fastprune convert /data/imagenet/train ...
# For a CPU-only image:     docker build --build-arg BASE_IMAGE=debian:bookworm-slim -t fastprune .
ARG BASE_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

# The compiler and the headers that FFCV's build needs stay in this stage.
FROM ${BASE_IMAGE} AS builder
ENV DEBIAN_FRONTEND=noninteractive
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
COPY tools/system-packages.sh tools/
RUN apt-get update && apt-get install -y --no-install-recommends python3 \
    && tools/system-packages.sh && rm -rf /var/lib/apt/lists/*
# What fastprune depends on is a layer of its own, so that a change of our code does not build it
# again. EXTRAS: dali-cuda12 in place of dali-cuda13 for older drivers. TORCH_INDEX: a wheel index
# to take torch from, such as PyTorch's CPU-only one.
ARG EXTRAS="ffcv dali-cuda13 timm"
ARG TORCH_INDEX=
COPY pyproject.toml constraints.txt tools/dependencies.py ./
RUN python3 -m venv /opt/fastprune \
    && python3 dependencies.py ${EXTRAS} > requirements.txt \
    && /opt/fastprune/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY recipes recipes
COPY fastprune fastprune
RUN /opt/fastprune/bin/pip install --no-cache-dir --no-deps .
COPY tools/runtime-packages.sh tools/
RUN tools/runtime-packages.sh /opt/fastprune > /opt/fastprune/runtime-packages

FROM ${BASE_IMAGE}
ENV DEBIAN_FRONTEND=noninteractive
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --from=builder /opt/fastprune/runtime-packages /opt/fastprune/runtime-packages
# /cache and /workspace take any user: clusters choose the user id themselves. Being sticky, they
# keep users from each other's files; compiled code goes to a private folder of each in /cache.
RUN apt-get update \
    && xargs apt-get install -y --no-install-recommends python3 < /opt/fastprune/runtime-packages \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fastprune \
    && install -d -m 1777 /cache /workspace
COPY --from=builder /opt/fastprune /opt/fastprune
ENV PATH=/opt/fastprune/bin:$PATH \
    NUMBA_CACHE_DIR=/cache \
    TORCH_HOME=/cache/torch \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib
USER 10001:10001
WORKDIR /workspace
# Without the GPU: one that is full, or busy, is no illness.
HEALTHCHECK --interval=30m --timeout=2m --start-period=1m \
    CMD ["env", "CUDA_VISIBLE_DEVICES=", "fastprune", "doctor"]
ENTRYPOINT ["fastprune"]
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="fastprune" \
      org.opencontainers.image.description="Knowledge distillation on pruned image datasets" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
