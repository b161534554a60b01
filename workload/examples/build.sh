#!/bin/sh
# build.sh OUTDIR [NAME...] compiles the example workloads (threshold, rolling,
# anomaly; all of them unless named) into OUTDIR/NAME, ready to be packed: the
# manifest, the module and its models. The same compilers make the same bytes,
# wherever this tree and OUTDIR are.
#
# Needs clang, lld, wasi-libc and libclang-rt-14-dev-wasm32 (threshold), Debian's
# rustc and libstd-rust-dev-wasm32 (rolling), Go (anomaly).
set -eu
[ $# -ge 1 ] || { echo "usage: build.sh OUTDIR [NAME...]" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
[ $# -ge 1 ] || set -- threshold rolling anomaly
cd "$(dirname "$0")"

need() {
	command -v "$1" >/dev/null || { echo "build.sh: $1 is missing: apt-get install $2" >&2; exit 3; }
}

threshold() {
	need clang "clang lld wasi-libc libclang-rt-14-dev-wasm32"
	(cd threshold && clang --target=wasm32-wasi -std=gnu11 -O2 -g0 -Wall -Wextra -Werror \
		-Wl,--strip-all -o "$out/threshold/threshold.wasm" threshold.c)
}

# A rustc of another origin, first on PATH, has no standard library for wasm32-wasi.
rolling() {
	need /usr/bin/rustc "rustc libstd-rust-dev-wasm32"
	(cd rolling && /usr/bin/rustc --target wasm32-wasi --edition 2021 --crate-type cdylib \
		--crate-name rolling -D warnings -C opt-level=2 -C panic=abort -C codegen-units=1 \
		-C strip=symbols -o "$out/rolling/rolling.wasm" rolling.rs)
}

anomaly() {
	need go "golang-go"
	(cd anomaly && GOOS=wasip1 GOARCH=wasm CGO_ENABLED=0 GOFLAGS= GOWASM= GOWORK=off \
		go build -trimpath -buildvcs=false -buildmode=c-shared -ldflags '-s -w -buildid=' \
		-o "$out/anomaly/anomaly.wasm" .)
	cp anomaly/model.json "$out/anomaly/"
}

for name; do
	case $name in
	threshold | rolling | anomaly) ;;
	*) echo "build.sh: no example is named $name" >&2; exit 2 ;;
	esac
	mkdir -p "$out/$name"
	"$name"
	cp "$name/workload.toml" "$out/$name/"
done
