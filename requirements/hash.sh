#!/bin/sh
# Write container.txt and container-build.txt: what base.txt and compile.txt pin, with the hashes of the wheels for the
# image's Python on both architectures. Run it after a pin has changed. `make hashes`
set -eu
cd "$(dirname "$0")"
PIP=${PIP:-../.venv/bin/python -m pip}
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

download() { # list of pins, directory
    for machine in x86_64 aarch64; do
        platforms=""
        for glibc in 36 35 34 33 32 31 30 29 28 27 26 25 24 17 12 5; do
            platforms="$platforms --platform manylinux_2_${glibc}_$machine"
        done
        # shellcheck disable=SC2086
        $PIP download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
            --implementation cp --abi cp312 --abi abi3 --abi none --platform "manylinux2014_$machine" $platforms \
            --dest "$2" --requirement "$1"
    done
}

write() { # list of pins, directory, output, what it is of
    {
        echo "# $4, with hashes for CPython 3.12 on x86_64 and aarch64. Made by hash.sh: do not edit."
        sed 's/[[:space:]]*#.*//; /^-r/d; /^$/d' "$1" | sort | while read -r pin; do
            name=$(echo "${pin%%==*}" | tr 'A-Z.-' 'a-z__')
            printf '%s' "$pin"
            sha256sum "$2/$name-"*.whl | cut -d' ' -f1 | sort -u | while read -r hash; do
                printf ' \\\n    --hash=sha256:%s' "$hash"
            done
            echo
        done
    } > "$3.new"
    mv "$3.new" "$3"
}

download base.txt "$wheels"
sed '/^-r/d' compile.txt > "$wheels/compile.txt"
download "$wheels/compile.txt" "$wheels"
cat base.txt "$wheels/compile.txt" > "$wheels/all.txt"
write base.txt "$wheels" container.txt "base.txt"
write "$wheels/all.txt" "$wheels" container-build.txt "compile.txt"
