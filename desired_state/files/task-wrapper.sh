#!/usr/bin/env bash
# Runs one task and leaves its pid, log and exit code where the dispatcher looks for them.
#   task-wrapper.sh PROJECT_DIRECTORY TASK_ID COMMAND [ARGUMENT...]
set -uo pipefail

if [ "${1:-}" = --version ]; then
  echo "task-wrapper 1.0"
  exit 0
fi
if [ $# -lt 3 ]; then
  echo "usage: task-wrapper.sh PROJECT_DIRECTORY TASK_ID COMMAND [ARGUMENT...]" >&2
  exit 64
fi

state="$1/tasks/$2"
shift 2
mkdir -p "$state"
rm -f "$state/exit_code"
echo $$ > "$state/pid"
"$@" >> "$state/log" 2>&1
code=$?
# Written beside and renamed: a reader sees no exit code or the whole one.
echo "$code" > "$state/.exit_code.new"
mv "$state/.exit_code.new" "$state/exit_code"
exit "$code"
