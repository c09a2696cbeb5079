"""What is wrong with a bundle."""

from ..errors import LocalTensorError


class BundleError(LocalTensorError, ValueError):
    """A bundle that cannot be written, read, or run here."""
