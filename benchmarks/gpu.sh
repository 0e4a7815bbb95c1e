#!/usr/bin/env bash
# All measurements on one NVIDIA GPU: builds missing kernels, checks them, measures, and writes JSON and a page.
#
#     benchmarks/gpu.sh                       # all parts in order
#     benchmarks/gpu.sh memory speed          # some
#     benchmarks/gpu.sh --limit 0 film        # without a time limit
#     benchmarks/gpu.sh --dry-run             # shows the commands; needs no GPU
#     benchmarks/gpu.sh --tiny --output_dir elsewhere   # rehearses the measurements on a CPU, in a few minutes
#
# parts: build check memory speed side-by-side longest film profile report
#
#     --limit SECONDS     time limit of each part (default 540); the next call continues a part that was cut off
#     --most_steps N      steps of each length in memory, speed and side-by-side (default 3); 1 if time is short
#     --again             measure finished parts once more
#     --output_dir PATH   folder of the results (default benchmarks/results)
#
# Builds, wheels, logs and the stamps of finished parts are in MA2MBA_GPU_DIR (default gpu_build). A machine without a
# network needs these folders, under that directory or at the paths in the variables:
#
#     MA2MBA_SOURCES   sources            causal_conv1d-*.tar.gz and mamba_ssm-*.tar.gz, to be compiled for this GPU
#     MA2MBA_WHEELS    wheels_carried     wheels of other packages that the machine lacks, such as Transformers
#     MA2MBA_AUTHORS   ma2mba             a checkout of klae01/ma2mba
#
# Compiled wheels are kept in wheels/ for the next such machine. PYTHON is the interpreter (default python3).
set -euo pipefail
HERE=$PWD
cd "$(dirname "$0")/.."

ALL=(build check memory speed side-by-side longest film profile report)
PYTHON=${PYTHON:-python3}
LIMIT=540 STEPS=3 DRY_RUN='' TINY='' AGAIN='' OUTPUT=benchmarks/results PARTS=()
while (($#)); do
    case $1 in
        --limit) LIMIT=${2:?--limit needs seconds}; shift ;;
        --most_steps) STEPS=${2:?--most_steps needs a number}; shift ;;
        --output_dir) OUTPUT=$(cd "$HERE" && realpath -m "${2:?--output_dir needs a path}"); shift ;;
        --dry-run) DRY_RUN=1 ;;
        --tiny) TINY=1 ;;
        --again) AGAIN=1 ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"; exit ;;
        *)
            if [[ " ${ALL[*]} " != *" $1 "* ]]; then
                echo "There is no part or option $1: the parts are ${ALL[*]}." >&2
                exit 2
            fi
            PARTS+=("$1")
            ;;
    esac
    shift
done

