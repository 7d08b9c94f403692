# What bed.py starts in namespaces of its own; it ends, and everything in them
# with it, when its standard input does, also if nobody was left to end it.
#
#   sh bed.sh FOLDER BASE INSTALLED CGROUP
#
# Mounts, network namespaces, interfaces and processes are of these namespaces;
# only the control groups below CGROUP are seen from outside.
set -eu
folder=$1 base=$2 installed=$3 group=$4

mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
umount -R /sys
mount -t sysfs sysfs /sys
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs tmpfs "$folder"

# Two hosts and what is between them: a switch, where cables can be pulled.
ip link add wire type bridge
for host in source destination; do
    ip netns add $host
    ip link add to-$host type veth peer name eth0 netns $host
    ip link set to-$host master wire up
    ip -n $host link set lo up
done
ip link set wire up
ip -n source addr add 10.77.0.1/24 dev eth0
ip -n destination addr add 10.77.0.2/24 dev eth0
for host in source destination; do
    ip -n $host link set eth0 up
done

# The control group of the first process is where systemd-nspawn looks for the
# root of what there is, so it is the first process of a namespace.
boot() {
    echo 0 >"/sys/fs/cgroup/$group/$1/cgroup.procs"
    exec unshare --cgroup --pid --fork --mount-proc sh -euc '
        umount /sys/fs/cgroup
        mount -t cgroup2 none /sys/fs/cgroup
        exec "$@"' boot \
        systemd-nspawn --quiet --boot --register=no --keep-unit \
        --machine="$1" --directory="$folder/$1/root" --link-journal=no \
        --network-namespace-path="/run/netns/$1" --console=pipe \
        --resolv-conf=off --timezone=off --capability=CAP_NET_ADMIN
}

for host in source destination; do
    mkdir -p "/sys/fs/cgroup/$group/$host"
    mkdir -p "$folder/$host/upper" "$folder/$host/work" "$folder/$host/root"
    mount -t overlay overlay "$folder/$host/root" -o \
        "lowerdir=$installed:$base,upperdir=$folder/$host/upper,workdir=$folder/$host/work"
    boot $host </dev/null &
done
cat >/dev/null
