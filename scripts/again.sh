#!/usr/bin/env bash
# Runs a command until it is done or can't be helped by running it again: `scripts/again.sh python train.py ...`.
# train.py's exit codes 2 (wrong input), 3 (diverged) and 4 (no good checkpoint) end it; a lost peer or machine (5), a time limit (75)
# and signals from elsewhere don't, for the same command goes on from the last checkpoint. SIGTERM and SIGINT reach the command.
set -uo pipefail
stopped=0
trap 'stopped=1; [ -n "${child:-}" ] && kill -TERM "$child" 2>/dev/null' TERM INT
for attempt in $(seq 1 "${MOST_ATTEMPTS:-100}"); do
  "$@" &
  child=$!
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a signal to us ends the wait and not the command
  case $code in 0|2|3|4) exit "$code";; esac
  [ "$stopped" = 1 ] && exit "$code"
  echo "again.sh: exit code $code at attempt $attempt: once more in ${PAUSE_S:-10} s" >&2
  sleep "${PAUSE_S:-10}"
done
exit "$code"
