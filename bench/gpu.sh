#!/usr/bin/env bash
# Everything that needs a GPU: builds, tests, memory and race checks, goals G1 to G7 and G9 against every rival, and the table.
# usage: bench/gpu.sh DIR          results as JSON, logs and table.md in DIR
#        FASTENS_BENCH_DEVICE=cpu bench/gpu.sh DIR    rehearsal without a GPU, on small sizes
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: bench/gpu.sh DIR}" && cd "$1" && pwd)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export FASTENS_BENCH_OUT="$out" PYTHONUNBUFFERED=1
failed=0
step() {  # step NAME COMMAND...: its log in DIR, its failure counted and not final
  local name=$1; shift
  if "$@" >"$out/$name.log" 2>&1; then echo "ok      $name"; else echo "FAILED  $name: $out/$name.log"; failed=1; fi
}
rehearsal=${FASTENS_BENCH_DEVICE:-}
[ "$rehearsal" = cpu ] || step environment nvidia-smi
step build_cpu "$python" fastens/_build.py fastens/_lib build/cpu
step build_cuda "$python" fastens/_build.py --cuda fastens/_lib build/cuda
if [ "$rehearsal" != cpu ]; then
  step tests "$python" -m pytest -q -m gpu tests
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      step "sanitizer_$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --target-processes all "$python" -m pytest -q -x -m gpu tests/kernels
    done
  else
    echo "FAILED  compute-sanitizer is not installed"; failed=1
  fi
fi
step bench_ops "$python" -m pytest -q bench/bench_gpu_ops.py
step bench_steps "$python" -m pytest -q bench/bench_gpu_steps.py
step bench_likelihood "$python" -m pytest -q bench/bench_gpu_likelihood.py
if "$python" -m bench.gpu_table "$out" >"$out/table.md"; then cat "$out/table.md"; else failed=1; fi
exit $failed
