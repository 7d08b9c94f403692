#!/bin/sh
# Recovers a paused postcopy, with a shell, sed and QMP; see docs/recovery.md.
#
#     recover.sh SOURCE DESTINATION URI
#
# SOURCE and DESTINATION are commands that lead to a control socket, for example
#     'srcd proxy --qmp /run/postcopyd/srcd-web1.qmp'
#     'ssh web2 dstd proxy --qmp /run/postcopyd/dstd-web1.qmp'
#     'socat - UNIX-CONNECT:/run/qemu.qmp'
# URI is where the destination listens and the source connects: tcp:10.0.0.2:4444.
# Exit status: 0 it goes on, 1 it cannot be recovered, 2 usage, 3 still paused.

set -eu
patience=30 # seconds

if [ $# -ne 3 ]; then
    echo "usage: $0 SOURCE DESTINATION URI" >&2
    exit 2
fi
source=$1 destination=$2 uri=$3

finish() { # STATUS TEXT
    echo "$2"
    exit "$1"
}

# The answer to one line, which may be an error; nothing if there is none.
ask() { # LEADS LINE
    pipes=$(mktemp -d)
    mkfifo "$pipes/in" "$pipes/out"
    sh -c "$1" <"$pipes/in" >"$pipes/out" &
    exec 3>"$pipes/in" 4<"$pipes/out"
    rm -r "$pipes"
    printf '%s\n' '{"execute": "qmp_capabilities"}' "$2" >&3
    answers=0 answer=
    while [ "$answers" -lt 2 ] && read -r line <&4; do
        case $line in
        '{"return"'* | '{"error"'*) answers=$((answers + 1)) answer=$line ;;
        esac
    done
    # The socket is left open until it has answered, and not a moment longer.
    exec 3>&- 4<&-
    wait
    [ "$answers" -lt 2 ] || printf '%s\n' "$answer"
}

status() { # LEADS
    answer=$(ask "$1" '{"execute": "query-migrate"}')
    [ -n "$answer" ] || finish 3 "no answer from: $1" >&2
    found=$(printf '%s\n' "$answer" | sed -n 's/.*"status": *"\([a-z-]*\)".*/\1/p')
    echo "${found:-none}"
}

look() {
    src=$(status "$source")
    dst=$(status "$destination")
    echo "source: $src, destination: $dst"
    case $src in
    completed) finish 0 "the migration is completed" ;;
    failed | cancelled | none) finish 1 "there is nothing to recover" ;;
    esac
    case $dst in
    failed | none | setup) finish 1 "the destination cannot be recovered" ;;
    esac
}

# Whether it was taken; the next look shows what has come of it.
order() { # NAME LEADS LINE
    echo "$1: $3"
    answer=$(ask "$2" "$3")
    case $answer in
    '{"error"'*)
        echo "$1: $answer"
        return 1
        ;;
    esac
}

# Look until both have the status, or patience is at its end. A destination that
# has all pages is completed even while the source does not know it.
both_are() { # STATUS
    left=$patience
    while look; do
        case "$src $dst" in
        "$1 $1" | "$1 completed") return 0 ;;
        esac
        left=$((left - 1))
        [ "$left" -gt 0 ] || return 1
        sleep 1
    done
}

look
case "$src $dst" in
'postcopy-active postcopy-active') finish 0 "postcopy goes on" ;;
esac
# One may not have noticed that the connection is gone.
if [ "$src" != postcopy-paused ]; then
    order source "$source" '{"execute": "migrate-pause"}' || :
fi
if [ "$dst" != postcopy-paused ] && [ "$dst" != completed ]; then
    order destination "$destination" '{"execute": "migrate-pause"}' || :
fi
both_are postcopy-paused || finish 3 "not both are paused"
# A QEMU refuses it while it has not closed its old listener yet.
left=5
while [ "$dst" = postcopy-paused ] && [ "$left" -gt 0 ]; do
    order destination "$destination" \
        "{\"execute\": \"migrate-recover\", \"arguments\": {\"uri\": \"$uri\"}}" &&
        break
    left=$((left - 1))
    sleep 1
    look
done
order source "$source" \
    "{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"$uri\", \"resume\": true}}" ||
    :
both_are postcopy-active ||
    finish 3 "still paused; query-migrate at both ends has error-desc"
finish 0 "postcopy goes on"
