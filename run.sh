#!/usr/bin/env bash
# The closed loop: rounds of rollout, actre, train_pg and evaluate. Finished stages are skipped; a killed run resumes with
# the same command.
#
#   ./run.sh            the embedded default: the tiny base on real games ($ALFWORLD_DATA) or generated ones
#   ./run.sh webshop    WebShop: its tiny base on real data ($WEBSHOP_DATA) or the generated catalogue
#   ./run.sh refine     AgentRefine: synthesis, refinement tuning and evaluation on its neutral base
#   ./run.sh smollm2    SmolLM2-135M-Instruct (make smollm2): it wins nothing at first, so round 0 trains on demonstrations,
#                       and ActRe on a third as many; ./run.sh smollm2-webshop is the same on WebShop
#   ./run.sh paper      A3T's configuration on Mistral-7B-Instruct-v0.2 (real games; MODEL=folder of the weights)
#
# More flags for a stage carry its name, override the ones above and may follow any of these: ./run.sh --rollout.limit 20
# --train.rank 32. The names are rollout, actre, train, evaluate, play for the three that play, and, for smollm2,
# demonstrations.
#
# Environment: RUN (directory of the run), ROUNDS (4), SEED (0), MODEL, BUDGET (compositions per failed task: 3; webshop: 20;
# smollm2: 4; smollm2-webshop: 6; paper: 40), COUNT (synthetic trajectories: 2000; demonstrations: 300), SERVER (address of
# a vLLM server that plays in place of the local model: docs/servers.md), SERVER_MODEL (the base's name there: base), TRUST
# (1: finished stages of the rounds are taken as they are, whatever their settings: for runs whose old adapters are gone).
set -euo pipefail
cd "$(dirname "$0")"
# Put large buffers in huge pages where Linux has them: a CPU trains a tenth faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
# The share of a GPU's memory that JAX takes; its own default is .75.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}

# A stage runs in the background, so that SIGTERM to this script reaches it at once.
stage() {
  python "$@" <&0 &
  pid=$!
  wait "$pid"
}
trap 'kill -TERM "${pid:-}" 2>/dev/null; wait; exit 143' TERM
trap 'kill -INT "${pid:-}" 2>/dev/null; wait; exit 130' INT

{ # read whole before anything runs, so that an update of this file does not disturb a run
what=tiny
case "${1:---}" in --*) ;; *) what=$1; shift ;; esac
case "$what" in webshop | refine | smollm2*) RUN=${RUN:-runs/$what} ;; esac
RUN=${RUN:-runs/a3t} ROUNDS=${ROUNDS:-4} SEED=${SEED:-0}
common=(--run "$RUN" --seed "$SEED") first=() play=() compose=() train=()
play+=(${SERVER:+--server.url "$SERVER" --server.model "${SERVER_MODEL:-base}" --server.api tokens})
train+=(${SERVER:+--weights fp32}) # the base as it is served; paper serves the NF4 folder that it trains on
more_play=() more_rollout=() more_actre=() more_train=() more_evaluate=() more_demonstrations=() to=
for word in "$@"; do
  case "$word" in --play.* | --rollout.* | --actre.* | --train.* | --evaluate.* | --demonstrations.*)
    to=${word#--} to=${to%%.*} word=--${word#*.} ;;
  esac
  case "$to" in
    play) more_play+=("$word") ;;
    rollout) more_rollout+=("$word") ;;
    actre) more_actre+=("$word") ;;
    train) more_train+=("$word") ;;
    evaluate) more_evaluate+=("$word") ;;
    demonstrations) more_demonstrations+=("$word") ;;
    *) echo "run.sh: got '$word', expected flags such as --rollout.limit 20 or --train.rank 32" >&2; exit 2 ;;
  esac
