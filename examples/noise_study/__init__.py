"""When does noise awareness help? ``python -m examples.noise_study``; what was found: docs/noise_study.md.

``tasks`` asks and spells answers, ``model`` is the decoder that gives them, ``pairs`` are preferences and what is wrong
with them, ``losses`` what is compared, ``training`` one run, ``plan`` all runs, ``results`` the CSV that each adds to,
``findings``, ``figures`` and ``page`` what they say together.
"""
