"""Speed and memory of the losses, side by side with what a user would write otherwise.

``python -m benchmarks`` runs it; README.md beside this file says what the numbers mean. ``cases`` and ``peers`` are the
registries of what is measured and of who is measured, ``devices`` holds all that depends on the device, ``checks``
refuses wrong numbers, ``timing`` and ``memory`` measure, ``goals`` says what the project asks of itself, ``report``
writes.
"""
