"""The engine's WebUI as a service: ``oq-webui``.

The engine's own command is Django's development server: no login, debug pages, a secret key that
everybody knows. Here is the same site behind waitress, with login (the engine's mode
``RESTRICTED``) and static files from whitenoise. Starting or stopping it leaves running jobs alone.

What it needs is made by ``oq-webui --init``, see ``prepare``; what the environment sets is in
``site``.
"""

import oq_runtime

oq_runtime.leave_working_directory_out()
