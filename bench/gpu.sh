#!/usr/bin/env bash
# Everything that needs a GPU: a smoke, goals G1 to G9 against every rival, tests, memory and race checks, and the table.
# usage: bench/gpu.sh DIR [PART...]             results as JSON, logs and table.md in DIR; all parts by default
#        bench/gpu.sh --rehearse DIR [PART...]  without a GPU: the same code on small sizes; its times mean nothing
#        bench/gpu.sh --list                    the parts
#        bench/gpu.sh --prepare                 without a GPU: compile what need not be compiled during a lease
# A lease of half an hour is calls of less than nine minutes, each as
#   FASTENS_PACKED=$OUT/results.tar.gz SECONDS_IN_ALL=530 bench/gpu.sh build/lease PART...
# with the former call's results.tar.gz brought back as build/lease/results.tar.gz, and build/prepared, from --prepare:
#   1. environment prepared smoke ours roofline     2. G1 G2     3. G3 G4     4. the rest, in the order of --list
# A part takes less than PART_SECONDS (570) or is stopped, and with SECONDS_IN_ALL the last is stopped by then. What is
# done is not done again: parts that passed leave DIR/PART.done, questions that are measured their JSON, compilers their
# caches in build/bench-cache, and all of DIR is packed as DIR/results.tar.gz, or $FASTENS_PACKED, after every part; where
# DIR is new but for that file, it is unpacked first. DIR/choices.json is what was measured of each way to compute an op, and what the wheel
# ships once kept (python -m bench.gpu_table keep DIR).
set -uo pipefail
cd "$(dirname "$0")/.."
parts=(environment prepared smoke ours roofline G1 G2 G3 G4 library sanitizer_conv sanitizer_tma sanitizer_racecheck G5 G6
  G7_1 G7_16 tests forest sanitizer_memcheck G8 ddpmpp_1 ddpmpp_16 ddpmpp_256 ffhq256_1 ffhq256_16 G4_ways blocks ends
  profile mask G7_songunet_1 G7_songunet_16 G9)
rehearse=
case "${1:-}" in
  --list) printf '%s\n' "${parts[@]}"; exit ;;
  --prepare) exec "${PYTHON:-python3}" -m bench.gpu_prepare make ;;
  --rehearse) rehearse=1; shift ;;
esac
out=$(mkdir -p "${1:?usage: bench/gpu.sh [--rehearse] DIR [PART...]}" && cd "$1" && pwd)
shift
[ $# -gt 0 ] && parts=("$@")
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
limit=${PART_SECONDS:-570}
all=${SECONDS_IN_ALL:-1000000}
export FASTENS_BENCH_OUT="$out" FASTENS_CACHE="$out" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$PWD/build/bench-cache/inductor" TRITON_CACHE_DIR="$PWD/build/bench-cache/triton"
[ -z "$rehearse" ] || export FASTENS_BENCH_DEVICE=cpu TRITON_INTERPRET=1
commit=${FASTENS_BENCH_COMMIT:-$(git describe --always --dirty 2>/dev/null)}
if [ -z "$commit" ]; then  # a copy of the tree without its history
  commit=tree-$(find bench csrc fastens tests -type f ! -name '*.pyc' ! -name '*.so' -print0 | sort -z | xargs -0 cat | sha256sum | cut -c1-12)
fi
export FASTENS_BENCH_COMMIT="$commit"
cache=$PWD/build/bench-cache/tests  # what tests measure is of no use to anybody
failed=0
[ -f "$out/results.tar.gz" ] && tar -xzf "$out/results.tar.gz" -C "$out" --skip-old-files
[ -d build/bench-cache ] || rm -f "$out"/{prepared,library,forest}.done  # another machine, which has none of them
packed=${FASTENS_PACKED:-$out/results.tar.gz}

pack() {  # whole or not at all
  local partial
  partial=$(mktemp) && tar -czf "$partial" -C "$out" --exclude ./results.tar.gz . && mv "$partial" "$packed"
}
run() {  # run PART COMMAND...: its log in DIR; a failure is counted, and the rest goes on
  local part=$1 started=$SECONDS status=0
  shift
  if [ "$(cat "$out/$part.done" 2>/dev/null)" = "$commit" ]; then echo "done    $part"; return; fi
  local left=$((all - SECONDS < limit ? all - SECONDS : limit))
  if [ "$left" -lt 20 ]; then echo "left    $part: no time"; failed=1; return; fi
  FASTENS_BENCH_SECONDS=$((left * 3 / 4)) timeout "$left" "$@" >"$out/$part.log" 2>&1 || status=$?
  case $status in
    0) echo "$commit" >"$out/$part.done"; echo "ok      $part ($((SECONDS - started)) s)" ;;
    124) echo "STOPPED $part after $left s: run it again"; failed=1 ;;
    *) echo "FAILED  $part: $out/$part.log"; failed=1 ;;
  esac
}
bench() { run "$1" "$python" -m pytest -q -p no:cacheprovider "bench/$2.py" -k "$3"; }
sanitize() {  # sanitize PART TOOL FILE SELECTION
  run "sanitizer_$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTENS_CACHE="$cache" compute-sanitizer --tool "$2" \
    --error-exitcode 1 --target-processes all "$python" -m pytest -q -x -m gpu "tests/kernels/$3.py" -k "$4"
}

