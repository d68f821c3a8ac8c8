"""The operators of synkern in Triton, for GPUs without the CUDA library; installs as ``synkern.triton_kernels``.

``losses`` holds the scalar maths of every loss, ``rows`` and ``contraction`` the kernels, ``operators`` the launchers
that are registered with torch. Importing this package imports nothing; importing its modules imports triton.
"""
