# What a job script does around the training: notes for `hmar-mega status`, signals, node checks, restarts.
# The script sets run_dir, launch_dir, scripts, max_restarts, python, container and srun_options first.

# For SLURM's commands: $SLURM_JOB_ID of the last task of an array is the whole array's number too.
job_spec=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job_spec=${job_spec:-$SLURM_JOB_ID}

# note EVENT [KEY VALUE]…: one line of events.jsonl.
note() {
  local line
  line=$(printf '{"time": %s, "event": "%s", "job": "%s", "attempt": %s' "$(date +%s)" "$1" "$SLURM_JOB_ID" "$attempt")
  shift
  while (($# > 1)); do
    line+=$(printf ', "%s": "%s"' "$1" "$(tr -d '"\\\000-\037' <<<"$2")")
    shift 2
  done
  echo "$line}" >>"$launch_dir/events.jsonl"
  echo "hmar-mega: $line}"
}

begin() {
  attempt=$(cat "$launch_dir/restarts" 2>/dev/null || echo 0)
  if [ -d "$launch_dir/statuses/$SLURM_JOB_ID-$attempt" ]; then    # SLURM requeued the job by itself, as for a dead node
    while [ -d "$launch_dir/statuses/$SLURM_JOB_ID-$attempt" ]; do ((attempt++)); done
    echo "$attempt" >"$launch_dir/restarts"
  fi
  statuses=$launch_dir/statuses/$SLURM_JOB_ID-$attempt
  export launch_dir scripts attempt statuses
  mkdir -p "$statuses" "$launch_dir/logs" "$launch_dir/health" || exit 2
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  ends=$(scontrol show job "$job_spec" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p')
  ends=$(date -d "$ends" +%s 2>/dev/null || echo 0)    # 0: without limit
  preempted= terminated= step=
  before=$(cat "$run_dir/checkpoints/latest" 2>/dev/null)
  trap on_usr1 USR1
  trap on_term TERM
  note started nodes "${nodes[*]}"
  ((attempt <= max_restarts)) || stop failed "all $max_restarts restarts are used (--max-restarts)" 1
}

# address_of NODE: its name where that can be looked up, else the address that SLURM has.
address_of() {
  if getent hosts "$1" >/dev/null; then echo "$1"; else scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'; fi
}

# SLURM tells only this script (--signal=B:USR1@…). It tells the tasks, again and again: one that comes while a process
# still starts is lost.
on_usr1() {
  [ -z "$preempted" ] || return
  preempted=yes
  note preempting
  (while sleep 10; do scancel --signal=USR1 "$job_spec"; done) &
  signaller=$!
  [ -z "$step" ] || scancel --signal=USR1 "$job_spec"
}

# scancel, the time limit and preemption send TERM to the tasks as well: only remember it.
on_term() { terminated=yes; }

# follow PID: wait until the training's srun has ended.
follow() {
  step=$1
  [ -z "$preempted" ] || scancel --signal=USR1 "$job_spec"    # it came during the checks
  await "$step"
  step_status=$?
  [ -z "${signaller:-}" ] || kill "$signaller" 2>/dev/null
}

# check_nodes [OPTIONS… [--collective GB_PER_S]]: look at every node, exclude bad ones. Without options nothing is checked.
check_nodes() {
  (($#)) || return 0
  local reports=$launch_dir/health/$SLURM_JOB_ID-$attempt bad=() node line collective= seconds=120
  if [ "${*: -2:1}" = --collective ]; then
    collective=${*: -1}
    set -- "${@:1:$#-2}"
  fi
  # the image of a container may have to be fetched first
  if ((${#container[@]})) || [[ "${srun_options[*]}" = *--container-image=* ]]; then seconds=900; fi
  mkdir -p "$reports"
  # clocks are read outside of containers, whose start takes unlike times
  timeout 60 srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c 'echo "$SLURMD_NODENAME $(date +%s.%N)"' >"$reports/clocks"
  timeout "$seconds" srun "${srun_options[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    "${container[@]}" "$python" -m hmar_mega.launchers.health "$reports" --clocks "$reports/clocks" "$@"
  if [ -n "$collective" ]; then
    MASTER_ADDR=$(address_of "${nodes[0]}") MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) statuses= timeout $((seconds + 240)) \
      srun "${srun_options[@]}" --kill-on-bad-exit=0 --wait=0 \
      bash "$scripts/task.sh" "${container[@]}" "$python" -m hmar_mega.launchers.collective "$reports" \
      --min-gb-per-s "$collective"
  fi
  for node in "${nodes[@]}"; do
    if ! line=$(cat "$reports/$node" 2>/dev/null); then line="no answer within $seconds s, or $run_dir is not shared with it"; fi
    if [ "$line" = ok ] && [ -n "$collective" ]; then
      line=$(cat "$reports/$node.collective" 2>/dev/null || echo "took no part in a reduction over all nodes")
    fi
    [ "${line%% *}" = ok ] && continue
    bad+=("$node")
    note bad_node node "$node" reason "$line"
  done
  ((${#bad[@]})) || return 0
  ((${#bad[@]} < ${#nodes[@]} || ${#nodes[@]} == 1)) ||
    stop failed "all nodes are unfit; see $reports" 1    # the fault is hardly theirs
  [ -z "$terminated" ] || stop cancelled "cancelled during the checks" 0
  requeue requeued "unfit node ${bad[*]}" "${bad[@]}"
}

# decide: what the exit statuses of the processes mean for the job.
decide() {
  local all
  all=$(cat "$statuses"/* 2>/dev/null)
  has() { grep -qx "$1" <<<"$all"; }
  echo "hmar-mega: srun ended with $step_status, the processes with $(sort <<<"$all" | uniq -c | tr -s ' \n' ' ')"
  # a checkpoint may have been the last one of an earlier, shorter run; 75: the last validation was put off
  if ((step_status == 0)) && finished && ! has 75 &&
    { [ -z "$terminated" ] || [ "$(cat "$run_dir/checkpoints/latest")" != "$before" ]; }; then stop completed "" 0; fi
  mapfile -t lost < <(lost_nodes)
  if [ -n "$terminated" ]; then
    if ((${#lost[@]})); then    # SLURM ends and requeues a job that lost a node; one that was cancelled too will not start
      note requeued reason "lost ${lost[*]}" excluded "$(exclude "${lost[@]}")"
      exit 0
    fi
    # near the limit it was the limit
    if ((ends > 0 && $(date +%s) >= ends - 5)); then next_job "time limit"; fi
    stop cancelled "saved and stopped as asked" 0
  fi
  if has 2; then stop failed "bad input" 2; fi
  if has 1; then stop failed "training failed" 1; fi
  # 138: one of the signals that ask for it came where the program did not handle them, before or after it trained
  if has 75 || { [ -n "$preempted" ] && has 138; }; then requeue preempted "asked to save and start again"; fi
  if has 76 || ((${#lost[@]})); then requeue requeued "lost ${lost[*]:-a process}" "${lost[@]}"; fi
  if has 134 && nccl_gave_up; then requeue requeued "NCCL gave up: a process or the network was lost"; fi
  if ((step_status == 0)); then next_job "stopped with steps left"; fi
  stop failed "processes were killed (srun: $step_status)" "$step_status"
}

# finished: whether the newest checkpoint is that of the last step.
finished() {
  local name
  name=$(cat "$run_dir/checkpoints/latest" 2>/dev/null) &&
    grep -q '"finished": true' "$run_dir/checkpoints/$name/state.json"
}

# nccl_gave_up: whether NCCL's own watch aborted processes of this attempt; `hmar-mega status` knows the same words.
nccl_gave_up() {
  grep -Eqs 'Watchdog caught collective operation timeout|ncclRemoteError|NCCL timeout|Timed out waiting [0-9]+ms' \
    "$launch_dir/logs/$SLURM_JOB_ID-$attempt-"*.log
}

# lost_nodes: those of this job that the training named, or that SLURM finds down.
lost_nodes() {
  {
    sed -n 's/.*lost rank [0-9]* (host \([^,]*\),.*/\1/p' "$launch_dir/logs/$SLURM_JOB_ID-$attempt-"*.log 2>/dev/null
    sinfo -h -N -n "$SLURM_JOB_NODELIST" -o '%N %T' | awk '$2 ~ /down|fail|[*]/ { print $1 }'
  } | sort -u | grep -Fx "$(printf '%s\n' "${nodes[@]}")"
}

# exclude NODE…: remember bad nodes; prints all of them, with commas. Without enough others the job would wait for ever:
# then the oldest may be used again.
exclude() {
  local node file=$launch_dir/excluded_nodes all
  for node in "$@"; do
    grep -sqxF "$node" "$file" || echo "$node" >>"$file"
  done
  all=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u)
  while [ -s "$file" ] && [ -n "$all" ] && (($(grep -cvxFf "$file" <<<"$all") < SLURM_NNODES)); do
    note readmitted node "$(head -n 1 "$file")" reason "without it partition $SLURM_JOB_PARTITION has too few nodes" >&2
    sed -i 1d "$file"
  done
  paste -sd, "$file" 2>/dev/null
}

# count_restart REASON: one more, or the end.
count_restart() {
  if ((attempt >= max_restarts)); then
    stop failed "$1; all $max_restarts restarts are used (--max-restarts)" 1
  fi
  echo $((attempt + 1)) >"$launch_dir/restarts"
}

# requeue EVENT REASON [BAD NODE]…: this job again, without the bad nodes. SLURM lets it wait for about two minutes.
requeue() {
  local event=$1 reason=$2 excluded try known
  shift 2
  count_restart "$reason"
  known=$(paste -sd, "$launch_dir/excluded_nodes" 2>/dev/null)
  excluded=$(exclude "$@")
  note "$event" reason "$reason" excluded "$excluded"
  trap '' TERM USR1    # the requeue ends this script too, and the job can be changed only after it
  scontrol requeue "$job_spec" || stop failed "SLURM refuses to requeue the job ($reason)" 1
  [ -n "$excluded$known" ] || exit 0
  for try in {1..20}; do
    scontrol update JobId="$job_spec" ExcNodeList="$excluded" && exit 0
    sleep 0.5
  done
  echo "hmar-mega: SLURM does not set the excluded nodes of the requeued job to \"$excluded\"; all are checked again before it trains" >&2
  exit 0
}

# next_job REASON: another job after this one; it counts as a restart.
next_job() {
  local excluded next
  count_restart "$1"
  excluded=$(exclude)
  next=$(sbatch --parsable --dependency="afterany:$job_spec" ${excluded:+--exclude="$excluded"} \
    ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} "$scripts/job.sbatch") ||
    stop failed "sbatch refuses the next job ($1)" 1
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || echo "$next" >>"$scripts/jobs"    # a sweep counts its cells as queued by it
  note chained reason "$1" next "$next"
  exit 0
}

# stop EVENT REASON STATUS
stop() {
  note "$1" reason "$2" status "$3"
  exit "$3"
}
