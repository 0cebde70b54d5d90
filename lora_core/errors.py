"""The exceptions of the library. Each message holds the value, the rule and what to do."""


class LoraError(Exception):
    """Base of every error a user of this library can cause and mend."""


class ConfigError(LoraError, ValueError):
    """A configuration value breaks its rule."""


class TargetError(LoraError, ValueError):
    """A target pattern matches nothing, or matches what LoRA cannot adapt."""


class AdapterError(LoraError, ValueError):
    """An adapter's files are incomplete, malformed or do not fit the model."""


class BaseMismatchError(AdapterError):
    """An adapter meets a base model other than the one it was trained on."""


class RoutingError(LoraError, ValueError):
    """A batch is not laid out as the routing of its rows to adapters says."""


class CheckpointError(LoraError, ValueError):
    """A base model's files are incomplete, malformed or stored in a way that cannot be used here."""


class MergeError(LoraError, RuntimeError):
    """A merge or its reversal cannot be done without losing weights."""


class ExportError(LoraError, ValueError):
    """An adapter cannot be said in another program's format without changing what it computes."""
