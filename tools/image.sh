#!/bin/bash
# tools/image.sh build    build localhost/fastprune without a Docker engine, by buildah
# tools/image.sh test     run what is in it: doctor, demo, as an ordinary user, on a read-only root
# tools/image.sh remove   remove it again
#
# Needs root, buildah and debootstrap. Without BASE_IMAGE, a minimal Debian of this machine's own
# release is made as the base. Where packages come from is this machine's configuration (apt, pip,
# CA certificates), lent to the build by mounts; nothing of it stays in the image.
set -euo pipefail
cd "$(dirname "$0")/.."

image=localhost/fastprune
base=${BASE_IMAGE:-localhost/fastprune-base}
store=(--storage-driver overlay)
scratch=$(mktemp -d -t fastprune-image.XXXXXX)
container=""
mounted=""

clean_up() {
    if [ -n "$mounted" ]; then umount -R "$mounted" || true; fi
    if [ -n "$container" ]; then buildah "${store[@]}" rm "$container" > /dev/null || true; fi
    rm -rf --one-file-system "$scratch"
}
trap clean_up EXIT

require_tools() {
    for tool in buildah debootstrap; do
        command -v "$tool" > /dev/null && continue
        echo "make image: $tool is not here. On Debian: apt-get install -y --no-install-recommends buildah debootstrap" >&2
        echo "With a Docker engine: docker build -t fastprune ." >&2
        if [ "${CI:-}" = true ]; then exit 1; fi
        exit 0
    done
}

