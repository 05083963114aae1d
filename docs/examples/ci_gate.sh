#!/usr/bin/env bash
# Build, verify, and bench against the base branch, on any CI system. docs/ci.md describes it; action.yml runs it.
#
#   MODEL            what to build: digits, a run folder, a diffusers folder, ...; a path is looked for in BASE too
#   TARGET, STEPS    as of mmd-export build; STEPS may be empty for a run folder
#   BUILD_OPTIONS    more options of mmd-export build, split at spaces
#   RUNTIME          as of mmd-export verify and bench; empty: the first that fits
#   BASE             a checkout of the base branch, or a bundle that was built before; empty: no gate
#   BASE_PYTHONPATH  where the base branch's own mmd_export lies; empty: the installed one builds both
#   MAX_REGRESSION   how much slower the new bundle may be; 5%
#   BENCH_OPTIONS    more options of mmd-export bench, split at spaces
#   OUT              folder for everything that is made
#   SUMMARY          Markdown file to append to; OUT/summary.md
#
# Exit codes are those of mmd-export: 4 parity failed, 6 slower than the base. The report is written in either case.
# A BASE that is not there is 2.
set -euo pipefail
MODEL=${MODEL:?name the model, as in MODEL=digits}
TARGET=${TARGET:-onnx}
STEPS=${STEPS:-}
RUNTIME=${RUNTIME:-}
BASE=${BASE:-}
MAX_REGRESSION=${MAX_REGRESSION:-5%}
OUT=${OUT:-mmd-export-ci}
SUMMARY=${SUMMARY:-$OUT/summary.md}
read -r -a build_options <<< "${BUILD_OPTIONS:-}"
read -r -a bench_options <<< "${BENCH_OPTIONS:-}"
runtime=(${RUNTIME:+--runtime "$RUNTIME"})
new=$OUT/new.bundle
if [ -n "$BASE" ] && [ ! -d "$BASE" ]; then
  echo "BASE $BASE is neither a bundle nor a checkout; no such folder" >&2
  exit 2
fi
mkdir -p "$OUT"

build() {  # MODEL OUT
  mmd-export build "$1" --target "$TARGET" ${STEPS:+--steps "$STEPS"} --out "$2" --overwrite ${build_options[@]+"${build_options[@]}"}
}

status=0
build "$MODEL" "$new"
mmd-export verify "$new" ${runtime[@]+"${runtime[@]}"} --json "$OUT/verify.json" --junit "$OUT/verify.xml" --summary "$SUMMARY" || status=$?

gate=()
if [ -f "$BASE/manifest.json" ]; then
  gate=(--against "$BASE" --max-regression "$MAX_REGRESSION")
elif [ -n "$BASE" ]; then
  base_model=$MODEL file=$MODEL format="" options=""
  case $MODEL in ddim:* | guided:*)  # FORMAT:FILE?OPTIONS
    format=${MODEL%%:*}: file=${MODEL#*:}
    case $file in *\?*) options=?${file#*\?} file=${file%%\?*} ;; esac ;;
  esac
  if [ -e "$BASE/$file" ]; then
    base_model=$format$BASE/$file$options
  elif [ -e "$file" ]; then
    echo "$BASE has no $file; the base is built from the same weights" >&2
  fi
  PYTHONPATH=${BASE_PYTHONPATH:-${PYTHONPATH:-}} build "$base_model" "$OUT/base.bundle"
  gate=(--against "$OUT/base.bundle" --max-regression "$MAX_REGRESSION")
fi
slower=0
mmd-export bench "$new" ${runtime[@]+"${runtime[@]}"} ${gate[@]+"${gate[@]}"} ${bench_options[@]+"${bench_options[@]}"} \
  --json "$OUT/bench.json" --junit "$OUT/bench.xml" --summary "$SUMMARY" || slower=$?

if [ -f "$OUT/verify.json" ] && [ -f "$OUT/bench.json" ]; then
  mmd-export report "$new" ${runtime[@]+"${runtime[@]}"} --verify "$OUT/verify.json" --bench "$OUT/bench.json" -o "$OUT/report.html"
fi
if [ "$status" = 0 ]; then status=$slower; fi
exit "$status"
