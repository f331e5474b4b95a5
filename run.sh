#!/usr/bin/env bash
# The closed loop: rounds of rollout, actre, train_pg and evaluate. Finished stages are skipped; a killed run resumes with
# the same command.
#
#   ./run.sh            the embedded default: the tiny base on real games ($ALFWORLD_DATA) or generated ones
#   ./run.sh webshop    WebShop: its tiny base on real data ($WEBSHOP_DATA) or the generated catalogue
#   ./run.sh refine     AgentRefine: synthesis, refinement tuning and evaluation on its neutral base
#   ./run.sh paper      A3T's configuration on Mistral-7B-Instruct-v0.2 (real games; MODEL=folder of the weights)
#
# Environment: RUN (directory of the run), ROUNDS (4), SEED (0), MODEL, BUDGET (compositions per failed task: 3; webshop: 20;
# paper: 40), COUNT (synthetic trajectories: 2000).
set -euo pipefail
cd "$(dirname "$0")"
# Put large buffers in huge pages where Linux has them: a CPU trains a tenth faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# A stage runs in the background, so that SIGTERM to this script reaches it at once.
stage() {
  python "$@" <&0 &
  pid=$!
  wait "$pid"
}
trap 'kill -TERM "${pid:-}" 2>/dev/null; wait; exit 143' TERM
trap 'kill -INT "${pid:-}" 2>/dev/null; wait; exit 130' INT

what=${1:-tiny}
case "$what" in webshop | refine) RUN=${RUN:-runs/$what} ;; esac
RUN=${RUN:-runs/a3t} ROUNDS=${ROUNDS:-4} SEED=${SEED:-0}
common=(--run "$RUN" --seed "$SEED") first=() play=() compose=() train=()
case "$what" in
  refine)
    common+=(--model "${MODEL:-models/tiny-neutral}")
    unseen=(--round 0 --tell-commands --context 1536) # for worlds it was not trained on
    stage refine.py --run "$RUN" --seed "$SEED" --count "${COUNT:-2000}"
    stage train_pg.py "${common[@]}" --round 0 --inputs "$RUN/refine" --epochs 1 --rank 32 --alpha 64 \
      --learning-rate 8e-3 --row-length 1792 --world-weight 0
    stage evaluate.py "${common[@]}" "${unseen[@]}" --env synthetic
    stage evaluate.py "${common[@]}" "${unseen[@]}" --perturb all --panels gen_valid-100 --limit 60
    stage evaluate.py "${common[@]}" "${unseen[@]}" --env pddl --max-turns 30
    exit ;;
  tiny)
    common+=(${MODEL:+--model "$MODEL"}) # else the world's own base
    compose+=(--budget "${BUDGET:-3}") ;;
  webshop)
    common+=(${MODEL:+--model "$MODEL"})
    play+=(--env webshop)
    compose+=(--force 3 --budget "${BUDGET:-20}") # as in the paper: three, then up to twenty until one wins
    train+=(--row-length 4096 --learning-rate 4e-3) ;; # at 1e-3 the base keeps its habits
  paper)
    base="$RUN/base-nf4" # quantised once; every stage reads it instead of the 16-bit files
    [ -e "$base" ] ||
      stage -m lora.convert --weights nf4 --out "$base" \
        --model "${MODEL:?MODEL must name the folder of Mistral-7B-Instruct-v0.2}"
    common+=(--model "$base")
    first+=(--prompt prompts/alfworld_react.txt) # only round 0 is prompted; trained policies play without
    play+=(--patience 0 --context 1920)
    compose+=(--probability 0.5 --budget "${BUDGET:-40}" --force "${BUDGET:-40}"
              --actre-prompt prompts/alfworld_actre.txt)
    train+=(--targets q v --rank 16 --alpha 32 --learning-rate 1e-4 --epochs 10 6 --failure-reward -1 --world-weight 1
            --weights nf4 --dtype bfloat16 --remat full --row-length 2048 --batch-rows 16) ;;
  *) echo "run.sh: got '$1', expected nothing, 'tiny', 'webshop', 'refine' or 'paper'" >&2; exit 2 ;;
esac

for ((round = 0; round < ROUNDS; round++)); do
  ((round == 0)) || first=()
  stage rollout.py "${common[@]}" --round "$round" ${first[@]+"${first[@]}"} ${play[@]+"${play[@]}"}
  stage actre.py "${common[@]}" --round "$round" ${play[@]+"${play[@]}"} ${compose[@]+"${compose[@]}"}
  stage train_pg.py "${common[@]}" --round "$round" ${train[@]+"${train[@]}"}
  stage evaluate.py "${common[@]}" --round "$round" ${play[@]+"${play[@]}"}
done
