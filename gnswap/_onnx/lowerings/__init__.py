"""The ways to write a GroupNorm, one file each: its algebra, how exact it is, and why one would choose it."""
