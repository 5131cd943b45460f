"""The errors of the runtime: one root, one class per thing that a caller may want to tell apart."""


class OqRuntimeError(Exception):
    """Root of all errors raised by the runtime."""


class ConfigError(OqRuntimeError):
    """A setting is missing or makes no sense; the message names it and the remedy."""


class UnsupportedEngine(OqRuntimeError):
    """The installed engine is not one that the adapter knows."""


class ProtocolError(OqRuntimeError):
    """A message that is not of this protocol, or of another version of it."""


class VersionError(ProtocolError):
    """A message of another version of the protocol; the text names both."""


class TransitionError(OqRuntimeError):
    """An event that the state table does not allow; the state is unchanged."""


class CallTooBig(OqRuntimeError):
    """A task has more around its arguments than fits into a message."""


class BrokerLost(OqRuntimeError):
    """The broker process is gone, and with it the tasks that it held."""


class WorkerDied(OqRuntimeError):
    """A task lost its worker process as often as it may; the message has the history."""


class OutOfMemory(OqRuntimeError):
    """A task ran out of memory also when it had a node for itself; the message has the figures."""


class NodeLost(OqRuntimeError):
    """A task lost its node, or its results on the way from it, too often."""


class NoRoom(OqRuntimeError):
    """This host has no room for results; the text says where and what to do."""


class ArgumentLost(OqRuntimeError):
    """A big argument of a task was deleted before the task could have it."""


class JournalError(OqRuntimeError):
    """The journal of a job cannot be read; the text says where and why."""


class NoWorkers(OqRuntimeError):
    """No node is left to run a task on."""


class SecurityError(OqRuntimeError):
    """Encryption or authentication cannot be guaranteed; nothing is started."""


class InputError(OqRuntimeError):
    """Something that the user gave cannot be used; the text is the whole message."""
