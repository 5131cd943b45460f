#!/bin/sh
# Make a virtual environment of the packages that lie in its directory packages/.
# Arguments: PYTHON DIRECTORY [gdal]
set -eu

# The processes from this one up to the server of the connection, or Ansible on this host, one a
# line. Those above may go without an end of the playbook.
ancestors() {
    pid=$$
    while [ "$pid" -gt 1 ] && read -r name <"/proc/$pid/comm"; do
        echo "$pid"
        case $name in sshd* | ansible-*) return ;; esac
        pid=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$pid/status")
    done
}

# Nothing tells a command that its connection is gone: the build runs in a session of its own, which
# is ended when one of those above it is not there any more.
if [ -z "${OPENQUAKE_BUILD:-}" ]; then
    above=$(ancestors)
    OPENQUAKE_BUILD=1 setsid sh "$0" "$@" &
    build=$!
    {
        trap '' HUP INT # of a terminal that goes, to all but the build
        while [ "$(ancestors)" = "$above" ]; do sleep 1; done
        kill -TERM "-$build"
    } >/dev/null 2>&1 &
    watcher=$!
    status=0
    wait "$build" || status=$?
    kill "$watcher"
    exit "$status"
fi

umask 022 # every user runs what is installed here, and the workers read it
python=$1 venv=$2 gdal=${3:-}
cd "$venv"
# One at a time: this one waits for the end of another.
exec 9>packages/lock
flock 9
[ ! -e .complete ] || exit 0
rm -rf bin compiled include lib lib64 share pyvenv.cfg # of an earlier try
"$python" -m venv .

index=
if [ -d packages/wheelhouse ]; then
    index="--no-index --find-links=packages/wheelhouse"
fi
# --no-deps: the locks are complete, and say at their top why pip must not resolve
pip="bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps $index"
set -- packages/engine-*.txt
$pip -r "$1" -r packages/webui.txt
$pip packages/oq_runtime-*.whl
if [ -n "$gdal" ]; then
    # the bindings must be of the version of the library
    $pip setuptools
    $pip --no-build-isolation "gdal==$(gdal-config --version)"
fi

# Users and workers cannot write here: whatever is not compiled now, each process compiles again.
bin/python -m compileall -q -j 0 lib >/dev/null || true # some packages carry code for other Pythons

# What numba compiles when the engine is imported, for minutes: the runtime gives it to each user. In
# a home that is empty, and before the settings are there, for it is root who imports it.
mkdir -p packages/home
env -i CI=true HOME="$PWD/packages/home" LC_ALL=C.UTF-8 NUMBA_CACHE_DIR="$PWD/compiled" PATH="$PATH" \
    bin/python -c 'import openquake.engine.engine'
rm -rf packages/home

ln -sf ../openquake.cfg openquake.cfg # the settings are the same for all environments
rm -rf packages/wheelhouse
# after a power cut, too, one that is complete has all its files
sync -f .
touch .complete
