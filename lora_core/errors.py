"""The exceptions of the library. Each message gives the value, the rule and the fix."""


class LoraError(Exception):
    """Base class of every error that a user of this library can cause and fix."""


class ConfigError(LoraError, ValueError):
    """A configuration value breaks its rule."""


class TargetError(LoraError, ValueError):
    """A target pattern matches nothing, or matches what LoRA cannot adapt."""


class AdapterError(LoraError, ValueError):
    """An adapter's files are incomplete, malformed or do not fit the model."""


class BaseMismatchError(AdapterError):
    """An adapter meets a base model other than the one it was trained on."""


class RoutingError(LoraError, ValueError):
    """The layout of a batch does not match the routing of its rows to adapters."""


class CheckpointError(LoraError, ValueError):
    """A base model's files are incomplete, malformed or stored in an unsupported way."""


class MergeError(LoraError, RuntimeError):
    """A merge or its reversal cannot be done without losing weights."""


class ExportError(LoraError, ValueError):
    """An adapter cannot be written in another program's format without changing its output."""
