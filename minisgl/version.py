"""The version of minisgl, for the package, the API's answers and the user agent of its clients."""

__version__ = "0.1.0"
