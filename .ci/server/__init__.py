"""Checks of a running `marlin serve`, one file for each area; ../check_server.py runs them."""
