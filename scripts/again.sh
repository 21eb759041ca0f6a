#!/usr/bin/env bash
# Runs a command until it is done, or can't be helped by running it again: `scripts/again.sh python train.py ...`.
# train.py goes on from its last checkpoint after a lost peer or machine (exit code 5), a time limit (75) or a kill. It isn't run again after
# a crash of its own (1), wrong input (2), divergence (3), damage (4), or where it can't be run at all (126, 127); nor once SIGTERM or
# Ctrl-C has come, which is handed on.
set -uo pipefail
stopped=''
trap 'stopped=TERM; kill -TERM "${child:-}" 2>/dev/null' TERM
trap 'stopped=INT; kill -INT "${child:-}" 2>/dev/null' INT
for attempt in $(seq 1 "${MOST_ATTEMPTS:-100}"); do
  setsid "$@" &  # a group of its own: a terminal's Ctrl-C would come twice
  child=$!
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a signal to us ends the wait, and not the command
  case $code in 0|1|2|3|4|126|127) exit "$code" ;; esac
  [ -n "$stopped" ] && exit "$code"
  echo "again.sh: exit code $code at attempt $attempt; once more in ${PAUSE_S:-10} s" >&2
  sleep "${PAUSE_S:-10}" & child=$!
  wait "$child"
  [ -n "$stopped" ] && exit "$code"
done
exit "$code"
