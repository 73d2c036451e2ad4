"""What the pod's helpers run: small programs for any POSIX shell with tar, gzip, head, tee, find and sha256sum.

They and the worker meet in the pod's workspace. Whatever a worker asks for touches ``control/contact``;
when that has not happened for six hours, there is no worker any more, and the pod ends by itself. A tree is
taken over only when both sides have found the same digest of it.
"""

from __future__ import annotations

SHELL = "/bin/sh"
KEPT_MINUTES = 360
"""How long a pod waits for a worker to come back."""
NO_CONTACT = 75
"""How ``stage`` ends when none came."""

# Container "stage": holds the step back until the worker has sent everything. It sleeps until it is woken: a hundred
# pods that wait for their files must leave the nodes to those that run. The pipe is held open both ways, so that nobody
# ever waits for the other side.
WAIT = f"""
trap 'exit 1' TERM
umask 022
mkdir -p control && touch control/contact || exit 1
[ -p control/wake ] || mkfifo control/wake || exit 1
exec 3<> control/wake
while sleep 60; do echo; done >&3 &
while [ -n "$(find control/contact -mmin -{KEPT_MINUTES})" ]; do
  if [ -e control/staged ]; then
    sleep 0.05  # whoever has woken it ends first, and by itself
    exit 0
  fi
  head -c 1 <&3 > /dev/null & wait $!
done
exit {NO_CONTACT}
"""

# Container "outputs": keeps the workspace within reach, above all once the step has ended. Told to end, it
# waits to be asked for what there is, as long as the grace period lets it.
KEEP = f"""
trap 'until [ -e control/done ]; do sleep 0.1; done; exit 0' TERM
touch control/contact
while [ -n "$(find control/contact -mmin -{KEPT_MINUTES})" ]; do
  sleep 30 & wait $! || true
done
"""

# Takes a tar archive of $1 bytes from stdin, prints its digest, and lets the step begin once the worker
# has answered with the word $2. An agent that has taken over what came before ("merging") lets nothing follow.
RECEIVE = """
set -eu
umask 022
touch control/contact
rm -f control/staged
[ ! -e control/merging ]
rm -rf incoming.* code run outputs home runtime inputs
mkdir "incoming.$2"
mkfifo "control/pipe.$2"
sha256sum < "control/pipe.$2" > "control/digest.$2" &
head -c "$1" | tee "control/pipe.$2" | { tar -x -f - -C "incoming.$2" && cat > /dev/null; }
wait $!
cut -c 1-64 "control/digest.$2"
read -r word
[ "$word" = "$2" ]
mv "incoming.$2"/* .
rm -rf "incoming.$2" "control/pipe.$2" "control/digest.$2"
touch control/staged
[ ! -p control/wake ] || echo 1<> control/wake
"""

# Container "stage" of a step whose files are small: they lie in $1, out of the pod's Secret.
UNPACK = """
set -eu
umask 022
mkdir -p control
touch control/contact
rm -rf code run outputs home runtime inputs
gzip -dc < "$1" > control/files.tar
tar -x -f control/files.tar
rm control/files.tar
"""

# Writes a tar archive of what there is of $3... in the directory $2 to stdout, and its digest to stderr. $1 is
# a word of this transfer's own.
SEND = """
set -eu
touch control/contact
pipe="$PWD/control/pipe.$1" digest="$PWD/control/digest.$1" failed="$PWD/control/failed.$1" done="$PWD/control/done"
cd "$2"
shift 2
for name in "$@"; do
  shift
  [ ! -e "$name" ] || set -- "$@" "$name"
done
if [ $# = 0 ]; then
  touch "$done"
  echo nothing >&2
  exit
fi
mkfifo "$pipe"
sha256sum < "$pipe" > "$digest" &
{ tar -c -f - "$@" || touch "$failed"; } | tee "$pipe"
wait $!
[ ! -e "$failed" ]
cut -c 1-64 "$digest" >&2
rm -f "$pipe" "$digest"
touch "$done"
"""

# Writes what changed in the run directory, every $2 seconds: a line with the size of a tar archive and its
# digest, then the archive; "0 -" where nothing changed or it is larger than $3 bytes. $1 is a word of its own.
RELAY = """
last=
file="control/relay.$1"
trap 'rm -f "$file"' EXIT
while touch control/contact; do
  now="$(ls -lnR --full-time run | sha256sum)"
  size=0
  if [ "$now" != "$last" ]; then
    if tar -c -f "$file" run 2> /dev/null; then
      last="$now"
      size="$(wc -c < "$file")"
      [ "$size" -le "$3" ] || size=0
    fi
  fi
  if [ "$size" != 0 ]; then
    echo "$size $(sha256sum < "$file" | cut -c 1-64)" && cat "$file" || exit
  else
    echo "0 -" || exit
  fi
  sleep "$2"
done
"""
