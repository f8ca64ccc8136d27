"""Targets: the models that are decoded, each behind the small protocol of :mod:`arsd.models.target`."""
