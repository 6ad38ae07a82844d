#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go (under 9 minutes on one H100): the tests marked gpu, the branch's cost at the
# 152 M shape, and a short training run at it under DeepSpeed. Writes one JSON.
#
#   benchmarks/gpu.sh OUTPUT_DIR
#
# On a machine without a network and without some of the packages, put their wheels into a folder and name it in WHEELS:
#   python -m pip download --no-deps -d wheels deepspeed==0.19.8 …      (or pip wheel, for a package without one)
#   WHEELS=wheels benchmarks/gpu.sh out
# On a machine without a CUDA device DEVICE=cpu proves the script itself at a small size.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUTPUT_DIR}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
mkdir -p "$out"
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ "$device" = cuda ]; then
  size=(--preset 152m --device cuda --precision bf16 --pairs 20)
  dense=(--preset 152m --device cuda --precision bf16 --pairs 5 --batch 8)
else
  size=(--preset tiny --device cpu --precision fp32 --pairs 3)
  dense=("${size[@]}")
fi
"$python" -m pytest -q -m gpu -p no:cacheprovider tests | tee "$out/tests.txt"
"$python" benchmarks/step_time.py "${size[@]}" --no-dense --json "$out/branch.json"
"$python" benchmarks/step_time.py "${dense[@]}" --json "$out/dense.json"
"$python" benchmarks/train_throughput.py --device "$device" --output "$out/train.json"
"$python" - "$out" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
parts = {name: json.loads((out / f"{name}.json").read_text()) for name in ("branch", "dense", "train")}
parts["tests"] = (out / "tests.txt").read_text().splitlines()[-1]
(out / "gpu.json").write_text(json.dumps(parts, indent=1) + "\n")
print(f"wrote {out / 'gpu.json'}")
PY
