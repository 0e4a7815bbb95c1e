"""Stands in for the extension that mamba-ssm compiles for Mamba-1: imported with the package, and not called here."""
