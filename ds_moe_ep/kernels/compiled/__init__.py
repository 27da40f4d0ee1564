"""Operations as Triton kernels, a file each, beside the plain-torch form of the file of the same name above.

Importing a file of this folder needs triton. Kernels compute in fp32 whatever the tensors' types are, take tensors
whose last dimension is contiguous, and index by int64 wherever a number of elements may pass 2^31.
"""
