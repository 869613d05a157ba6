#!/bin/sh
# Install the system packages that FFCV's build and the virtual environment need, where some are
# missing. A machine that has them all is not touched.
set -eu

python=${PYTHON:-python3}
# Another interpreter than the system's has packages of its own: python3.12-venv, python3.12-dev.
package=$(basename "$python")
case $package in python3*) ;; *) package=python3 ;; esac
missing=""
pkg-config --version >/dev/null 2>&1 || missing="$missing pkg-config"
c++ --version >/dev/null 2>&1 || missing="$missing g++"
pkg-config --exists opencv4 2>/dev/null || missing="$missing libopencv-dev"
pkg-config --exists libturbojpeg 2>/dev/null || missing="$missing libturbojpeg0-dev"
"$python" --version >/dev/null 2>&1 || missing="$missing $package"
"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing $package-venv"
"$python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
    >/dev/null 2>&1 || missing="$missing $package-dev"
[ -n "$missing" ] || exit 0

install="apt-get install -y --no-install-recommends$missing"
if ! command -v apt-get >/dev/null 2>&1; then
    echo "Missing system packages (named as on Debian):$missing" >&2
    echo "Install them with your package manager and run the command again." >&2
    exit 1
elif [ "$(id -u)" -eq 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $install
elif sudo -n true 2>/dev/null; then
    sudo apt-get update -qq
    sudo DEBIAN_FRONTEND=noninteractive $install
else
    echo "System packages are missing. Run this, then the command again:" >&2
    echo "    sudo apt-get update && sudo $install" >&2
    exit 1
fi
