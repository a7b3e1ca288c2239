"""Whether a program compiles for a TPU and fits it, found out without one."""
