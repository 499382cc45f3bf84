#!/usr/bin/env bash
# Build the wheel, install it into a fresh venv outside of the checkout, and train, search and load from there.
# PYTHON: the interpreter of the venv. PIP_OPTIONS: of the installation, such as --no-deps where PYTHONPATH has the rest.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
export PATH="$place/venv/bin:$PATH"
cd "$place"
pip wheel --quiet --no-deps --wheel-dir dist "$checkout"
# shellcheck disable=SC2086
pip install --quiet ${PIP_OPTIONS:-} "$(echo dist/dist_obdsd-*.whl)[train]"
python -c "import dist_obdsd as d; assert d.__file__.startswith('$place'), d.__file__; print(d.__file__, d.__version__)"
dist-obdsd pack glyphs --out data/glyphs-tiny options.variants=1
python -m torch.distributed.run --standalone --nproc-per-node 2 -m dist_obdsd train "$checkout/configs/glyphs_tiny.yaml"
test "$(dist-obdsd status "$checkout/configs/glyphs_tiny.yaml" | head -c 8)" = finished
icons=$(python -c "import matplotlib; print(matplotlib.get_data_path() + '/images')")
dist-obdsd search runs/glyphs_tiny --gallery "$icons" --html found.html "$icons/home.png"
test -s found.html
echo "the wheel works outside of the checkout"
