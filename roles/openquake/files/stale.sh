# Name what a unit that runs has not read: $1 the unit, $2... its files. Prints nothing where it has
# read all of them, or does not run. When a file was written counts, not by which run of Ansible.
set -eu
export LC_ALL=C
unit=$1
shift
show() { systemctl show --value --timestamp=us+utc --property="$1" "$unit"; }

[ "$(show ActiveState)" = active ] || exit 0
[ "$(show NeedDaemonReload)" = no ] || echo "$unit"
since=$(show StateChangeTimestamp) # its start, or the last time that it was told to read again
# by a clock that was ahead then, what was written since looks older
[ "$(date +%s --date="$since")" -le "$(date +%s)" ] || echo "$unit"
for file in "/etc/systemd/system/$unit" "$@"; do
    [ ! -e "$file" ] || find "$file" -prune -newermt "$since"
done
