#!/bin/bash
# Runs a command in a Slurm job and requeues the job when the command asks for another start.
# It gets SIGUSR1 two minutes before the time is over (and SIGTERM at pre-emption), saves, and ends with exit code 75
# ("start me again"); so it is when the signal came before it listened (138, 143). Any other code is final.
set -uo pipefail
"$@" &
run=$!
signalled=
trap 'signalled=1; kill -USR1 "$run"' USR1 TERM
wait "$run"; code=$?
while [ -n "$signalled" ]; do  # a signal ends `wait` early, while the run is still saving
  signalled=
  wait "$run"; code=$?
done
case "$code" in 75|138|143) scontrol requeue "$SLURM_JOB_ID" ;; esac
exit "$code"
