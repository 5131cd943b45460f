# Stop the agent, which runs from the mounts, and unmount. $@: names of the units, without .mount.
#
# Not by stopping the units: the sessions of users whose homes are in a mount need its unit, so
# systemd would end them with it, that of Ansible's login included.
set -eu
systemctl stop openquake-worker.service || [ $? = 5 ] # there is none
for unit do
    if systemctl is-active --quiet "$unit.mount"; then
        umount --lazy "$(systemctl show --property=Where --value "$unit.mount")"
    fi
done
