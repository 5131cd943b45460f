# Name each directory above the given paths into which others than root can write: they could put
# anything in the place of what root makes there. $@: the paths. Top down, and links as well as what
# they point to, so that nothing is followed that another may have put there.
set -eu
export LC_ALL=C

# one that others can write to, or that is another's; ends the way there
sound() {
    found=$(find -H "$1" -prune \( ! -user root -o -perm -0002 -o -perm -0020 ! -group root \) \
        -printf '%u, mode %m') || return 0 # it is not there yet, and so is nothing below it
    [ -z "$found" ] || { echo "$path: $1 ($found)"; return 1; }
}

# all of a path without links
way() {
    at=
    sound / || return 1
    for part in $(echo "$1" | tr / ' '); do
        at=$at/$part
        sound "$at" || return 1
    done
}

set -f
for path do
    above=
    for part in $(dirname "$path" | tr / ' '); do
        above=$above/$part
        [ -e "$above" ] || break
        way "$(readlink -f "$above")" || break
    done
done
