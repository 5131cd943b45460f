# Let the group openquake through the home $2 and make its oqdata readable for the group, with what
# is in it and what will be, whatever the umask. $1: apply, or check to change nothing. Prints the
# commands that are needed; nothing where all is as it should be.
set -eu
mode=$1 home=$2 oqdata=$2/oqdata

needed() {
    echo "$*"
    [ "$mode" = check ] || "$@"
}

# a home may be opened wider, but what the mask of its list makes void ("#effective") is not open
acl() { getfacl --omit-header --absolute-names "$1" 2>/dev/null; }
acl "$home" | grep -qx 'group:openquake:..x' ||
    needed setfacl --modify group:openquake:x "$home"

[ -d "$oqdata" ] || needed mkdir "$oqdata"
[ "$(stat --format='%G %a' "$oqdata" 2>/dev/null)" = 'openquake 2750' ] || {
    needed chgrp openquake "$oqdata"
    needed chmod 2750 "$oqdata"
}
acl "$oqdata" | grep -qx 'default:group:openquake:r-x' || {
    me=$(id --user)
    needed find "$oqdata" -user "$me" -type d -exec \
        setfacl --modify group:openquake:rx,default:group:openquake:rx {} +
    needed find "$oqdata" -user "$me" -type f -exec setfacl --modify group:openquake:r {} +
}