DEVICE=(--device cuda)
if [[ $TINY ]]; then
    if [[ $OUTPUT == benchmarks/results ]]; then
        echo "--tiny measures nothing of worth: give it an --output_dir of its own." >&2
        exit 2
    fi
    DEVICE=(--tiny --threads 1)
    ((${#PARTS[@]})) || PARTS=(memory speed side-by-side longest film profile report)
    DIR=${MA2MBA_GPU_DIR:-$OUTPUT/gpu_build}
else
    ((${#PARTS[@]})) || PARTS=("${ALL[@]}")
    DIR=${MA2MBA_GPU_DIR:-gpu_build}
fi
case $DIR in /*) ;; *) DIR=$PWD/$DIR ;; esac
SOURCES=${MA2MBA_SOURCES:-$DIR/sources}
CARRIED=${MA2MBA_WHEELS:-$DIR/wheels_carried}
AUTHORS=${MA2MBA_AUTHORS:-$DIR/ma2mba}
export PYTHONPATH=$DIR/site:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$DIR/triton}

# Runs a command, or with --dry-run shows it.
run() {
    if [[ $DRY_RUN ]]; then
        echo "    $*"
    else
        "$@"
    fi
}

has_files() { compgen -G "$1" >/dev/null; }

install_wheels() {
    run "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$DIR/site" "$@"
}

# Unpacks a source distribution to $DIR/source_NAME and changes its setup.py to compile for this GPU only: both packages
# append a dozen architectures by hand and ignore TORCH_CUDA_ARCH_LIST.
unpack() {
    local name=$1 archive
    [[ -e $DIR/source_$name/setup.py ]] && return
    if ! has_files "$SOURCES/$name-*.tar.gz"; then
        mkdir -p "$SOURCES"
        if ! "$PYTHON" -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$SOURCES" "$name"; then
            echo "There is no $name-*.tar.gz in $SOURCES, and none could be downloaded." >&2
            return 1
        fi
    fi
    archive=$(compgen -G "$SOURCES/$name-*.tar.gz" | sort -V | tail -n 1)
    rm -rf "$DIR/unpacked_$name"
    mkdir -p "$DIR/unpacked_$name"
    tar -xzf "$archive" -C "$DIR/unpacked_$name" --strip-components 1
    sed -i -E 's/cc_flag\.append\("(-gencode|arch=[^"]*)"\)/pass/' "$DIR/unpacked_$name/setup.py"
    mv "$DIR/unpacked_$name" "$DIR/source_$name"
}

compile() {
    local name=$1
    unpack "$name" || return 1
    echo "Compiling $name for compute capability $TORCH_CUDA_ARCH_LIST; log in $DIR/logs/build_$name.log"
    "$PYTHON" -m pip wheel --no-index --no-build-isolation --no-deps -w "$DIR/wheels" "$DIR/source_$name" \
        >"$DIR/logs/build_$name.log" 2>&1 || {
        tail -n 40 "$DIR/logs/build_$name.log"
        echo "$name could not be compiled." >&2
        return 1
    }
}

has_kernels() { "$PYTHON" -c 'import mamba_ssm, causal_conv1d' >/dev/null 2>&1; }

build() {
    local name failed='' jobs=()
    if has_files "$CARRIED/*.whl"; then install_wheels "$CARRIED"/*.whl; fi
    if has_files "$DIR/wheels/*.whl"; then install_wheels "$DIR"/wheels/*.whl; fi
    if [[ $DRY_RUN ]]; then
        echo "    unless mamba_ssm and causal_conv1d import: pip wheel of each from $SOURCES, for this GPU alone"
        echo "    unless $AUTHORS is there: git clone of klae01/ma2mba"
        return
    fi
    if ! has_kernels; then
        export MAX_JOBS=${MAX_JOBS:-$(nproc)} CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
        TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
        export TORCH_CUDA_ARCH_LIST
        for name in causal_conv1d mamba_ssm; do
            compile "$name" &
            jobs+=($!)
        done
        for name in "${jobs[@]}"; do wait "$name" || failed=1; done
        [[ $failed ]] && return 1
        install_wheels "$DIR"/wheels/*.whl
        "$PYTHON" -c 'import mamba_ssm, causal_conv1d'
    fi
    if ! [[ -d $AUTHORS/mamba_ssm ]]; then
        if ! GIT_TERMINAL_PROMPT=0 git clone -q --depth 1 https://github.com/klae01/ma2mba "$AUTHORS"; then
            echo "The authors' code is not in $AUTHORS and could not be cloned: side-by-side will have our side only."
        fi
    fi
    "$PYTHON" -c 'import causal_conv1d, mamba_ssm, torch, transformers, triton
for module in (torch, triton, transformers, mamba_ssm, causal_conv1d): print(module.__name__, module.__version__)'
}

check() {
    run "$PYTHON" -m pytest -q -p no:cacheprovider tests/gradient_checkpointing/interpreted_kernels
    run "$PYTHON" -m pytest -q -p no:cacheprovider tests/gradient_checkpointing/test_offload.py -k gpu
}

# Runs a script of benchmarks/, which keeps the rows of an earlier call.
measure() {
    local script=$1 resume=(--resume)
    shift
    [[ $AGAIN ]] && resume=()
    run "$PYTHON" "benchmarks/$script.py" "${DEVICE[@]}" --output_dir "$OUTPUT" "${resume[@]}" "$@"
}

part() {
    case $1 in
        build) build ;;
        check) check ;;
        memory) measure memory --most_steps "$STEPS" ;;
        speed)
            AGAIN='' # takes over the steps that memory has timed
            [[ $DRY_RUN ]] || has_files "$OUTPUT/memory_cuda.json" || echo "Every step is run: memory has no results."
            measure speed --most_steps "$STEPS"
            ;;
        side-by-side)
            if [[ $TINY || ! -d $AUTHORS/mamba_ssm ]]; then
                [[ $DRY_RUN ]] || echo "Without the authors' code in $AUTHORS: our side only."
                measure side_by_side --most_steps "$STEPS"
            else
                measure side_by_side --most_steps "$STEPS" --authors "$AUTHORS"
            fi
            ;;
        longest) measure longest ;;
        # The rest of the limit is for the training step and for loading the model.
        film) measure film --most_seconds $((LIMIT > 0 ? LIMIT * 5 / 9 : 1000000)) ;;
        profile) measure breakdown ;;
        report) run "$PYTHON" benchmarks/gpu_report.py --output_dir "$OUTPUT" ;;
    esac
}

if [[ ${MA2MBA_PART:-} ]]; then # this process is the inner call, under the time limit
    part "$MA2MBA_PART"
    exit
fi

sees_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
if ! [[ $DRY_RUN || $TINY ]] && ! "$PYTHON" -c "$sees_gpu" 2>/dev/null; then
    echo "PyTorch sees no CUDA device here: run this where there is one, or with --dry-run or --tiny." >&2
    exit 1
fi
if ! [[ $DRY_RUN ]]; then
    mkdir -p "$DIR"/{site,wheels,logs,stamps} "$OUTPUT"
    echo '*' >"$DIR/.gitignore"
fi
failed=()
for name in "${PARTS[@]}"; do
    stamp=$DIR/stamps/$name
    [[ $AGAIN && ! $DRY_RUN ]] && rm -f "$stamp"
    # Reports and builds run again, because they are quick and depend on the other parts.
    if [[ $name != report && $name != build && -e $stamp && ! $DRY_RUN ]]; then
        echo "== $name: finished before (--again measures it once more)"
        continue
    fi
    echo "== $name"
    if [[ $DRY_RUN ]]; then
        part "$name"
        continue
    fi
    arguments=(--limit "$LIMIT" --most_steps "$STEPS" --output_dir "$OUTPUT" ${TINY:+--tiny} ${AGAIN:+--again} "$name")
    start=$SECONDS status=0
    touch "$DIR/started"
    MA2MBA_PART=$name timeout --kill-after 10 "$LIMIT" "$0" "${arguments[@]}" 2>&1 | tee -a "$DIR/logs/$name.log" || status=$?
    if ((status == 0)); then
        touch "$stamp"
        echo "== $name: finished in $((SECONDS - start)) seconds; log in $DIR/logs/$name.log"
    elif ((status == 124 || status == 137)); then
        echo "== $name: cut off after $LIMIT seconds; the same call continues it." >&2
        exit 3
    else
        echo "== $name: failed; see $DIR/logs/$name.log. The next call tries again." >&2
        failed+=("$name")
        [[ $name == build ]] && break
    fi
    find "$OUTPUT" -maxdepth 1 -type f -newer "$DIR/started" | sort | sed 's/^/   wrote /' || true
done
if ((${#failed[@]})); then
    echo "Failed: ${failed[*]}" >&2
    exit 1
fi
