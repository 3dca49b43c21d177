"""Loads, runs and saves compressed models. Flat files that travel with every pushed model."""