make_base() {
    local mirror release
    read -r _ mirror release < <(apt-get indextargets --format '$(LABEL) $(REPO_URI) $(CODENAME)' \
        'Created-By: Packages' | grep -E '^(Debian|Ubuntu) \S+ \w+$')
    debootstrap --variant=minbase "$release" "$scratch/root" "$mirror" > "$scratch/debootstrap.log" ||
        { tail -n 20 "$scratch/debootstrap.log" >&2; exit 1; }
    rm -rf "$scratch"/root/var/cache/apt/archives/*.deb
    rm -rf "$scratch/root/dev" # copying /dev/full would fill the disk
    mkdir "$scratch/root/dev"
    container=$(buildah "${store[@]}" from scratch)
    buildah "${store[@]}" add --quiet "$container" "$scratch/root" / > /dev/null
    buildah "${store[@]}" commit --quiet --format docker "$container" "$base" > /dev/null
    buildah "${store[@]}" rm "$container" > /dev/null
    container=""
    rm -rf "$scratch/root"
}

# pip's settings that matter in the build, with the CA certificates where the build sees them.
lend_pip_settings() {
    local bundle=${PIP_CERT:-${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}}
    mkdir "$scratch/pip"
    echo "[global]" > "$scratch/pip/pip.conf"
    if [ -f "$bundle" ]; then
        cp "$bundle" "$scratch/pip/ca.crt"
        echo "cert = /root/.config/pip/ca.crt" >> "$scratch/pip/pip.conf"
    fi
    # Of several sources of a setting, the environment counts; addresses of local files do not.
    python3 -m pip config list 2> /dev/null | tr -d "'" | { grep -v file: || true; } |
        sed -nE 's/^(global|:env:)\.(index-url|extra-index-url|timeout|default-timeout|trusted-host)=/\2 = /p' |
        sed 's/^default-//' | tac | awk '!seen[$1]++' >> "$scratch/pip/pip.conf"
}

build() {
    buildah "${store[@]}" inspect --type image "$base" > /dev/null 2>&1 || make_base
    lend_pip_settings
    local lent=(-v "$scratch/pip:/root/.config/pip:ro")
    if [ -z "${BASE_IMAGE:-}" ]; then lent+=(-v /etc/apt:/etc/apt:ro); fi
    buildah "${store[@]}" bud --layers --isolation chroot --format docker --pull-never "${lent[@]}" \
        --build-arg BASE_IMAGE="$base" --build-arg TORCH_INDEX="${TORCH_INDEX:-}" \
        --build-arg VERSION="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' fastprune/__init__.py)" \
        --build-arg REVISION="$(git rev-parse HEAD 2> /dev/null || true)" \
        -t "$image" .
}

inspect() { buildah "${store[@]}" inspect --type image --format "$1" "$image"; }

in_image() { buildah "${store[@]}" run --isolation chroot "$container" -- "$@"; }

# chroot into the image with its root mounted read-only, as an unknown user, as clusters do it.
read_only() {
    local path=$1
    shift
    chroot --userspec=23456:23456 "$mounted" env -i \
        PATH=/opt/fastprune/bin:/usr/bin:/bin NUMBA_CACHE_DIR=/cache "TMPDIR=$path" "$@"
}

expect() {
    if [ "$2" = "$3" ]; then echo "ok    $1: $2"; else
        echo "FAIL  $1: $2, but expected $3" >&2
        exit 1
    fi
}

test_image() {
    expect "entry point" "$(inspect '{{range .Docker.Config.Entrypoint}}{{.}}{{end}}')" fastprune
    expect "user" "$(inspect '{{.Docker.Config.User}}')" 10001:10001
    expect "version label" "$(inspect '{{index .Docker.Config.Labels "org.opencontainers.image.version"}}')" \
        "$(sed -n 's/^__version__ = "\(.*\)"/\1/p' fastprune/__init__.py)"
    container=$(buildah "${store[@]}" from --pull-never "$image")
    expect "user id in the container" "$(in_image id -u)" 10001
    expect "compilers" "$(in_image sh -c \
        'for name in cc gcc c++ g++ clang; do command -v $name || true; done; echo none')" none
    in_image fastprune doctor --require ffcv --require dali --json > "$scratch/doctor.json"
    in_image fastprune demo --out /tmp/demo --per-class 14 --epochs 1 --teacher resnet8 \
        --teacher-epochs 1 --image-size 32
    test_read_only
    report_sizes
}

test_read_only() {
    local root
    root=$(buildah "${store[@]}" mount "$container")
    mounted=$scratch/read-only
    mkdir "$mounted"
    mount --bind "$root" "$mounted"
    mount -o remount,bind,ro "$mounted"
    mount -t proc proc "$mounted/proc"
    mount -t tmpfs tmpfs "$mounted/dev"
    mkdir -m 1777 "$mounted/dev/shm"
    mknod -m 666 "$mounted/dev/null" c 1 3
    mknod -m 666 "$mounted/dev/urandom" c 1 9
    if read_only /tmp touch /cache/x 2> /dev/null; then
        echo "FAIL  the root is not read-only" >&2
        exit 1
    fi
    # A read-only root with nothing but /dev/shm, then with a temporary folder as well.
    read_only /tmp fastprune doctor --require ffcv --require dali
    mount -t tmpfs -o mode=1777 tmpfs "$mounted/tmp"
    read_only /tmp HOME=/tmp fastprune demo --out /tmp/demo --per-class 14 --epochs 1 \
        --teacher resnet8 --teacher-epochs 1 --image-size 32
}

report_sizes() {
    local root libraries all cuda
    root=$(buildah "${store[@]}" mount "$container")
    libraries=("$root"/opt/fastprune/lib/python3*/site-packages)
    all=$(du -sm "$root" | cut -f 1)
    cuda=$(cd "${libraries[0]}" && du -scm torch nvidia triton cuda* 2> /dev/null | tail -n 1 | cut -f 1)
    echo "size: $all MB, of these torch, triton and NVIDIA's wheels (CUDA, DALI) $cuda MB; without them $((all - cuda)) MB"
}

require_tools
case "${1:-}" in
    build) build ;;
    test) test_image ;;
    remove)
        buildah "${store[@]}" rmi --force "$image"
        if [ -z "${BASE_IMAGE:-}" ]; then buildah "${store[@]}" rmi --force "$base"; fi
        buildah "${store[@]}" rmi --prune --force
        ;;
    *) echo "usage: tools/image.sh build|test|remove" >&2; exit 2 ;;
esac
