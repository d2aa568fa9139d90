"""What a run that goes wrong logs: ``python -m examples.debugging``, in minutes; what it shows: docs/debugging.md.

``runs`` trains a toy in four ways with ``NaPOTrainer`` and keeps what that logs, ``page`` draws and tabulates it.
"""
