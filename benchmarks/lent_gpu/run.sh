#!/usr/bin/env bash
# In the minutes that a GPU is lent, what counts first; after each step all results in one file.
#
#   bash benchmarks/lent_gpu/run.sh PACKED OUT STEP...
#
# In a checkout, with torch, Triton and build tools. PACKED: of benchmarks.lent_gpu.pack, at the same
# commit. OUT: a folder; OUT/all.tar.xz has what is in it. Steps, each with the seconds it may take:
#   times 330     benchmarks.gpu, its last minute torch.compile's
#   choice 150    benchmarks.gpu_choice.run
#   tests 240     tests/gpu, the tests of csrc/cuda, tests/triton_kernels
#   averages 60   the ways to average, of benchmarks.report
set -uo pipefail
packed=$1 out=$2
shift 2
mkdir -p "$out"

step() {
  case $1 in
    times) timeout 330 python -m benchmarks.gpu --out "$out" --minutes 4 ;;
    choice) timeout 150 python -m benchmarks.gpu_choice.run ;;
    tests)
      timeout 240 python -m pytest -q --numprocesses 10 tests/gpu tests/cuda_on_host \
        tests/triton_kernels -k "not [host and not -host- and not -host]"
      ;;
    averages)
      timeout 60 python -m benchmarks.report --cases ema --device cuda --rounds 5 \
        --out "$out/cuda-ema.json"
      ;;
    *) echo "no step $1" ;;
  esac
}

FASTMT_BUILD_CPP=0 FASTMT_BUILD_CUDA=0 \
  python -m pip install --quiet --no-build-isolation --no-deps --editable . || exit
tar -xJf "$packed" || exit  # after that: an install removes what was built
export TRITON_CACHE_DIR=runs/lent_gpu OMP_NUM_THREADS=1
for name in "$@"; do
  SECONDS=0
  step "$name" >"$out/$name.txt" 2>&1
  echo "$name: status $?, $SECONDS s"
  tail -n 5 "$out/$name.txt"
  tar -C "$out" --exclude=all.tar.xz -cJf "$out.tar.xz" . && mv "$out.tar.xz" "$out/all.tar.xz"
done
