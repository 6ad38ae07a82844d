#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go, in under 9 minutes on one H100; writes OUTPUT_DIR/gpu.json.
#
#   benchmarks/gpu.sh OUTPUT_DIR
#
# Correctness comes first (pytest -m gpu), then the branch, its dense form, the engine's mfu, the peers, long sequences, and
# start and stop. Each part has a time limit; one that fails or is cut off is recorded, with the end of its output, and the
# others go on. The exit code is 1 where one did. NANOGPT names a clone of nanoGPT for its row among the peers.
#
# Packages that are missing are named first, all at once. On a machine without a network, put their wheels into a folder
# and name it in WHEELS:
#   python -m pip download --no-deps -d wheels deepspeed==0.19.8 …      (or pip wheel, for a package without one)
#   WHEELS=wheels benchmarks/gpu.sh out
# On a machine without a CUDA device DEVICE=cpu proves the script itself at a small size; SCALE=3 makes its limits 3 times
# as long, for a machine that is busy. PARTS="branch peers" runs some parts only.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUTPUT_DIR}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
parts=${PARTS:-tests branch dense engine_152m engine_1.3b peers long_sequences start_stop}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# A part that is cut off while it compiles leaves half a file, on which the next program that finds it would fail.
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
if [ -n "${WHEELS:-}" ]; then
  site=$scratch/site
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" benchmarks/needs.py || exit 1
mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.code

# part NAME SECONDS COMMAND…: run one with a limit; its output, exit code and seconds go into the folder.
part() {
  local name=$1 limit=$(($2 * ${SCALE:-1})) start=$SECONDS code=0
  shift 2
  case " $parts " in *" $name "*) ;; *) return ;; esac
  echo "== $name (at most $limit s)"
  timeout -k 10 "$limit" "$python" -W ignore "$@" >"$out/$name.txt" 2>&1 || code=$?
  tail -n 12 "$out/$name.txt"
  echo "$code $((SECONDS - start))" >"$out/$name.code"
  echo "== $name: exit code $code, $((SECONDS - start)) s"
}

nanogpt=()
[ -z "${NANOGPT:-}" ] || nanogpt=(--nanogpt "$NANOGPT")
if [ "$device" = cuda ]; then
  branch=(--preset 152m --device cuda --precision bf16 --pairs 15 --no-dense)
  dense=(--preset 152m --device cuda --precision bf16 --pairs 5 --batch 8)
  small=(--shape 152m --device cuda --pairs 6 --steps 3)
  large=(--shape 1.3b --device cuda --pairs 3 --steps 1 --no-baseline train.activation_checkpointing=true)
  peers=(--preset 124m --device cuda --pairs 6 --steps 2)
  lengths=(--device cuda --lengths 1024,4096,8192,32768 --pairs 5)
  stop=(--device cuda --preset 152m --repeats 1 --saves 8)
else
  branch=(--preset tiny --device cpu --pairs 3 --no-dense)
  dense=(--preset tiny --device cpu --pairs 3)
  small=(--shape smoke --pairs 2 --steps 2)
  large=(--shape smoke --pairs 2 --steps 1 --no-baseline train.activation_checkpointing=true)
  peers=(--preset smoke --pairs 2 --steps 2)
  lengths=(--lengths 256,512 --slots 512 --pairs 3)
  stop=(--preset smoke --repeats 1 --saves 4)
fi
part tests 130 -m pytest -q -m gpu -p no:cacheprovider $(grep -rl 'mark.gpu' tests)
part branch 45 benchmarks/step_time.py "${branch[@]}" --json "$out/branch.json"
part dense 25 benchmarks/step_time.py "${dense[@]}" --json "$out/dense.json"
part engine_152m 60 benchmarks/engine_speed.py "${small[@]}" --json "$out/engine_152m.json"
part engine_1.3b 65 benchmarks/engine_speed.py "${large[@]}" --json "$out/engine_1.3b.json"
part peers 110 benchmarks/peers.py "${peers[@]}" ${nanogpt[@]+"${nanogpt[@]}"} --json "$out/peers.json"
part long_sequences 45 benchmarks/long_sequences.py "${lengths[@]}" --json "$out/long_sequences.json"
part start_stop 55 benchmarks/start_stop.py "${stop[@]}" --json "$out/start_stop.json"

"$python" - "$out" "$device" <<'PY'
import json, pathlib, platform, sys
out, device = pathlib.Path(sys.argv[1]), sys.argv[2]
found = {"device": device, "python": platform.python_version(), "parts": {}}
for file in sorted(out.glob("*.code")):
    code, seconds = map(int, file.read_text().split())
    part = {"exit_code": code, "seconds": seconds}
    result, lines = file.with_suffix(".json"), file.with_suffix(".txt").read_text(errors="replace").splitlines()
    part |= {"result": json.loads(result.read_text())} if result.exists() else {"said": lines[-1:]}
    if code:
        part |= {"failed": "cut off by its time limit" if code in (124, 137) else "failed", "said": lines[-15:]}
    found["parts"][file.stem] = part
failed = [name for name, part in found["parts"].items() if part["exit_code"]]
found["failed"] = failed
(out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
print(f"wrote {out / 'gpu.json'}: {len(found['parts'])} parts, failed: {', '.join(failed) or 'none'}")
sys.exit(bool(failed))
PY
