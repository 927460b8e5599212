#!/bin/busybox sh
# The first process of a guest. Runs /job.sh, hands /out back over the second serial port, and ends.
/bin/busybox --install -s /bin
export PATH=/python/bin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb TMPDIR=/tmp
export PYTHONPATH=/checkout PYTHONFAULTHANDLER=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
chmod 1777 /tmp /dev/shm
mount -t cgroup2 none /sys/fs/cgroup
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
ln -sf /proc/self/fd /dev/fd
ip link set lo up
hostname guest
ulimit -n 65536
ulimit -c 0
cd /checkout || poweroff -f
sh /job.sh 2>&1 | tee /out/log
dmesg >/out/dmesg
stty -F /dev/ttyS1 raw
tar -czf - -C /out . | base64 >/dev/ttyS1
sync
poweroff -f
