#!/bin/bash
# One training process of a job: where it stands among the others, its log, and its exit status noted.
# srun or torchrun starts it as `task.sh PROGRAM ARGUMENTS`; $scripts, $launch_dir, $attempt come from the job script.

export RANK=${RANK:-$SLURM_PROCID} WORLD_SIZE=${WORLD_SIZE:-$SLURM_NTASKS} LOCAL_RANK=${LOCAL_RANK:-$SLURM_LOCALID}

exec >>"$launch_dir/logs/$SLURM_JOB_ID-$attempt-$SLURMD_NODENAME.log" 2>&1
echo "rank $RANK of $WORLD_SIZE on $SLURMD_NODENAME, local rank $LOCAL_RANK: $*"

# This shell ignores the signals, so that it lives to note the status: traps would interrupt `wait`, after which bash may
# have forgotten how a program ended that ended at that moment. The program starts with USR1 ignored: it installs its own
# handler within a second, and the job script sends the signal again.
trap '' USR1 TERM
(trap - TERM; exec "$@") &
wait $!
status=$?

if [ -n "${statuses:-}" ]; then
  echo "$status" >"$statuses/.$RANK.$SLURMD_NODENAME" && mv "$statuses/.$RANK.$SLURMD_NODENAME" "$statuses/$RANK.$SLURMD_NODENAME"
fi
exit "$status"
