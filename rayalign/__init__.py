"""rayalign: preference optimization in which "off-policy or on-policy?" is a setting, not a rewrite."""

__version__ = "0.1.0"
