"""GroupNorm on CUDA in Triton, one file per way of cutting the work; nothing here imports triton before it is used.

=========================  ==================================  ==================================================
regime                     when                                accesses per element, forward / backward
=========================  ==================================  ==================================================
tile, flat                 a group fits one program            2 / 3: one read, one write
cluster                    it fits a few (sm_90)               2 / 3
split                      larger, or sm_80                    3 / 5: statistics, then apply
channels_last_tile         some whole groups fit one program   2 / 3
channels_last_split        otherwise                           3 / 5
=========================  ==================================  ==================================================

With a residual one access more each way, and one more for its gradient. Rules of all kernels: arithmetic in fp32;
the mean first and then the centred second moment, or partial moments merged by Chan, Golub & LeVeque (1983); no
atomics and no program that waits for another, so every sum has one order; a sample's programs never see another
sample, so its bits do not depend on the batch.
"""
