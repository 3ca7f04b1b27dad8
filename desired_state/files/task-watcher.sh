#!/usr/bin/env bash
# Notes every task that ended in ~/task-watcher.log, once, so that the dispatcher need not look into each directory.
set -uo pipefail

log="$HOME/task-watcher.log"
while true; do
  for code in "$HOME"/*/tasks/*/exit_code; do
    [ -f "$code" ] || continue
    seen="${code%exit_code}.seen"
    if [ ! -f "$seen" ] || [ "$code" -nt "$seen" ]; then
      printf '%s %s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "${code%/exit_code}" "$(cat "$code")" >> "$log"
      touch "$seen"
    fi
  done
  sleep 5
done
