# Make the results of whoever runs this readable for the group openquake, whatever the umask.
# $1: apply, or check to change nothing. $2: the directory with oqdata. $3: home, where $2 is the
# home and only oqdata is opened; own, where $2 is made, and all in it is opened. Prints the commands
# that are needed; nothing where all is as it should be. Ends with 1 and a line where somebody else
# sits on one of the two.
set -eu
mode=$1 place=$2 kind=$3 oqdata=$2/oqdata opened=$2
entries=group:openquake:rx,default:user::rwx,default:group::rx,default:group:openquake:rx
entries=$entries,default:other::-

needed() {
    echo "$*"
    [ "$mode" = check ] || "$@"
}

directory() {
    [ -e "$1" ] || [ -L "$1" ] || needed mkdir "$1"
    [ -e "$1" ] || [ -L "$1" ] || return 0 # only checked
    if [ -L "$1" ] || ! [ -d "$1" ] || ! [ -O "$1" ]; then
        echo "$1 must be a directory of $(id --user --name), and is: $(ls -ld "$1")" >&2
        exit 1
    fi
}

# a directory may be opened wider, but what the mask of its list makes void ("#effective") is shut
acl() { getfacl --omit-header --absolute-names "$1" 2>/dev/null; }

directory "$place"
if [ "$kind" = home ]; then
    opened=$oqdata
    acl "$place" | grep -qx 'group:openquake:..x' ||
        needed setfacl --modify group:openquake:x "$place"
fi
directory "$oqdata"
for made in "$opened" "$oqdata"; do
    # 3770 is the shared directory itself, where the engine puts oqdata of its own account into it
    case $(stat --format='%G %a' "$made" 2>/dev/null) in
    'openquake 2750' | 'openquake 3770') ;;
    *)
        needed chgrp openquake "$made"
        needed chmod 2750 "$made"
        ;;
    esac
done
acl "$opened" | grep -qx 'default:group:openquake:r-x' || {
    me=$(id --user)
    needed find "$opened" -user "$me" -type d -exec setfacl --modify $entries {} +
    needed find "$opened" -user "$me" -type f -exec setfacl --modify group:openquake:r {} +
}
