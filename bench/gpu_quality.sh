#!/usr/bin/env bash
# The figures of quality on real models at 32 thousand tokens, on a GPU machine without a network.
#
#   bench/gpu_quality.sh MODELS TEXTS OUT.json [STAGE...]
#
# MODELS holds qwen2.5-coder-0.5b-4bit and qwen2.5-coder-1.5b-4bit (`python -m bench fetch-models --to MODELS`), TEXTS holds
# prose.txt and code.txt (`python -m bench texts prose TEXTS/prose.txt`). Stages, in the order of their worth, with the seconds
# that an H100 is expected to need:
#   small     KL by position, 0.5B, prose and code      90
#   large     KL by position, 1.5B, prose and code     160
#   passkeys  0.5B, 4096 and 28000 tokens              150
#   tools     tool calls and code, 1.5B                 90
#   drafts    0.5B drafting for 1.5B                    40
# Every row is written at once, and a stage that is given again goes on with the rows that are missing.
set -euo pipefail
models=$1 texts=$2 out=$3
shift 3
presets=${PRESETS:-tq3,tq33,tq4,tq2}
small=$models/qwen2.5-coder-0.5b-4bit large=$models/qwen2.5-coder-1.5b-4bit
both=$texts/prose.txt,$texts/code.txt
cd "$(dirname "$0")/.."
for stage in "${@:-small large passkeys tools drafts}"; do
  for name in $stage; do
    begin=$SECONDS
    case $name in
      small | large)
        python3 -m bench quality --by-position --model "${!name}" --tokens 32768 --texts "$both" --presets "$presets" \
          --stock-bits 4 --json "$out"
        ;;
      passkeys)
        python3 -m bench quality --by-position --model "$small" --tokens 0 --texts "$texts/prose.txt" \
          --presets tq3,tq33,tq4 --passkeys 4096,28000 --trials 20 --json "$out"
        ;;
      tools)
        python3 -m bench agents --model "$large" --parts tools,code --presets tq3,tq33,tq4 --rows 24 --json "$out"
        ;;
      drafts)
        python3 -m bench agents --model "$large" --draft-model "$small" --parts drafts --text "$texts/code.txt" \
          --presets tq3,tq33,tq4 --context 4096 --draft-tokens 96 --json "$out"
        ;;
      *)
        echo "gpu_quality.sh: unknown stage $name" >&2
        exit 2
        ;;
    esac
    echo "$name: $((SECONDS - begin)) s"
  done
done