done
if [[ $what != smollm2* ]] && [ ${#more_demonstrations[@]} -gt 0 ]; then
  echo "run.sh: got flags of demonstrations, which only smollm2 makes; expected flags of other stages" >&2
  exit 2
fi
case "$what" in
  refine)
    common+=(--model "${MODEL:-models/tiny-neutral}")
    if [ ${#more_rollout[@]} -gt 0 ] || [ ${#more_actre[@]} -gt 0 ]; then
      echo "run.sh: got flags of rollout or actre, which refine does not run; expected --train.* or --evaluate.*" >&2
      exit 2
    fi
    unseen=(--round 0 --tell-commands --context 1536) # for worlds it was not trained on
    play+=(${more_play[@]+"${more_play[@]}"} ${more_evaluate[@]+"${more_evaluate[@]}"})
    stage refine.py --run "$RUN" --seed "$SEED" --count "${COUNT:-2000}"
    stage train_pg.py "${common[@]}" --round 0 --inputs "$RUN/refine" --epochs 1 --rank 32 --alpha 64 \
      --learning-rate 8e-3 --row-length 1792 --world-weight 0 ${train[@]+"${train[@]}"} ${more_train[@]+"${more_train[@]}"}
    stage evaluate.py "${common[@]}" "${unseen[@]}" --env synthetic ${play[@]+"${play[@]}"}
    stage evaluate.py "${common[@]}" "${unseen[@]}" --perturb all --panels gen_valid-100 --limit 60 ${play[@]+"${play[@]}"}
    stage evaluate.py "${common[@]}" "${unseen[@]}" --env pddl --max-turns 30 ${play[@]+"${play[@]}"}
    exit ;;
  tiny)
    common+=(${MODEL:+--model "$MODEL"}) # else the world's own base
    compose+=(--budget "${BUDGET:-3}") ;;
  webshop)
    common+=(${MODEL:+--model "$MODEL"})
    play+=(--env webshop)
    compose+=(--force 3 --budget "${BUDGET:-20}") # as in the paper: three, then up to twenty until one wins
    train+=(--row-length 4096 --learning-rate 4e-3) ;; # at 1e-3 the base keeps its habits
  smollm2 | smollm2-webshop)
    MODEL=${MODEL:-models/smollm2} COUNT=${COUNT:-300}
    [ -e "$MODEL" ] || stage -m models.get_smollm2
    common+=(--model "$MODEL")
    play+=(--slots 32) # two groups of 16, each kept full, are fastest on two cores
    train+=(--learning-rate 1.5e-3 --epochs 1)
    case "$what" in
      smollm2) # 20 turns of most games fit the context
        play+=(--context 1664) compose+=(--budget "${BUDGET:-4}") train+=(--row-length 2176) ;;
      smollm2-webshop)
        play+=(--env webshop) compose+=(--force 3 --budget "${BUDGET:-6}") train+=(--row-length 4096)
        more_demonstrations+=(--env webshop) ;;
    esac
    shown=(--seed "$SEED" ${more_demonstrations[@]+"${more_demonstrations[@]}"})
    stage -m models.demonstrations --out "$RUN/round_0/rollout" --count "$COUNT" "${shown[@]}"
    # By itself the base repeats what it wrote before; ActRe is tuned to its form.
    stage -m models.demonstrations --out "$RUN/actre/demonstrations" --count $(((COUNT + 2) / 3)) "${shown[@]}"
    stage train_pg.py "${common[@]}" --run "$RUN/actre" --round 0 --inputs "$RUN/actre/demonstrations" --form actre \
      --world-weight 0 ${train[@]+"${train[@]}"}
    compose+=(--actre-adapter "$RUN/actre/round_0/train_pg/adapter") ;;
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
            --weights nf4 --dtype bfloat16 --row-length 2048 --batch-rows 16) ;;
  *) echo "run.sh: got '$what', expected nothing, 'tiny', 'webshop', 'refine', 'smollm2', 'smollm2-webshop' or 'paper'" >&2; exit 2 ;;
esac

# Whether a stage of the round is finished, and not to be looked at again.
trusted() { [ -n "${TRUST:-}" ] && [ -e "$RUN/round_$round/$1/done.json" ]; }

play+=(${more_play[@]+"${more_play[@]}"})
compose+=(${more_actre[@]+"${more_actre[@]}"})
train+=(${more_train[@]+"${more_train[@]}"})
for ((round = 0; round < ROUNDS; round++)); do
  ((round == 0)) || first=()
  [[ $what-$round = smollm2*-0 ]] || trusted rollout || # its rollout is the demonstrations
    stage rollout.py "${common[@]}" --round "$round" ${first[@]+"${first[@]}"} ${play[@]+"${play[@]}"} \
      ${more_rollout[@]+"${more_rollout[@]}"}
  trusted actre || stage actre.py "${common[@]}" --round "$round" ${play[@]+"${play[@]}"} ${compose[@]+"${compose[@]}"}
  trusted train_pg || stage train_pg.py "${common[@]}" --round "$round" ${train[@]+"${train[@]}"}
  trusted evaluate || stage evaluate.py "${common[@]}" --round "$round" ${play[@]+"${play[@]}"} ${more_evaluate[@]+"${more_evaluate[@]}"}
done
exit
}
