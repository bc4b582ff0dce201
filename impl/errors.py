"""What callers' mistakes raise: one `ValueError` family, worded argument, rule, value, hint."""

from __future__ import annotations


class AttentionError(ValueError):
    """A caller's mistake; the base of every error this package raises on purpose."""


class ConfigError(AttentionError):
    """A configuration value, or a combination of them, that cannot describe an attention layer."""


class ShapeError(AttentionError):
    """A tensor of the wrong shape, dtype or kind."""


class UnsupportedError(AttentionError, NotImplementedError):
    """A valid request that this version does not serve; it is refused, never approximated."""


class StateDictError(AttentionError, RuntimeError):
    """A state dict that does not fit the layer.

    Also a `RuntimeError`, which is what `torch.nn.Module.load_state_dict` raises.
    """


class DeviceError(AttentionError, ImportError):
    """The Neuron SDK is missing, is PyPI's placeholder, or is of a version that is not served."""


def explain(argument: str, rule: str, got: object, hint: str = "") -> str:
    """Word one error sentence.

    Args:
        argument: name of the offending argument.
        rule: what it must satisfy, starting with a verb.
        got: the offending value.
        hint: what the caller probably wants, or nothing.

    Returns:
        `"<argument> must <rule>, got <got>; <hint>"`, without the last part if there is no hint.
    """
    sentence = f"{argument} must {rule}, got {got}"
    return f"{sentence}; {hint}" if hint else sentence
