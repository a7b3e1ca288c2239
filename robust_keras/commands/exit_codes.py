"""Exit codes of the commands; 0 where all went well."""

FAILED = 1  # an error in the middle of a run, a lost process, or a file; started again, the command goes on
USAGE = 2  # bad input; nothing was trained or attacked
NON_FINITE_LOSS = 3  # never saved as the newest or the best
TERMINATED = 75  # saved and stopped on a termination signal; the same command goes on
