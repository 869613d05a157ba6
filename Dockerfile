# syntax=docker/dockerfile:1
# fastprune on a GPU node:  docker run --gpus all -v /data:/data fastprune convert /data/imagenet/train ...
# For a CPU-only image:     docker build --build-arg BASE_IMAGE=debian:bookworm-slim .
ARG BASE_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

# The compiler and the headers that FFCV's build needs stay in this stage.
FROM ${BASE_IMAGE} AS builder
ENV DEBIAN_FRONTEND=noninteractive
WORKDIR /src
COPY tools/system-packages.sh tools/
RUN apt-get update && apt-get install -y --no-install-recommends python3 \
    && tools/system-packages.sh && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/fastprune && /opt/fastprune/bin/pip install --no-cache-dir --upgrade pip
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fastprune fastprune
RUN /opt/fastprune/bin/pip install --no-cache-dir --constraint constraints.txt '.[all]'
# The packages that hold the libraries which ffcv and opencv load, under this base's own names.
RUN ldd /opt/fastprune/lib/python3*/site-packages/ffcv/_libffcv*.so \
        /opt/fastprune/lib/python3*/site-packages/cv2/cv2*.so \
    | awk '/=> \/usr|=> \/lib/ {print $3}' | xargs -n 1 realpath | sort -u \
    | xargs dpkg -S 2>/dev/null | cut -d : -f 1 | sort -u > /opt/fastprune/runtime-packages

FROM ${BASE_IMAGE}
ENV DEBIAN_FRONTEND=noninteractive
COPY --from=builder /opt/fastprune /opt/fastprune
RUN apt-get update \
    && xargs apt-get install -y --no-install-recommends python3 < /opt/fastprune/runtime-packages \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fastprune
ENV PATH=/opt/fastprune/bin:$PATH NUMBA_CACHE_DIR=/home/fastprune/.cache/numba
USER fastprune
WORKDIR /home/fastprune
ENTRYPOINT ["fastprune"]
