"""Stands in for mamba-ssm's compiled extension for Mamba-1, which the package imports and these tests never call."""
