#!/usr/bin/env bash
# Leave the image busybox:1.36 on the Docker daemon, where tests look for it: a shell and small tools in a few MB.
#
# Where no registry can be reached, a stand-in of the same name is made from the distribution's busybox-static, whatever
# its version. Its root filesystem is kept as a tarball in the user's cache.
set -euo pipefail

image="${1:-busybox:1.36}"
recipe=1 # raise it when what is put into the tarball changes
cache="${XDG_CACHE_HOME:-$HOME/.cache}/airflow-mlpipelines"
tarball="$cache/busybox-$(dpkg --print-architecture)-v$recipe.tar"

if docker image inspect "$image" >/dev/null 2>&1; then
  echo "image: $image is there"
  exit 0
fi

if [ ! -f "$tarball" ]; then
  mkdir -p "$cache"
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  chmod 755 "$work"
  echo "image: making $image from the package busybox-static"
  cd "$work" # the package is unpacked, not installed: it would drive out the machine's own busybox
  apt-get download -qq busybox-static 2>/dev/null || {
    apt-get update -qq
    apt-get download -qq busybox-static
  }
  dpkg-deb --extract busybox-static_*.deb package
  mkdir -p root/{bin,dev,etc,home,proc,root,sys,tmp,usr/bin,usr/sbin,sbin,var}
  chmod 1777 root/tmp
  program="$(find package -type f -name busybox -perm -u+x)"
  cp "$program" root/bin/busybox
  for command in $("$program" --list); do
    [ "$command" = busybox ] || ln -s busybox "root/bin/$command"
  done
  printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n' >root/etc/passwd
  printf 'root:x:0:\nnogroup:x:65534:\n' >root/etc/group
  tar -C root --owner=0 --group=0 -cf "$tarball.new.$$" .
  mv "$tarball.new.$$" "$tarball"
fi

docker import \
  --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
  --change 'CMD ["sh"]' \
  "$tarball" "$image" >/dev/null
echo "image: $image is there now"