for part in "${parts[@]}"; do
  case $part in
    environment | prepared | library | forest | tests | sanitizer_*)
      if [ -n "$rehearse" ]; then echo "left    $part: it needs a GPU, or is for one"; continue; fi ;;&
    environment) run environment nvidia-smi ;;
    prepared) run prepared "$python" -m bench.gpu_prepare install "$TRITON_CACHE_DIR" ;;
    smoke) run smoke "$python" -m bench.gpu_smoke ;;
    ours) run ours "$python" -m bench.gpu_ours "$out" ;;
    library) run library "$python" fastens/_build.py --cuda fastens/_lib build/cuda ;;
    forest) run forest "$python" fastens/_build.py fastens/_lib build/cpu ;;
    tests) run tests env FASTENS_CACHE="$cache" "$python" -m pytest -q -m gpu tests ;;
    sanitizer_memcheck) sanitize memcheck memcheck test_on_gpu "reductions and ([1-torch or [17-torch) or not reductions" ;;
    sanitizer_racecheck) sanitize racecheck racecheck test_on_gpu "reductions and [5-torch or member_ops or bits" ;;
    sanitizer_conv) sanitize conv memcheck test_conv2d_on_gpu "bfloat16 or size" ;;
    sanitizer_tma) sanitize tma memcheck test_tma_on_gpu "bfloat16" ;;
    G4) bench G4 bench_gpu_ops test_conv ;;
    G5) bench G5 bench_gpu_ops test_group_norm ;;
    G6) bench G6 bench_gpu_ops test_aggregate ;;
    mask) bench mask bench_gpu_dropout test_mask ;;
    G1) bench G1 bench_gpu_steps "songunet-1]" ;;
    G2) bench G2 bench_gpu_steps "songunet-16]" ;;
    G3) bench G3 bench_gpu_steps "songunet-256]" ;;
    ddpmpp_* | ffhq256_*) bench "$part" bench_gpu_steps "${part/_/-}]" ;;
    G7_songunet_*) bench "$part" bench_gpu_dropout "songunet-${part##*_}]" ;;
    G7_*) bench "$part" bench_gpu_dropout "ddpmpp-${part##*_}]" ;;
    G9) bench G9 bench_gpu_likelihood test_ ;;
    G4_ways) bench G4_ways bench_gpu_conv test_ways ;;
    blocks) bench blocks bench_gpu_conv test_residual_block ;;
    ends) bench ends bench_gpu_conv layer ;;
    G8) bench G8 bench_gpu_sampler test_whole_run ;;
    roofline) run roofline "$python" -m bench.gpu_roofline "$out" ;;
    profile) run profile "$python" -m bench.gpu_profile "$out/profile.md" ;;
    *) echo "FAILED  $part is no part: bench/gpu.sh --list"; failed=1 ;;
  esac
  pack
done
if "$python" -m bench.gpu_table table "$out" >"$out/table.md"; then cat "$out/table.md"; else failed=1; fi
pack
exit $failed
