"""Print each NAME=ADDRESS of the arguments that resolves to something else."""

import socket
import sys

for argument in sys.argv[1:]:
    name, wanted = argument.split("=")
    try:
        found = socket.gethostbyname(name)
    except OSError as error:
        found = str(error)
    if found != wanted:
        print(f"{name} resolves to {found}, which must be {wanted}; correct /etc/hosts or the DNS")
