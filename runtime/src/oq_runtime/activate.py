"""Importing this module puts the runtime under the engine of this process.

Meant for the engine's configuration, where ``code`` is executed before the engine's parallel module
exists::

    [oq_runtime]
    code = import oq_runtime.activate
"""

from oq_runtime import processes
from oq_runtime.engine.hook import activate
from oq_runtime.files import compiling

processes.name_user()  # before the engine asks for it
compiling.take()  # before the engine's first compiled function
activate()
