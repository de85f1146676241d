#!/usr/bin/env bash
# One entry point: makes the virtual environment, builds the ops, then does what the verb says.
# Everything is kept and reused; a second start goes straight to the verb. What that prints is all of stdout.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${OCTET_VENV:-$here/.venv}"

usage() {
  cat <<'EOF'
usage: ./run.sh [serve] [flags]     start the server (the default); ./run.sh serve --help lists the flags
       ./run.sh plan [flags]        what a model takes, and whether it fits: --model NAME --tp N --device a100-80g
       ./run.sh cache [list|clear]  the weights kept for the next start
       ./run.sh quality [flags]     what quantisation costs: --model DIR [--quant wint4] [--prompts FILE]
       ./run.sh test [pytest args]  run the tests
       ./run.sh check               ruff, mypy and clang-format, changing nothing
       ./run.sh bench [name]        run one benchmark of tests/bench, or list them
       ./run.sh eval [--quick]      score the demo model over the API: every skill, bf16, wint8 and wint4, TP 1 and 8

variables
  OCTET_PYTHON        interpreter for the virtual environment (default: a python3 of at least 3.10)
  OCTET_VENV          where the virtual environment lives (default: .venv beside run.sh)
  OCTET_EXTRAS        more extras of pyproject.toml to install, as in OCTET_EXTRAS=compare
  OCTET_PADDLE        what pip shall install instead of the CPU's PaddlePaddle, with its own options, as in
                      OCTET_PADDLE='paddlepaddle-gpu==3.3.1 --index-url URL'
  OCTET_CACHE         compiled ops and downloaded or generated models (default: ~/.cache/octet)
EOF
}

say() { printf '[octet] %s\n' "$*" >&2; }
die() { printf '[octet] error: %s\n' "$*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${OCTET_PYTHON:-python3 python3.12 python3.11 python3.10 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.10 or newer found; install one or name it with OCTET_PYTHON"
}

# install EXTRAS: bring the environment up to what pyproject.toml asks for, unless it is there already.
install() {
  local extras="$1" stamp started
  if [[ ! -x "$venv/bin/python" ]]; then
    say "making a virtual environment in $venv"
    "$(find_python)" -m venv "$venv" || die "python -m venv failed; on Debian, install python3-venv"
  fi
  stamp="$venv/.octet-$(printf '%s' "$extras" | tr -c 'a-z0-9\n' '-')"
  if ! cmp -s "$here/pyproject.toml" "$stamp"; then
    say "installing packages${extras:+ with $extras} (about 1 GB the first time)"
    started=$SECONDS
    (
      # From a copy, so that the build leaves nothing in the source folder.
      copy="$(mktemp -d)" && trap 'rm -rf "$copy"' EXIT
      cp "$here/pyproject.toml" "$here/README.md" "$copy/"
      "$venv/bin/python" -m pip install --disable-pip-version-check \
        "$copy${extras:+[$extras]}" >&2
    ) || die "pip could not install the packages; see its message above"
    cp "$here/pyproject.toml" "$stamp"
    rm -f "$venv/.octet-paddle"  # pip has put the CPU's PaddlePaddle back
    say "packages installed in $((SECONDS - started)) s"
  fi
  install_paddle
}

# Another build of PaddlePaddle takes the place of the one that pyproject.toml names: both are the module paddle.
install_paddle() {
  local stamp="$venv/.octet-paddle"
  [[ -n "${OCTET_PADDLE:-}" && "$(cat "$stamp" 2>/dev/null)" != "$OCTET_PADDLE" ]] || return 0
  say "installing $OCTET_PADDLE"
  "$venv/bin/python" -m pip uninstall --yes --quiet paddlepaddle paddlepaddle-gpu >&2
  # shellcheck disable=SC2086  # a requirement and options, as pip takes them
  "$venv/bin/python" -m pip install --disable-pip-version-check $OCTET_PADDLE >&2 \
    || die "pip could not install what OCTET_PADDLE says; see its message above"
  printf '%s' "$OCTET_PADDLE" >"$stamp"
}

build_ops() {
  "$venv/bin/python" -m cuda_ops.build >&2 || die "the ops did not build; see the compiler's message above"
  [[ -e /dev/nvidiactl ]] || return 0
  "$venv/bin/python" -m cuda_ops.build_gpu >&2 || say "the ops for GPUs did not build, so --device gpu will not work"
}

join_extras() { local IFS=,; local all=("$@"); [[ -n "${OCTET_EXTRAS:-}" ]] && all+=("$OCTET_EXTRAS"); printf '%s' "${all[*]}"; }

serve() {
  install "${OCTET_EXTRAS:-}"
  build_ops
  exec "$venv/bin/python" -m engine "$@"
}

plan() {
  install "${OCTET_EXTRAS:-}"
  exec "$venv/bin/python" -m engine.plan_command "$@"
}

cache() {
  install "${OCTET_EXTRAS:-}"
  exec "$venv/bin/python" -m workers.weight_cache_command "$@"
}

quality() {
  install "${OCTET_EXTRAS:-}"
  build_ops
  exec "$venv/bin/python" -m workers.quality_command "$@"
}

run_tests() {
  install "$(join_extras test demo)"
  build_ops
  cd "$here"
  exec "$venv/bin/python" -m pytest "$@"
}

check() {
  install "$(join_extras check)"
  cd "$here"
  local failed=0 sources
  say "ruff check"; "$venv/bin/ruff" check . || failed=1
  say "ruff format"; "$venv/bin/ruff" format --check . || failed=1
  say "mypy"; "$venv/bin/mypy" || failed=1
  say "clang-format"
  mapfile -t sources < <(find cuda_ops/csrc -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort)
  "$venv/bin/clang-format" --dry-run --Werror "${sources[@]}" || failed=1
  ((failed == 0)) || die "the checks above failed"
  say "all checks passed"
}

bench() {
  install "$(join_extras test)"  # the benchmarks drive what the tests build, with the tests' client
  cd "$here"
  local name="${1:-}" file
  if [[ -z "$name" || ! -f "tests/bench/bench_$name.py" ]]; then
    say "benchmarks: $(for file in tests/bench/bench_*.py; do basename "$file" .py | sed 's/^bench_//'; done | tr '\n' ' ')"
    [[ -z "$name" ]] || die "there is no benchmark named '$name'"
    return
  fi
  build_ops
  exec "$venv/bin/python" -m "tests.bench.bench_$name" "${@:2}"
}

evaluate() {
  install "$(join_extras demo)"
  build_ops
  cd "$here"
  exec "$venv/bin/python" -m tests.bench.bench_eval "$@"
}

# The folders of this project are the import roots, whatever folder the caller stands in.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

case "${1:-}" in
  serve) shift; serve "$@" ;;
  plan) shift; plan "$@" ;;
  cache) shift; cache "$@" ;;
  quality) shift; quality "$@" ;;
  test) shift; run_tests "$@" ;;
  check) shift; check ;;
  bench) shift; bench "$@" ;;
  eval) shift; evaluate "$@" ;;
  help | -h) usage ;;
  --help) usage; printf '\n'; serve --help ;;
  '' | -*) serve "$@" ;;
  *) usage >&2; die "there is no verb '$1'" ;;
esac
