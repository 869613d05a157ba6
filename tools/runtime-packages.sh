#!/bin/sh
# Print the system packages that hold the libraries which ffcv and opencv load at run time, under
# the names that this release of Debian or Ubuntu gives them. Argument: the virtual environment.
# dpkg does not find the few libraries that it lists outside /usr (libc, zlib): every base has these.
set -eu
find "$1"/lib/python3*/site-packages \( -name '_libffcv*.so' -o -path '*/cv2/cv2*.so' \) -exec ldd {} + \
    | awk '/=> \/(usr|lib)/ {print $3}' | sort -u | xargs -n 1 realpath \
    | xargs dpkg-query --search 2> /dev/null | cut -d : -f 1 | sort -u
