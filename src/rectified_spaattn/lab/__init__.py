"""Instruments: what measures, judges and draws. Nothing here is imported by code that generates."""
