#!/usr/bin/env bash
# Sourced by the jobs beside it: `requeue_after COMMAND…` runs a command; if Slurm's SIGTERM comes to the job in the
# meantime, it lets the command stop in peace and puts the job back into the queue.
#
# SIGUSR1, which asks a run to write its state and go on, is ignored by all that does not wait for it: torchrun would
# die of it. So `scancel --signal=USR1 --full JOBID` may reach every process of a job.

requeue_after() {
  local command status=0 stopping=
  trap '' USR1
  trap 'stopping=yes; kill -TERM "$command"' TERM
  "$@" &
  command=$!
  wait "$command" || status=$?
  while kill -0 "$command" 2>/dev/null; do # the signal ended the waiting, not the command
    status=0
    wait "$command" || status=$?
  done
  trap - TERM
  [ -z "$stopping" ] || scontrol requeue "$SLURM_JOB_ID"
  return "$status"
}
