"""mHC-lite: several residual streams through a decoder's layers, mixed by exactly doubly stochastic matrices."""
