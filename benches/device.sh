#!/usr/bin/env bash
# What only a GPU can tell, on a machine that is lent for a quarter of an hour: two calls of at most
# ten minutes, no network, PyTorch and its usual company installed. From the repository's root:
#
#   bash benches/device.sh prepare ARCHIVE      here: all that goes along, into .device/ (git ignores it)
#   bash benches/device.sh rehearse FOLDER      here: the same work on the CPU, tiny, in FOLDER
#   RESULTS=DIR bash benches/device.sh start    there: sets the work going, returns within 575 s
#   RESULTS=DIR bash benches/device.sh wait     there, at once: until it is done
#
# ARCHIVE holds CIFAR-10 as images, train/<class>/* and test/<class>/*, as .tar.xz. The work goes on
# between the two calls; what it has found so far is copied to RESULTS as it comes: log.txt, the
# GPU tests, the targets, the benches, the metrics of each training, and all of it as results.tar.gz.
# The order is that of worth: the tests decide whether closings are recorded in what follows.
set -uo pipefail

PYTHON=${PYTHON:-python3}
WORK=${WORK:-$HOME/.directpred-device}
BUDGET=${BUDGET:-760} # seconds from the start to the end of all work
CALL=${CALL:-575}     # seconds that a call may take
REHEARSAL=${REHEARSAL:-}
GPU_TESTS=${GPU_TESTS:-tests/test_cuda.py}
TRAIN=${TRAIN:---config cifar10 --evaluate-every 10}
PREDICTORS=${PREDICTORS:-boost_scale linear}
STEPS=${STEPS:-tests targets training benches failed_targets}
found=$WORK/found

