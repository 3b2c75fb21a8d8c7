"""The HMAR transformer: maths once, over plain or tensor-parallel linears."""
