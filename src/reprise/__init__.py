"""reprise: reproduce deep-learning papers and end with a verdict on their claims."""

__version__ = "0.1.0"