prepare() {
  local archive=${1:?the archive of images}
  local exclude
  exclude=$(git rev-parse --git-path info/exclude)
  mkdir -p .device/wheels .device/data "$(dirname "$exclude")"
  grep -qxF '/.device/' "$exclude" 2> /dev/null || echo '/.device/' >> "$exclude"
  rm -f .device/wheels/*
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: -d .device/wheels \
    --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    kornia==0.9.0 kornia_rs==0.2.0 array_api_compat==1.16.0 || return
  "$PYTHON" -m build -q --wheel --outdir .device/wheels . || return
  cp "$archive" .device/data/cifar10.tar.xz || return
  du -sh .device
  ls .device/wheels
}

say() { echo "[$(($(date +%s) - $(cat "$WORK/began"))) s] $*" | tee -a "$found/log.txt"; }

# step NAME SECONDS COMMAND...: what it prints is NAME.txt; 99 where no time is left.
step() {
  local name=$1 limit=$2 left
  shift 2
  left=$(($(cat "$WORK/began") + BUDGET - $(date +%s)))
  ((left < limit)) && limit=$left
  if ((limit < 15)); then
    say "$name: no time left"
    return 99
  fi
  timeout -s TERM -k 25 "$limit" "$@" > "$found/$name.txt" 2>&1
  local status=$?
  say "$name: exit status $status"
  return $status
}

unpack() {
  local site=$WORK/site
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv >> "$found/log.txt"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" .device/wheels/*.whl || return
  # The tree may be newer than the wheel, which is there for the package's metadata.
  rm -rf "$site/directpred"
  cp -r directpred "$site/" && cp -r adapters reference_trainers "$site/directpred/" || return
  mkdir -p "$WORK/cifar10" && tar -xJf .device/data/cifar10.tar.xz -C "$WORK/cifar10"
}

# Tests that are all skipped have shown nothing.
tests() {
  local graphs=on
  step gpu_tests 170 "$PYTHON" -m pytest -q -m gpu "${pytest[@]}" "$GPU_TESTS" &&
    grep -Eq '[0-9]+ passed' "$found/gpu_tests.txt" || graphs=off
  step core_tests 80 "$PYTHON" -m pytest -q -m gpu "${pytest[@]}" "${core_tests[@]}"
  (($? == 1)) && graphs=off
  [ $graphs = on ] || export DIRECTPRED_GRAPHS=0
  say "recorded closings: $graphs"
}

targets() { step targets 100 "$PYTHON" benches/run.py --targets "${bench[@]}" --out "$found"; }

# Not to quote, but to know what there is to gain.
failed_targets() {
  [ -n "${DIRECTPRED_GRAPHS:-}" ] || return
  unset DIRECTPRED_GRAPHS
  mkdir -p "$found/failed"
  step failed_targets 100 "$PYTHON" benches/run.py --targets "${bench[@]}" --out "$found/failed"
}

training() {
  local predictor main='import sys; from directpred.reference_trainers.cli import main; sys.exit(main())'
  for predictor in $PREDICTORS; do
    # A run that is stopped saves itself.
    step "$predictor" 330 "$PYTHON" -c "$main" train "${train[@]}" --predictor "$predictor" \
      --name "$predictor" --out "$WORK/runs"
    cp "$WORK/runs/$predictor/metrics.csv" "$found/$predictor.metrics.csv"
    cp "$WORK/runs/$predictor/summary.json" "$found/$predictor.summary.json"
  done 2>> "$found/log.txt"
}

benches() { step benches 300 "$PYTHON" benches/run.py --gpu "${bench[@]}" --out "$found"; }

work() {
  # Without the safe path the source tree would hide the package that is installed.
  export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 CUDA_MODULE_LOADING=LAZY
  bench=() pytest=(-p no:cacheprovider -n 4) train=()
  core_tests=(tests --ignore "$GPU_TESTS" --ignore tests/reference_trainers --ignore tests/adapters)
  read -ra train <<< "$TRAIN"
  if [ -n "$REHEARSAL" ]; then
    bench=(--rehearse) pytest=(-p no:cacheprovider) core_tests=("$GPU_TESTS")
  else
    unpack || say "unpacking failed"
    export PYTHONPATH=$WORK/site
    train+=(--data "$WORK/cifar10")
    say "unpacked"
  fi
  local each
  for each in $STEPS; do $each; done
  say "done"
}

collect() {
  local name
  for name in log gpu_tests targets benches; do cp "$found/$name.txt" "$RESULTS/"; done
  cp "$found"/*.metrics.csv "$RESULTS/"
  tar -czf "$RESULTS/results.tar.gz" -C "$found" .
} 2> /dev/null

follow() {
  local end=$(($(date +%s) + CALL)) turn=0
  mkdir -p "${RESULTS:?a folder}"
  while [ ! -e "$WORK/done" ] && (($(date +%s) < end)); do
    ((turn++ % 10 == 0)) && collect
    sleep 1
  done
  collect
  cat "$found/log.txt"
  grep -hE '^\| (figure|GPU|CPU)|passed|failed' "$found"/{gpu_tests,targets}.txt 2> /dev/null
  [ -e "$WORK/done" ] || echo "not done yet: bash benches/device.sh wait"
}

main() {
  case "${1:-}" in
    prepare) prepare "${2:-}" ;;
    start)
      rm -rf "$WORK"
      mkdir -p "$found" "$WORK/tree"
      date +%s > "$WORK/began"
      # From a copy: the second call writes the tree anew while the work goes on.
      tar -cf - --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ . | tar -xf - -C "$WORK/tree"
      export PYTHON WORK BUDGET REHEARSAL GPU_TESTS TRAIN PREDICTORS STEPS
      cd "$WORK/tree" || exit
      setsid bash benches/device.sh work < /dev/null > "$WORK/daemon.txt" 2>&1 &
      cd - > /dev/null || exit
      follow
      ;;
    work)
      work
      touch "$WORK/done"
      ;;
    wait) follow ;;
    rehearse)
      local folder=${2:?a folder}
      mkdir -p "$folder"
      folder=$(cd "$folder" && pwd)
      export REHEARSAL=1 WORK=$folder/work RESULTS=$folder/results
      TRAIN="--config digits --epochs 1 --evaluate-every 1 --probe sgd" PREDICTORS=linear \
        exec bash benches/device.sh start
      ;;
    *)
      sed -n '2,/^set/{/^#/p}' "$0"
      exit 2
      ;;
  esac
}

main "$@"
exit
