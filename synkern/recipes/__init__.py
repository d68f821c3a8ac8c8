"""Published training methods as short programs on synkern's public functions.

``importance`` holds Algorithms 1 and 2 of "Not All LLM-Generated Data Are Equal" (IMP-Loss, DIMP-Loss); ``train`` runs
them, with cross entropy and focal loss beside them, from files to table and plots; ``demo`` does so on film reviews.
``sungen`` holds Algorithm 1 of "Self-Guided Noise-Free Data Generation" (SunGen), ``rivals`` the methods it is compared
with; ``reweight`` runs them. ``runs``, ``data``, ``noise``, ``models``, ``training``, ``checkpoint`` and ``report`` are
the parts they are made of.

The modules need the packages of the ``recipes`` extra and are imported only when asked for.
"""
