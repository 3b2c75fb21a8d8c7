# Waiting for a process although signals come. Read by job scripts.

# await PID: its exit status. A trap ends `wait` early; bash keeps the true status for the next `wait`.
await() {
  local status again
  while :; do
    wait "$1"
    status=$?
    ((status > 128)) || return "$status"
    if kill -0 "$1" 2>/dev/null; then continue; fi
    wait "$1" 2>/dev/null
    again=$?
    ((again == 127 || again == -1)) || status=$again    # bash may have forgotten it
    return "$status"
  done
}
